"""`TeacherWorker`: how likely a larger model finds the tokens that the policy sampled."""

from __future__ import annotations

from rlhf_ray.rewards.workers import ReferenceWorker


class TeacherWorker(ReferenceWorker):
    """A frozen model with the policy's tokenizer, at the policy's sampling temperature.

    At the same temperature, so that a teacher that is the policy has nothing to teach.
    """
