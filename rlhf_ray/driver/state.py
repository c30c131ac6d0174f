"""What training has come to: the part of the driver's state that a checkpoint holds. Immutable."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.algorithms.kl_control import AdaptiveKL, FixedKL, KLController, controller_from_dict
from rlhf_ray.config.algorithm import KLConfig
from rlhf_ray.driver.admission import Admission
from rlhf_ray.driver.checkpointer import RunState


@dataclass(frozen=True)
class TrainingState:
    """Step number and KL controller."""

    step: int
    """PPO steps done; also the version of the policy they made."""
    next_group: int
    """Cursor into the prompt source: the first group that was never admitted."""
    kl: KLController
    unfinished: tuple[int, ...] = ()
    """Groups before the cursor that were neither trained nor given up (with staleness 0 there are none)."""

    @classmethod
    def initial(cls, kl: KLConfig) -> TrainingState:
        """Of a run that starts."""
        adaptive = kl.target is not None
        return cls(0, 0, AdaptiveKL(kl.coefficient, kl.target, kl.horizon) if adaptive else FixedKL(kl.coefficient))

    @classmethod
    def restored(cls, saved: RunState) -> TrainingState:
        """Of a run that goes on."""
        return cls(saved.step, saved.next_group, controller_from_dict(saved.kl), tuple(saved.unfinished))

    def saved(self, config_sha256: str) -> RunState:
        """For a checkpoint."""
        return RunState(self.step, self.next_group, self.kl.to_dict(), config_sha256, self.unfinished)

    def advance(
        self, kl: float | None, episodes: int, next_group: int, unfinished: tuple[int, ...] = ()
    ) -> TrainingState:
        """After a step on a batch of `episodes` sequences with that mean sequence KL (None: not measured)."""
        controller = self.kl if kl is None else self.kl.update(kl, episodes)
        return TrainingState(self.step + 1, next_group, controller, unfinished)

    def admission(self, groups_per_batch: int, staleness: int, attempts: int = 1) -> Admission:
        """Admission that goes on where this state is; what was in flight is generated again, with the same seeds."""
        return Admission(
            groups_per_batch, staleness, self.step, self.next_group, accepted=self.step * groups_per_batch,
            attempts=attempts, again=self.unfinished,
        )  # fmt: skip
