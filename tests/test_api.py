"""The Python API: what it accepts, what it reads, and how little `import rlhf_ray` costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rlhf_ray
from rlhf_ray import api, load_run
from rlhf_ray.api import as_config
from rlhf_ray.config import ConfigError, RunConfig, dump_config, parse_config
from rlhf_ray.runs.run_folder import RunFolder, RunFolderError

VALUES: dict[str, Any] = {
    "name": "small",
    "model": {"build": {"hidden_size": 64, "heads": 2, "kv_heads": 1}},
    "data": {"simulate": {}, "max_dialogue_tokens": 400},
    "ppo": {"rollout": {"workers": {"env": {"TOKEN": "canary", "OTHER": "1"}}}},
}


def test_importing_the_package_is_cheap():
    code = "import sys, rlhf_ray; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not any(f"'{name}'" in imported for name in ("torch", "ray", "pydantic", "yaml", "numpy"))


def test_public_names_are_the_commands_own_objects():
    assert set(rlhf_ray.__all__) <= set(dir(rlhf_ray))
    assert rlhf_ray.RunConfig is RunConfig and rlhf_ray.run is api.run
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        rlhf_ray.train  # noqa: B018


def test_a_config_is_accepted_in_every_form(tmp_path):
    config = parse_config(VALUES)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(VALUES))
    assert as_config(config) is config
    assert as_config(VALUES) == as_config(path) == as_config(str(path)) == config
    assert as_config("recipe:quickstart").name == "quickstart"
    with pytest.raises(ConfigError, match="ppo.batch_sise: unknown key; did you mean 'batch_size'"):
        as_config({**VALUES, "ppo": {"batch_sise": 3}})


def test_fresh_and_resume_exclude_each_other():
    with pytest.raises(ConfigError, match="choose one"):
        api.run(VALUES, fresh=True, resume=True)
    with pytest.raises(ConfigError, match="on a store, which cannot rename"):
        api.run({**VALUES, "folder": "s3://bucket/runs"}, fresh=True)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run's folder with two PPO steps."""
    run = RunFolder(tmp_path / "small")
    run.path.mkdir()
    run.config.write_text(dump_config(parse_config(VALUES)))
    run.metrics.write_text("".join(f'{{"step": {step}, "reward/mean": {step / 2}}}\n' for step in (1, 2)))
    run.events.write_text('{"time": 1.0, "kind": "stage", "message": "ppo begins", "fields": {}}\n')
    run.evaluation.write_text('{"prompts": 3}')
    return run


def test_a_run_is_read_back(folder):
    run = load_run(folder.path)
    assert [record["reward/mean"] for record in run.metrics()] == [0.5, 1.0] and run.metrics("sft") == []
    assert list(run.metrics_frame()["reward/mean"]) == [0.5, 1.0] and run.metrics_frame("sft").empty
    assert run.events()[0].message == "ppo begins" and run.samples() == [] and run.evaluation() == {"prompts": 3}
    assert (run.policy, run.report) == (folder.policy, folder.report) and run.status().step == 2


def test_its_config_has_no_values_of_environments(folder):
    config = load_run(str(folder.path)).config
    assert config.ppo.rollout.workers.env == {} and config.name == "small"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="is not a run's folder: it has no config.yaml"):
        load_run(tmp_path)
