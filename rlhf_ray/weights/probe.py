"""Whether a worker has what was published: its log-probabilities on a probe sequence against the learner's.

Checksums of an engine's tensors say little (kernels repack them); what it *computes* says everything.
"""

from __future__ import annotations

import numpy as np

from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.types import PolicyVersion


def probe_sequence(length: int, vocabulary: int, version: PolicyVersion) -> np.ndarray:
    """int32 [length]: random tokens, other ones for each version, so that in time every embedding is looked at."""
    return np.random.default_rng(version).integers(0, vocabulary, length, dtype=np.int32)


def disagreement(learner: np.ndarray, worker: np.ndarray, config: RolloutConfig) -> str | None:
    """None where the worker agrees, else what is wrong.

    Args:
        learner: float32 [T−1], nats, at temperature 1.
        worker: the same of the rollout worker.
        config: its dtype decides what is compared: the largest |Δ| in fp32; in bf16, where tokens scatter, the mean.
    """
    if learner.shape != worker.shape:
        return f"the learner gave {learner.shape[0]} log-probabilities on the probe and the worker {worker.shape[0]}"
    differences = np.abs(learner.astype(np.float64) - worker)
    measure, value = ("max", differences.max()) if config.dtype == "float32" else ("mean", differences.mean())
    tolerance = config.weights.probe_tolerance
    if value <= tolerance:  # false for NaN, too
        return None
    return (
        f"its log-probabilities on the probe differ from the learner's by {measure} |Δ| = {value:.3g} nats, "
        f"allowed: {tolerance:g} (rollout.weights.probe_tolerance)"
    )
