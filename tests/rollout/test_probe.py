"""When a worker agrees with the learner on a probe."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_ray.config.rollout import RolloutConfig, WeightChannelConfig
from rlhf_ray.weights.sync import disagreement, probe_sequence

_FP32 = RolloutConfig(weights=WeightChannelConfig(probe_tolerance=1e-3))
_BF16 = RolloutConfig(dtype="bfloat16", weights=WeightChannelConfig(probe_tolerance=0.05))


def test_fp32_compares_the_largest_difference() -> None:
    learner = np.zeros(100, dtype=np.float32)
    worker = learner.copy()
    worker[7] = 5e-4
    assert disagreement(learner, worker, _FP32) is None
    worker[7] = 2e-3
    assert "max |Δ| = 0.002" in disagreement(learner, worker, _FP32)


def test_bf16_compares_the_mean() -> None:
    learner = np.zeros(100, dtype=np.float32)
    worker = learner.copy()
    worker[7] = 1.0
    assert disagreement(learner, worker, _BF16) is None
    assert "mean |Δ| = 0.06" in disagreement(learner, worker + 0.05, _BF16)


@pytest.mark.parametrize("config", [_FP32, _BF16])
def test_nan_and_missing_tokens_never_agree(config: RolloutConfig) -> None:
    learner = np.zeros(10, dtype=np.float32)
    worker = learner.copy()
    worker[3] = np.nan
    assert disagreement(learner, worker, config) is not None
    assert disagreement(learner, learner[:9], config) is not None


def test_probes_differ_between_versions_and_not_within_one() -> None:
    assert np.array_equal(probe_sequence(32, 64, 5), probe_sequence(32, 64, 5))
    assert not np.array_equal(probe_sequence(32, 64, 5), probe_sequence(32, 64, 6))
    assert probe_sequence(1000, 64, 1).max() < 64
