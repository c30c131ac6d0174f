"""From a config to a job: names, commands, secrets."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from rlhf_ray.config import dump_config, load_config, parse_config
from rlhf_ray.config.changes import as_overrides
from rlhf_ray.jobs.cluster import Attempt, RunIsLive, as_attempt, check_not_live
from rlhf_ray.jobs.connection import read_token
from rlhf_ray.jobs.secrets import SecretsError, decrypt, encrypt, received
from rlhf_ray.jobs.submission import STOP_WAIT, NotSubmittable, next_attempt, plan_submission, secrets_of

TOKEN = "0123456789abcdef"


def config(**fields):
    return parse_config(
        {
            "name": "a.b-c",
            "folder": "/shared/runs",
            "stages": ["ppo"],
            "model": {"path": "models/tiny"},
            "data": {"prompts": {"location": "data/p.jsonl"}},
            "ppo": {
                "reward": {"model": None, "functions": [{"name": "f", "function": "rewards:f"}]},
                "rollout": {"workers": {"env": {"KEY": "canary"}}},
            },
        }
        | fields
    )


def test_a_submission_has_the_name_and_number_of_its_attempt(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "p.jsonl").touch()
    planned = plan_submission(config(), tmp_path, 3, ["--resume"], token=TOKEN)
    assert planned.id == "a.b-c-attempt3" and planned.folder == "/shared/runs/a.b-c"
    assert planned.entrypoint == "exec python -m rlhf_ray run .rlhf-ray/config.yaml cluster.address=auto --resume"
    assert planned.files == ("data/p.jsonl",)
    assert int(planned.environment[STOP_WAIT]) >= 600


def test_environment_values_leave_this_process_encrypted(tmp_path):
    settings = config()
    planned = plan_submission(settings, tmp_path, 1, (), {"JUDGE_KEY": "canary-2"}, TOKEN)
    assert "canary" not in f"{planned} {planned.metadata} {planned.environment} {dump_config(settings)}"
    assert "canary" not in repr(secrets_of(settings))


def test_the_driver_decrypts_them(tmp_path):
    settings = config()
    (tmp_path / "config.yaml").write_text(dump_config(settings))
    planned = plan_submission(settings, tmp_path, 1, (), {"JUDGE_KEY": "canary-2"}, TOKEN)
    sent = received(planned.environment | {"RAY_AUTH_TOKEN": TOKEN})
    assert load_config(tmp_path / "config.yaml", as_overrides(sent.workers)) == settings
    assert sent.forwarded == {"JUDGE_KEY": "canary-2"}
    assert not received({})


@pytest.mark.parametrize("token", [None, "another"])
def test_they_cannot_be_read_without_the_token(tmp_path, token):
    text = encrypt(secrets_of(config()), TOKEN)
    with pytest.raises(SecretsError, match="another token than this node's"):
        decrypt(text, token)
    with pytest.raises(SecretsError, match="set RAY_AUTH_TOKEN"):
        plan_submission(config(), tmp_path, 1)


def test_the_token_is_read_from_the_same_places_as_in_ray(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_token({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("default\n")
    (tmp_path / "other").write_text("named")
    named = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    assert [read_token({}), read_token(named), read_token(named | {"RAY_AUTH_TOKEN": "value"})] == [
        "default",
        "named",
        "value",
    ]


def test_a_relative_run_folder_is_refused(tmp_path):
    with pytest.raises(
        NotSubmittable, match=r"folder is 'runs', a relative path.*folder=.*/runs.*folder=s3://bucket/runs"
    ):
        plan_submission(config(folder="runs"), tmp_path, 1)


def test_resuming_reads_the_config_in_the_runs_folder(tmp_path):
    before = plan_submission(config(folder="/shared/my runs"), tmp_path, 1, token=TOKEN)
    after = next_attempt(before, ["ppo.steps=7"])
    assert after.id == "a.b-c-attempt2" and after.environment == before.environment
    expected = (
        "exec python -m rlhf_ray run '/shared/my runs/a.b-c/config.yaml' cluster.address=auto ppo.steps=7 --resume"
    )
    assert after.entrypoint == expected


def attempts(tmp_path, *states):
    planned = plan_submission(config(), tmp_path, 1, token=TOKEN)
    return [Attempt(replace(planned, attempt=number), state) for number, state in enumerate(states, start=1)]


def test_the_next_attempt_has_the_next_number(tmp_path):
    ended = attempts(tmp_path, "FAILED", "STOPPED", "SUCCEEDED")
    assert check_not_live(ended, "a.b-c") == 4 and check_not_live(ended, "another") == check_not_live([], "x") == 1


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_second_run_with_the_name_of_a_live_one_is_refused(tmp_path, state):
    with pytest.raises(RunIsLive, match=f"{state.lower()} as a.b-c-attempt2"):
        check_not_live(attempts(tmp_path, "STOPPED", state), "a.b-c")


def test_an_attempt_is_restored_from_its_job(tmp_path):
    planned = plan_submission(config(), tmp_path, 2, token=TOKEN)
    job = SimpleNamespace(
        metadata=planned.metadata, runtime_env={"env_vars": dict(planned.environment)}, entrypoint=planned.entrypoint,
        status=SimpleNamespace(value="RUNNING"), start_time=5000, end_time=None, job_id="01", driver_node_id="n1",
    )  # fmt: skip
    assert as_attempt(job) == Attempt(planned, "RUNNING", 5.0, None, "01", "n1")
