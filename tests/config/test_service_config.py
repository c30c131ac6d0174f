"""Judges, services and teachers in a config: no API key in it or in its dump; settings without effect are refused."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config import ConfigError, RunConfig, dump_config, parse_config
from rlhf_ray.config.changes import check_unchanged

JUDGE = {"url": "https://judge.example/v1", "model": "m"}
ALONE = {"algorithm": {"advantage": "none", "kl": {"placement": "none"}}, "reward": {"model": None}}
GROUPS = {"samples_per_prompt": 4, "batch_size": 8}
KEY = "sk-Very-Secret-42"


def config(**ppo: Any) -> RunConfig:
    return parse_config({"name": "a", "model": {"build": {}}, "data": {"simulate": {}}, "ppo": ppo})


def judged(*judges: dict[str, Any], **reward: Any) -> RunConfig:
    return config(**GROUPS, reward={"model": None, "judges": list(judges), **reward})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no group": ({"samples_per_prompt": 1, "reward": {"judges": [JUDGE]}}, "set samples_per_prompt to 2 or more"),
    "two of a name": (GROUPS | {"reward": {"judges": [JUDGE, JUDGE]}}, "must differ from each other"),
    "named model": (GROUPS | {"reward": {"judges": [JUDGE | {"name": "model"}]}}, "must differ from each other"),
    "a scale for winners": (GROUPS | {"reward": {"judges": [JUDGE | {"scale": [0, 1]}]}}, "scale is for mode pointwise only"),
    "a scale upside down": ({"reward": {"judges": [JUDGE | {"mode": "pointwise", "scale": [5, 1]}]}}, "lower to a higher"),
    "opponents of a mark": ({"reward": {"judges": [JUDGE | {"mode": "pointwise", "opponents": 2}]}}, "of a group"),
    "a request of our own": (GROUPS | {"reward": {"judges": [JUDGE | {"request": {"n": 2}}]}}, "n cannot be set here"),
    "no reward, no teacher": (ALONE, "no source of reward"),
    "a critic of nothing": ({"reward": {"model": None}, "teacher": {"model": "t"}}, "set it to none"),
    "a reward that is not used": ({"algorithm": ALONE["algorithm"]}, "reads no reward"),
    "a KL in no reward": ({**ALONE, "algorithm": {"advantage": "none"}, "teacher": {"model": "t"}}, "kl.placement: reward"),
    "actors of a learner's teacher": (
        {"teacher": {"model": "t", "mode": "full_vocabulary", "workers": {"count": 2}}}, "for mode advantage",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ppo", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(ppo, message):
    with pytest.raises(ConfigError, match=message):
        config(**ppo)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"api_key_env": KEY}, "api_key_env: not the name of an environment variable"),
        ({"url": f"https://me:{KEY}@judge.example/v1"}, "name the key's variable in api_key_env instead"),
        ({"api_key": KEY}, "unknown key; did you mean 'api_key_env'"),
        ({"url": f"judge.example/{KEY}"}, "not a URL"),
    ],
)
def test_a_key_in_a_config_is_refused_and_not_repeated(setting, message):
    with pytest.raises(ConfigError, match=message) as caught:
        judged(JUDGE | setting)
    assert KEY not in str(caught.value)


def test_a_key_is_in_no_dump(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    text = dump_config(judged(JUDGE | {"api_key_env": "JUDGE_KEY"}))
    assert "api_key_env: JUDGE_KEY" in text and KEY not in text


def test_roles():
    assert "reward" in judged(JUDGE).roles and "teacher" not in judged(JUDGE).roles
    alone = config(**ALONE, teacher={"model": "t"})
    assert set(alone.roles) == {"policy", "rollout", "teacher"}
    both = config(teacher={"model": "t", "mode": "full_vocabulary"})
    assert set(both.roles) == {"policy", "value", "rollout", "reward", "reference"}


def test_groups_are_for_judges_that_compare_them():
    assert judged(JUDGE).ppo.reward.needs_groups
    assert not judged(JUDGE | {"reference": "best"}, JUDGE | {"name": "b", "mode": "pointwise"}).ppo.reward.needs_groups


def test_where_a_judge_is_may_change_and_what_it_judges_may_not():
    before = dump_config(judged(JUDGE))
    check_unchanged(
        before, judged(JUDGE | {"url": "http://other/v1", "concurrency": 3, "timeout_s": 9.0, "api_key_env": "K"})
    )
    check_unchanged(before, judged(JUDGE | {"price": {"prompt": 0.1}}))
    for change in ({"model": "n"}, {"rubric": "brevity"}, {"weight": 2.0}):
        with pytest.raises(ConfigError, match=rf"ppo\.reward\.judges\.0\.{next(iter(change))}"):
            check_unchanged(before, judged(JUDGE | change))
    with pytest.raises(ConfigError, match=r"ppo\.reward\.judges\.1\.name"):
        check_unchanged(before, judged(JUDGE, JUDGE | {"name": "second"}))
