"""Resuming a run with a changed config."""

from __future__ import annotations

import pytest

from rlhf_ray.config import ConfigError, dump_config, parse_config
from rlhf_ray.config.changes import check_unchanged


def config(**ppo):
    return parse_config({"name": "a", "model": {"build": {}}, "data": {"simulate": {}}, "ppo": ppo})


def test_what_decides_the_result_stays():
    before = dump_config(config())
    check_unchanged(before, config())
    with pytest.raises(ConfigError, match=r"ppo\.batch_size: was 64, is 32"):
        check_unchanged(before, config(batch_size=32))
    with pytest.raises(ConfigError, match=r"learning_rate"):
        check_unchanged(before, config(policy={"optimizer": {"learning_rate": 0.5}}))


def test_how_long_and_where_may_change():
    before = dump_config(config())
    check_unchanged(before, config(steps=7, rollout={"workers": {"count": 3}}, checkpoint={"every": 1}))
