"""PPO's numbers, and the choice among its relatives by their names in the papers.

Invariant: what a combination would leave undefined, or would silently not do, is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from rlhf_ray.algorithms.registry import (
    ESTIMATORS,
    POLICY_LOSSES,
    AdvantageEstimator,
    PolicyLossKind,
    estimator_named,
    policy_loss_named,
)
from rlhf_ray.config.section import Section

KLEstimator = Literal["k1", "k2", "k3"]


class KLConfig(Section):
    """The pull towards the reference policy."""

    placement: Literal["reward", "loss", "none"] = "reward"
    """In the reward of each token (k1; exact with returns to go) or as a term of the loss."""
    estimator: KLEstimator | None = None
    """k1, k2 or k3 (Schulman 2020); None: k1 in the reward, k3 in the loss. In the reward only k1 has the gradient of
    KL(π‖ref); in the loss k2 has it, k3 has that of KL(ref‖π), and k1 and k3 have it if `importance_weighted`."""
    importance_weighted: bool = False
    """For `placement: loss`: weigh the estimate by π_θ/π_old, which makes k1 and k3 exact (DeepSeek-V3.2, arXiv 2512.02556)."""
    coefficient: float = Field(0.05, ge=0)
    """β, reward per nat."""
    target: float | None = Field(None, gt=0)
    """Sequence KL in nats towards which β adapts (Ziegler et al., arXiv 1909.08593); None: β stays."""
    horizon: int = Field(10_000, ge=1)
    """Episodes over which the adaptive β reacts."""

    @property
    def used_estimator(self) -> KLEstimator:
        """The estimator that is used where none is named."""
        return self.estimator or ("k1" if self.placement == "reward" else "k3")

    @model_validator(mode="after")
    def _target_needs_kl(self) -> KLConfig:
        if self.target is not None and self.placement == "none":
            raise ValueError("kl.target is set but kl.placement is none; choose reward or loss, or drop the target")
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                "kl.target is set but kl.coefficient is 0, which adapting would never change; start above 0"
            )
        return self

    @model_validator(mode="after")
    def _estimator_fits_placement(self) -> KLConfig:
        if self.importance_weighted and self.placement != "loss":
            raise ValueError("kl.importance_weighted is for kl.placement loss; a reward is not differentiated")
        if self.placement == "loss" and self.used_estimator == "k1" and not self.importance_weighted:
            raise ValueError(
                "kl.estimator k1 as a loss has an expected gradient of zero; use k2 or k3, set kl.importance_weighted, "
                "or put it in the reward"
            )
        if self.importance_weighted and self.used_estimator == "k2":
            raise ValueError(
                "kl.estimator k2 has the gradient of KL(π‖ref) as it is and would lose it by kl.importance_weighted; "
                "use k1 or k3 with it"
            )
        return self


class OverlongConfig(Section):
    """DAPO's soft punishment of long responses (arXiv 2503.14476): linear over the last `buffer_tokens` of the limit."""

    buffer_tokens: int = Field(ge=1)
    """The last so many tokens below `rollout.sampling.max_new_tokens` cost, in proportion."""
    penalty: float = Field(1.0, gt=0)
    """What a response of the limit's length loses of its score."""


class DynamicSamplingConfig(Section):
    """DAPO's dynamic sampling (arXiv 2503.14476): groups whose scores are all equal have no gradient and are replaced."""

    max_attempts: int = Field(3, ge=2)
    """At most so many times a batch's groups are generated for one batch; what comes after is trained as it is."""


class PtxConfig(Section):
    """PPO-ptx (InstructGPT, arXiv 2203.02155, equation 2): the policy goes on learning from `data.demonstrations`."""

    coefficient: float = Field(27.8, gt=0)
    """γ: weight of the demonstrations' cross-entropy, in nats per token, beside the policy loss."""
    share: float = Field(1.0, gt=0)
    """Demonstrations of each optimizer step, per rollout of it."""


def _choice(find: Callable[[str], object], built_in: Mapping[str, object]) -> tuple[AfterValidator, WithJsonSchema]:
    """The type of a key that names an entry of the registry: a built-in one, or the user's own."""

    def check(name: str) -> str:
        find(name)
        return name

    own = {"type": "string", "title": "package.module:name", "pattern": "^[^:]+:[^:]+$"}
    return AfterValidator(check), WithJsonSchema({"anyOf": [{"enum": list(built_in)}, own]})


EstimatorName = Annotated[str, *_choice(estimator_named, ESTIMATORS)]
PolicyLossName = Annotated[str, *_choice(policy_loss_named, POLICY_LOSSES)]


class AlgorithmConfig(Section):
    """How rewards become gradients."""

    advantage: EstimatorName = "gae"
    """`gae` trains a value model (PPO); the others start none. All but `gae` and `reinforce_plus_plus` compare the samples
    of one prompt. `none`: no reward, a teacher alone."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token, of `gae` and `reinforce_plus_plus`."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's λ."""
    whiten_advantages: bool = True
    """Zero mean and unit variance over the valid tokens of the global batch; for `gae` only (REINFORCE++ always does)."""
    whiten_rewards: bool = False
    """Unit variance of the token rewards, mean kept; for `gae` only."""
    policy_loss: PolicyLossName = "ppo"
    """PPO's clipped surrogate (GRPO's and DAPO's, too); that times π_old/π_engine (AReaL); REINFORCE with a clipped weight;
    the surrogate with one ratio per sequence, or that with an advantage per token."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """The ratio is clipped below at 1 − clip_low; 1 is no lower bound. (GSPO: 3e-4, CISPO: 1.)"""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high. (DAPO: 0.28, GSPO: 4e-4.)"""
    dual_clip: float | None = Field(None, gt=1)
    """For negative advantages the loss is at most dual_clip·|A|; None: no such bound."""
    clip_value: float = Field(0.2, gt=0)
    """Range of a value's change per update in the value loss."""
    value_coefficient: float = Field(0.1, gt=0)
    """Weight of the value loss (it scales gradients before clipping by norm)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the policy's exact entropy, in nats per token, which is added to the objective."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """How token losses of the global batch become one number (DAPO, GRPO, Dr. GRPO)."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """What to do where learner and engine disagree on probabilities: nothing, TIS, or leave out (IcePop, MIS)."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whose ratio: each token's (TIS, IcePop), or the product over a response (sequence TIS, MIS)."""
    correction_bounds: tuple[float, float] = Field((0.5, 2.0), strict=False)
    """Ratio π_learner/π_engine: `truncate` uses the upper bound, `mask` both."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the score of a response that hit the token limit."""
    overlong: OverlongConfig | None = None
    """Soft punishment of long responses."""
    filter_truncated: bool = False
    """Leave responses that hit the token limit out of the loss (DAPO's overlong filtering); baselines still know them."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Replace groups without signal."""
    ptx: PtxConfig | None = None
    """Demonstrations in every optimizer step of the policy."""
    kl: KLConfig = KLConfig()
    """The pull towards the reference."""

    @property
    def estimator(self) -> AdvantageEstimator:
        """The entry that `advantage` names."""
        return estimator_named(self.advantage)

    @property
    def loss_kind(self) -> PolicyLossKind:
        """The entry that `policy_loss` names."""
        return policy_loss_named(self.policy_loss)

    @property
    def needs_value_model(self) -> bool:
        """Whether a value model is trained."""
        return self.estimator.needs_critic

    @property
    def needs_groups(self) -> bool:
        """Whether every prompt must have at least two responses in a batch."""
        return self.estimator.needs_groups

    @field_validator("correction_bounds")
    @classmethod
    def _bounds_in_order(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= bounds[0] <= 1 <= bounds[1]:
            raise ValueError("correction_bounds must enclose 1, the ratio where engine and learner agree")
        return bounds

    @model_validator(mode="after")
    def _estimator_uses_what_is_set(self) -> AlgorithmConfig:
        name, estimator = self.advantage, self.estimator
        if not estimator.allows_kl_in_reward and self.kl.placement == "reward":
            raise ValueError(
                f"advantage {name} compares whole responses and normalises their scores, not KL; set kl.placement to loss "
                "or none (rloo and both reinforce_plus_plus are defined with it)"
            )
        if estimator.per_response and self.gamma != 1:
            raise ValueError(
                f"gamma {self.gamma:g} discounts rewards within a response, but advantage {name} takes a response as a whole; "
                "set gamma to 1"
            )
        if self.whiten_rewards and not estimator.whitens:
            raise ValueError(
                f"whiten_rewards shifts the reward of every token, which advantage {name} would see as a reward for length; "
                f"use it with {_names(ESTIMATORS, 'whitens')}, or remove it"
            )
        if self.dynamic_sampling is not None and not estimator.needs_groups:
            raise ValueError(
                f"dynamic_sampling drops groups without signal, and advantage {name} finds signal without groups; use it "
                f"with {_names(ESTIMATORS, 'needs_groups')}"
            )
        shaped = [name for name in ("missing_eos_penalty", "overlong") if getattr(self, name) is not None]
        shaped += ["kl.placement: reward"] if self.kl.placement == "reward" else []
        if shaped and not estimator.reads_rewards:
            raise ValueError(f"advantage {name} reads no reward, which {', '.join(shaped)} would change; remove it")
        return self

    @model_validator(mode="after")
    def _policy_loss_uses_what_is_set(self) -> AlgorithmConfig:
        name, loss = self.policy_loss, self.loss_kind
        if self.dual_clip is not None and not loss.has_dual_clip:
            raise ValueError(
                f"dual_clip bounds the surrogate of {_names(POLICY_LOSSES, 'has_dual_clip')}; policy_loss is {name}"
            )
        if loss.corrects_rollout_policy and self.correction != "none":
            raise ValueError(
                f"policy_loss {name} weighs by π_old/π_engine itself, and correction {self.correction} would do it "
                "again; set correction to none, or policy_loss to ppo for a bounded weight"
            )
        if loss.of_sequences and self.aggregation != "sequence_mean":
            raise ValueError(
                f"the objective of {name} is a mean over sequences; set aggregation to sequence_mean, not {self.aggregation}"
            )
        if loss.needs_response_advantages and not self.estimator.per_response:
            raise ValueError(
                f"policy_loss {name} needs one advantage per response, and advantage {self.advantage} gives one per token; use "
                f"gspo_token, or an advantage among {_names(ESTIMATORS, 'per_response')}"
            )
        if loss.of_sequences and self.correction != "none" and self.correction_level == "token":
            raise ValueError(f"{name} weighs whole responses; set correction_level to sequence, or correction to none")
        return self

    @model_validator(mode="after")
    def _truncated_are_punished_or_left_out(self) -> AlgorithmConfig:
        if self.filter_truncated and self.missing_eos_penalty:
            raise ValueError(
                "missing_eos_penalty lowers the score of truncated responses, which filter_truncated leaves out of the loss; "
                "choose one"
            )
        return self


def _names(built_in: Mapping[str, object], fact: str) -> str:
    """The built-in entries of which a fact holds."""
    return ", ".join(name for name, entry in built_in.items() if getattr(entry, fact))
