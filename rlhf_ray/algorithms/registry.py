"""Advantage estimators and policy losses by their names in the config, and what each of them requires or refuses.

An entry is the only place that states these facts: config validation, the driver and the learner read them here. A config may
also name an entry of the user's own as `package.module:name`. To add an algorithm, write its function in `advantages` or `losses`
and add an entry below.

Invariant: importing this module does not import torch, so that reading a config stays cheap.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rlhf_ray.algorithms.advantages import Advantages, EstimatorInput
    from rlhf_ray.algorithms.losses import Clip, PolicyLoss, PolicyTokens


@dataclass(frozen=True)
class AdvantageEstimator:
    """One way from rewards to advantages. Errors in the config name it as `ppo.algorithm.advantage`."""

    compute: Callable[[EstimatorInput], Advantages]
    """Called once per training step with the global batch."""
    needs_critic: bool = False
    """It reads `EstimatorInput.values` and returns targets for the value model, which is then trained."""
    needs_groups: bool = False
    """Every prompt must have at least two responses in the batch."""
    per_response: bool = False
    """All tokens of a response have the same advantage, so rewards cannot be discounted within a response."""
    reads_rewards: bool = True
    """False: a teacher is all that the policy learns from."""
    allows_kl_in_reward: bool = True
    """False: scores are normalised within a group, and a KL penalty in them would be normalised, too."""
    whitens: bool = False
    """`whiten_advantages` and `whiten_rewards` apply. Other estimators scale their advantages themselves or not at all."""


@dataclass(frozen=True)
class PolicyLossKind:
    """One way from advantages to a loss per token. Errors in the config name it as `ppo.algorithm.policy_loss`."""

    compute: Callable[[PolicyTokens, Clip], PolicyLoss]
    """Called with the whole sequences of a micro-batch, on every learner rank."""
    has_dual_clip: bool = False
    """It uses `Clip.dual`."""
    of_sequences: bool = False
    """Its ratio belongs to a whole sequence, so the objective is a mean over sequences and corrections are per sequence."""
    needs_response_advantages: bool = False
    """All tokens of a response must have the same advantage."""
    corrects_rollout_policy: bool = False
    """It reads `PolicyTokens.rollout_logprobs` and weighs tokens by π_old/π_engine itself."""


Entry = TypeVar("Entry", AdvantageEstimator, PolicyLossKind)


def estimator_named(name: str) -> AdvantageEstimator:
    """The advantage estimator that a config names, built in or `package.module:name`.

    Raises:
        ValueError: there is no such estimator, it cannot be imported, or it is not an `AdvantageEstimator`.
    """
    return _find(name, ESTIMATORS, AdvantageEstimator, "advantage estimator")


def policy_loss_named(name: str) -> PolicyLossKind:
    """The policy loss that a config names, built in or `package.module:name`.

    Raises:
        ValueError: there is no such loss, it cannot be imported, or it is not a `PolicyLossKind`.
    """
    return _find(name, POLICY_LOSSES, PolicyLossKind, "policy loss")


def _find(name: str, built_in: Mapping[str, Entry], kind: type[Entry], what: str) -> Entry:
    if name in built_in:
        return built_in[name]
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise ValueError(
            f"unknown {what} {name!r}; allowed: {', '.join(built_in)}, or package.module:name of your own {kind.__name__}"
        )
    found = import_named(name, what)
    if not isinstance(found, kind):
        raise ValueError(
            f"{what} {name!r} is a {type(found).__name__}; expected an object of {__name__}.{kind.__name__}, which holds the "
            "function and what it requires"
        )
    return found


def import_named(path: str, what: str) -> Any:
    """The object that `package.module:name` names. `what` says in errors what it should be.

    Raises:
        ValueError: the path has another form, the module cannot be imported, or it has no such name.
    """
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise ValueError(f"{what} {path!r}: expected the form package.module:name")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # A user's module may raise anything while it is imported.
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} {path!r}: cannot import {module_name!r}: {reason}") from error
    if not hasattr(module, name):
        raise ValueError(f"{what} {path!r}: module {module_name!r} has no {name!r}")
    return getattr(module, name)


def _imported_later(module: str, function: str) -> Callable[..., Any]:
    """A function that imports its implementation, and with it torch, when it is called."""

    def compute(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"rlhf_ray.algorithms.{module}"), function)(*arguments)

    return compute


def _estimator(function: str, **facts: bool) -> AdvantageEstimator:
    return AdvantageEstimator(_imported_later("advantages", function), **facts)


def _loss(function: str, **facts: bool) -> PolicyLossKind:
    return PolicyLossKind(_imported_later("losses", function), **facts)


ESTIMATORS = {
    "gae": _estimator("estimate_gae", needs_critic=True, whitens=True),
    "rloo": _estimator("estimate_rloo", needs_groups=True, per_response=True),
    "grpo": _estimator("estimate_grpo", needs_groups=True, per_response=True, allows_kl_in_reward=False),
    "dr_grpo": _estimator("estimate_dr_grpo", needs_groups=True, per_response=True, allows_kl_in_reward=False),
    "reinforce_plus_plus": _estimator("estimate_reinforce_plus_plus"),
    "reinforce_plus_plus_baseline": _estimator("estimate_reinforce_plus_plus_baseline", needs_groups=True),
    "none": _estimator("estimate_none", reads_rewards=False),
}
POLICY_LOSSES = {
    "ppo": _loss("ppo_loss", has_dual_clip=True),
    "decoupled_ppo": _loss("decoupled_ppo_loss", has_dual_clip=True, corrects_rollout_policy=True),
    "cispo": _loss("cispo_loss"),
    "gspo": _loss("gspo_loss", of_sequences=True, needs_response_advantages=True),
    "gspo_token": _loss("gspo_token_loss", of_sequences=True),
}
