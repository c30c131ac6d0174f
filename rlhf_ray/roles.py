"""The roles of the PPO stage, in one table. A new role is one entry: placement, start, status and metrics derive from it.

This module imports neither Ray nor PyTorch, because configs and job commands read it. Code of a role is named by
`module:attribute` and imported when the role starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rlhf_ray.config.ppo import PpoConfig

Kind = Literal["rollout", "scoring", "learner"]
"""What a role does. The metric `idle/<kind>` is the share of a step in which no role of the kind works."""


@dataclass(frozen=True)
class Role:
    """Equal actors that do one job in the PPO stage."""

    name: str
    """The name in `ppo.placement.colocate`, and of the section of `ppo` that has the role's `workers`."""
    kind: Kind
    actor: str
    """The class of its actors, as `module:Class`. Ray lists actors by the name of the class."""
    label: str
    """What `rlhf-ray status` calls its actors."""
    phases: tuple[str, ...]
    """Phases of a step (metrics `time/<phase>_s`) in which the role works."""
    start: str
    """The coroutine that starts it, as `module:function`: (name, `Startup`) → the driver's handle to its actors."""
    runs: Callable[[PpoConfig], bool] = lambda ppo: True
    """Whether a run has the role."""
    evaluates: bool = False
    """Whether it also works in the stage `evaluation`, which trains nothing."""
    model: str = ""
    """For a learner: its `LearnerModel`, as `module:attribute`."""

    def load(self, attribute: Literal["actor", "start", "model"]) -> Any:
        """Import what an attribute of the form `module:name` names."""
        module, _, name = getattr(self, attribute).partition(":")
        return getattr(importlib.import_module(module), name)


_WORKERS, _LEARNER = "rlhf_ray.driver.workers", "rlhf_ray.learner.actor"

ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role(
            "policy", "learner", f"{_LEARNER}:Learner", "learner", ("preparation", "update", "publication"),
            f"{_WORKERS}:start_learner", model=f"{_LEARNER}:POLICY",
        ),
        Role(
            "rollout", "rollout", "rlhf_ray.rollout.worker:RolloutWorker", "rollout", ("rollout",),
            f"{_WORKERS}:start_rollout", evaluates=True,
        ),
        Role(
            "reward", "scoring", "rlhf_ray.rewards.workers:RewardWorker", "reward", ("scoring",),
            f"{_WORKERS}:start_reward", lambda ppo: ppo.reward.has_sources, evaluates=True,
        ),
        Role(
            "teacher", "scoring", "rlhf_ray.rewards.workers:TeacherWorker", "teacher", ("scoring",),
            f"{_WORKERS}:start_teacher", lambda ppo: ppo.teacher is not None and ppo.teacher.mode == "advantage",
        ),
        Role(
            "reference", "scoring", "rlhf_ray.rewards.workers:ReferenceWorker", "reference", ("scoring",),
            f"{_WORKERS}:start_reference",
            lambda ppo: ppo.algorithm.kl.placement != "none" and not ppo.share_reference, evaluates=True,
        ),
        Role(
            "value", "learner", f"{_LEARNER}:Learner", "learner", ("preparation", "update"),
            f"{_WORKERS}:start_learner", lambda ppo: ppo.algorithm.needs_value_model, model=f"{_LEARNER}:VALUE",
        ),
        Role(
            "discriminator", "learner", f"{_LEARNER}:Learner", "learner", ("discriminator",),
            f"{_WORKERS}:start_learner", lambda ppo: ppo.discriminator is not None, model=f"{_LEARNER}:DISCRIMINATOR",
        ),
    )
}  # fmt: skip

if TYPE_CHECKING:
    RoleName = str
else:
    RoleName = Literal[tuple(ROLES)]


def status_labels() -> dict[str, str]:
    """What status calls an actor, by the name of its class."""
    return {role.actor.partition(":")[2]: role.label for role in ROLES.values()}


def busy_phases() -> dict[str, tuple[str, ...]]:
    """The phases in which each kind of role works."""
    phases: dict[str, dict[str, None]] = {}
    for role in ROLES.values():
        phases.setdefault(role.kind, {}).update(dict.fromkeys(role.phases))
    return {kind: tuple(names) for kind, names in phases.items()}
