from __future__ import annotations

import json

import pytest

from rlhf_ray.algorithms.kl import AdaptiveKL, FixedKL, controller_from_dict


def test_oracle_15_adaptive_kl() -> None:
    controller = AdaptiveKL(beta=0.15, target=6.0)
    assert controller.update(9.0, 512).beta == pytest.approx(0.151536, abs=1e-12)
    assert controller.beta == 0.15


@pytest.mark.parametrize(("kl", "error"), [(6.6, 0.1), (5.4, -0.1), (100.0, 0.2), (-3.0, -0.2), (6.0, 0.0)])
def test_error_is_relative_and_clipped_on_both_sides(kl: float, error: float) -> None:
    updated = AdaptiveKL(beta=0.2, target=6.0, horizon=1000.0).update(kl, 100)
    assert updated.beta == pytest.approx(0.2 * (1 + error * 0.1), abs=1e-12)


def test_fixed_kl_stays() -> None:
    assert FixedKL(0.05).update(1e9, 1000) == FixedKL(0.05)


@pytest.mark.parametrize("controller", [FixedKL(0.05), AdaptiveKL(0.15, 6.0, 2000.0).update(7.0, 64)])
def test_state_survives_a_checkpoint(controller) -> None:
    assert controller_from_dict(json.loads(json.dumps(controller.to_dict()))) == controller


def test_bad_settings_and_states_are_named() -> None:
    with pytest.raises(ValueError, match=r"AdaptiveKL.target=0"):
        AdaptiveKL(beta=0.1, target=0.0)
    with pytest.raises(ValueError, match="'pid'"):
        controller_from_dict({"kind": "pid", "beta": 0.1})
