"""The RL algorithm: advantage estimator, policy loss, KL penalty and their settings.

Invariant: a combination that is undefined, or in which a setting would have no effect, is refused here. What each estimator and
each loss requires is stated in `rlhf_ray.algorithms.registry`.
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
from rlhf_ray.config.section import IMPORT_PATH_SCHEMA, Section

KLEstimator = Literal["k1", "k2", "k3"]


class KLConfig(Section):
    """The KL penalty, which keeps the policy close to the reference policy."""

    placement: Literal["reward", "loss", "none"] = "reward"
    """reward: subtracted from the reward of each token. loss: added to the policy loss. none: no penalty."""
    estimator: KLEstimator | None = None
    """Estimator of the KL (Schulman 2020); null: k1 in the reward, k3 in the loss. In the reward only k1 gives the gradient
    of KL(π‖ref). In the loss k2 gives it, k3 gives that of KL(ref‖π), and k1 and k3 give it with `importance_weighted`."""
    importance_weighted: bool = False
    """For placement loss: weigh the estimate by π_θ/π_old, which makes k1 and k3 exact (DeepSeek-V3.2, arXiv 2512.02556)."""
    coefficient: float = Field(0.05, ge=0)
    """β, the weight of the penalty: reward per nat."""
    target: float | None = Field(None, gt=0)
    """KL per sequence, in nats, towards which β adapts (Ziegler et al., arXiv 1909.08593); null: β is fixed."""
    horizon: int = Field(10_000, ge=1)
    """Number of episodes over which an adaptive β reacts."""

    @property
    def used_estimator(self) -> KLEstimator:
        """`estimator`, or the default of the placement."""
        return self.estimator or ("k1" if self.placement == "reward" else "k3")

    @model_validator(mode="after")
    def _target_needs_kl(self) -> KLConfig:
        if self.target is not None and self.placement == "none":
            raise ValueError("kl.target is set but kl.placement is none; choose reward or loss, or drop the target")
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                "kl.target is set but kl.coefficient is 0, which adaptation would never change; set it above 0"
            )
        return self

    @model_validator(mode="after")
    def _estimator_fits_placement(self) -> KLConfig:
        if self.importance_weighted and self.placement != "loss":
            raise ValueError("kl.importance_weighted works with kl.placement loss only; a reward is not differentiated")
        if self.placement == "loss" and self.used_estimator == "k1" and not self.importance_weighted:
            raise ValueError(
                "kl.estimator k1 as a loss has an expected gradient of zero; use k2 or k3, set kl.importance_weighted, "
                "or put it in the reward"
            )
        if self.importance_weighted and self.used_estimator == "k2":
            raise ValueError(
                "kl.estimator k2 has the gradient of KL(π‖ref) as it is without kl.importance_weighted and "
                "would lose it; use k1 or k3 with it"
            )
        return self


class OverlongConfig(Section):
    """DAPO's soft punishment of long responses (arXiv 2503.14476). It grows linearly over the last `buffer_tokens` of the
    limit."""

    buffer_tokens: int = Field(ge=1)
    """Length of the range below `rollout.sampling.max_new_tokens` in which responses are punished, in tokens."""
    penalty: float = Field(1.0, gt=0)
    """Reward that a response of the maximum length loses."""


class DynamicSamplingConfig(Section):
    """DAPO's dynamic sampling (arXiv 2503.14476): groups whose scores are all equal have no gradient and are replaced."""

    max_attempts: int = Field(3, ge=2)
    """How often the groups of one batch are generated at most. Groups of the last attempt are trained as they are."""


class PtxConfig(Section):
    """PPO-ptx (InstructGPT, arXiv 2203.02155, equation 2): the policy also trains on `data.demonstrations`."""

    coefficient: float = Field(27.8, gt=0)
    """γ, the weight of the demonstrations' cross-entropy (nats per token) relative to the policy loss. InstructGPT uses
    27.8."""
    share: float = Field(1.0, gt=0)
    """Demonstrations per rollout in each optimizer step."""


def _choice(find: Callable[[str], object], built_in: Mapping[str, object]) -> tuple[AfterValidator, WithJsonSchema]:
    """The type of a key whose value is the name of a registry entry, built in or the user's own."""

    def check(name: str) -> str:
        find(name)
        return name

    return AfterValidator(check), WithJsonSchema({"anyOf": [{"enum": list(built_in)}, IMPORT_PATH_SCHEMA]})


EstimatorName = Annotated[str, *_choice(estimator_named, ESTIMATORS)]
PolicyLossName = Annotated[str, *_choice(policy_loss_named, POLICY_LOSSES)]


class AlgorithmConfig(Section):
    """How rewards become gradients."""

    advantage: EstimatorName = "gae"
    """Advantage estimator: a built-in one, or your own as `package.module:name` of an `AdvantageEstimator`. `gae` trains a
    value model (PPO). `rloo`, `grpo`, `dr_grpo` and `reinforce_plus_plus_baseline` compare the responses to one prompt.
    `none`: no reward, only a teacher."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token, for `gae` and `reinforce_plus_plus`."""
    lam: float = Field(0.95, ge=0, le=1)
    """λ of GAE."""
    whiten_advantages: bool = True
    """Scale advantages to zero mean and unit variance over the valid tokens of the global batch. Only for `gae`; REINFORCE++
    always does it."""
    whiten_rewards: bool = False
    """Scale the rewards of tokens to unit variance and keep their mean. Only for `gae`."""
    policy_loss: PolicyLossName = "ppo"
    """Policy loss: a built-in one, or your own as `package.module:name` of a `PolicyLossKind`. `ppo`: the clipped surrogate,
    also that of GRPO and DAPO. `decoupled_ppo`: the same times π_old/π_engine (AReaL). `cispo`: REINFORCE with a clipped
    importance weight. `gspo`: the surrogate with one ratio per sequence. `gspo_token`: the same with one advantage per
    token."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """The ratio is clipped below at 1 − clip_low; 1 means no lower bound. GSPO's paper uses 3e-4, CISPO's 1."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high. DAPO's paper uses 0.28, GSPO's 4e-4."""
    dual_clip: float | None = Field(None, gt=1)
    """For negative advantages the loss is at most dual_clip·|A| (arXiv 1912.09729); null: no such bound."""
    clip_value: float = Field(0.2, gt=0)
    """Largest change of a value per update that the value loss rewards."""
    value_coefficient: float = Field(0.1, gt=0)
    """Weight of the value loss. It scales the gradients before they are clipped by their norm."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the policy's exact entropy, in nats per token, which is added to the objective."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """How token losses of the global batch become one number. token_mean: every token counts the same (DAPO). sequence_mean:
    every sequence counts the same (GRPO). constant: the sum divided by sequences times the response limit (Dr. GRPO)."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Importance weights for tokens on which learner and engine disagree. none: no weights. truncate: cut the weights (TIS).
    mask: drop tokens or sequences (IcePop, MIS)."""
    correction_level: Literal["token", "sequence"] = "token"
    """token: the ratio of each token (TIS, IcePop). sequence: the product of the ratios of a response (sequence TIS,
    MIS)."""
    correction_bounds: tuple[float, float] = Field((0.5, 2.0), strict=False)
    """Bounds of the ratio π_learner/π_engine. truncate uses the upper one, mask uses both."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the score of a response that reaches the token limit; null: nothing."""
    overlong: OverlongConfig | None = None
    """Soft punishment of long responses; null: none."""
    filter_truncated: bool = False
    """Leave responses that reach the token limit out of the loss (DAPO's overlong filtering). Group baselines still include
    them."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Replace groups without a gradient; null: keep them."""
    ptx: PtxConfig | None = None
    """Train on demonstrations in every optimizer step of the policy; null: do not."""
    kl: KLConfig = KLConfig()
    """The KL penalty."""

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
    """Names of the built-in entries for which a fact is true."""
    return ", ".join(name for name, entry in built_in.items() if getattr(entry, fact))
