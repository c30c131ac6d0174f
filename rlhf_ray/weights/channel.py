"""What a weight channel is given and what it promises.

A channel moves one policy from the learners to some workers: it begins the update on each, sends every weight, and ends
it with the version. It does not judge: whether a worker may be used afterwards is decided by the publication's probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from ray.actor import ActorHandle

from rlhf_ray.types import PolicyVersion


class PublishingLearner(Protocol):
    """What a group of learners offers to be published from.

    Each rank is an actor with `weight_buckets(bucket_bytes)`, a generator that yields `WeightBucket`s on rank 0 and
    only takes part in the gathering on the others. vLLM's own transfer engines need `rendezvous()` on rank 0, and
    `connect_weight_transfer(plan)` and `send_weights(version)` on every rank (see `weights.native`).
    """

    @property
    def ranks(self) -> Sequence[ActorHandle]:
        """The group's actors, rank 0 first."""

    async def probe_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 [T−1], nats, at temperature 1: log-probabilities of tokens 1… of one sequence."""


class WeightChannel(Protocol):
    """A way for weights to travel."""

    async def send(
        self, learner: PublishingLearner, workers: Mapping[str, ActorHandle], version: PolicyVersion
    ) -> dict[str, Exception]:
        """Bring the learner's weights to the workers, as policy `version`.

        Args:
            learner: who has them.
            workers: rollout workers by name.
            version: what they are afterwards.

        Returns:
            Why it failed, for each worker that failed; the others hold the new weights whole.

        Raises:
            Exception: the learner failed; none of the workers can be trusted.
        """
