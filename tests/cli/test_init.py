"""`rlhf-ray init`: whatever is chosen, the config loads; what cannot be used is refused with a plain sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config import RunConfig, load_config
from rlhf_ray.errors import InputError

ROWS = {
    "demonstrations": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "pairs": {"prompt": "Hi", "chosen": "Hello", "rejected": "What"},
    "prompts": {"prompt": "Hi"},
    "edits": {"prompt": "Hi", "original": "What", "edited": "Hello"},
    "rankings": {"prompt": "Hi", "responses": ["Hello", "What"], "order": [0, 1]},
    "scores": {"prompt": "Hi", "response": "Hello", "scores": {"helpful": 4, "polite": 5}},
    "other": {"text": "Hi"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for a data file of each kind."""
    monkeypatch.chdir(tmp_path)
    for kind, row in ROWS.items():
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def init(*arguments: str, answers: str | None = None) -> RunConfig:
    """The config that the command wrote to `new/config.yaml`."""
    result = CliRunner().invoke(app, ["init", "new", *arguments], input=answers)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return load_config(Path("new/config.yaml"))


def given(*files: str) -> list[str]:
    return [word for file in files for word in ("--data", f"{file}.jsonl")]


def test_defaults_simulate_everything():
    config = init("--yes")
    assert config.name == "new" and config.model.build and config.data.simulate
    assert config.stages == ["sft", "reward_model", "ppo", "evaluation"]


@pytest.mark.parametrize(
    ("files", "sources", "stages"),
    [
        (("pairs",), {"demonstrations": "pairs", "pairs": "pairs", "prompts": "pairs"}, ["sft", "reward_model"]),
        (
            ("pairs", "prompts"),
            {"demonstrations": "pairs", "pairs": "pairs", "prompts": "prompts"},
            ["sft", "reward_model"],
        ),
        (("demonstrations", "pairs"), {"demonstrations": "demonstrations", "pairs": "pairs"}, ["sft", "reward_model"]),
        (("edits",), {"demonstrations": "edits", "pairs": "edits", "prompts": "edits"}, ["sft", "reward_model"]),
        (("rankings", "demonstrations"), {"rankings": "rankings"}, ["sft", "reward_model"]),
        (("scores",), {"scores": "scores", "prompts": "scores"}, ["reward_model"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("reward", [["model"], ["model", "my_rewards:score"]], ids="+".join)
def test_files_go_where_they_fit(tiny_model, files, sources, stages, reward):
    rewards = [word for name in reward for word in ("--reward", name)]
    config = init("--model", str(tiny_model), *given(*files), *rewards)
    assert config.stages == [*stages, "ppo", "evaluation"] and config.model.path == str(tiny_model)
    for kind, file in sources.items():
        assert getattr(config.data, kind).location == f"{file}.jsonl"
    assert [function.function for function in config.ppo.reward.functions] == reward[1:]
    assert config.ppo.reward.model is not None and config.ppo.algorithm.needs_value_model
    assert config.data.max_dialogue_tokens == 128, "the model's context"


@pytest.mark.parametrize("files", [("prompts",), ("demonstrations",), ("pairs",)], ids="+".join)
def test_a_function_alone_needs_no_reward_model(tiny_model, files):
    config = init("--model", str(tiny_model), *given(*files), "--reward", "my_rewards:score")
    assert "reward_model" not in config.stages and config.ppo.reward.model is None
    assert config.ppo.reward.functions[0].name == "score" and not config.ppo.algorithm.needs_value_model


def test_it_asks_for_what_is_not_given():
    config = init(answers="tiny\ndemonstrations.jsonl pairs.jsonl\nmodel my_rewards:score\n")
    assert config.model.build and config.data.pairs.location == "pairs.jsonl"
    assert config.ppo.reward.model and config.ppo.reward.functions[0].function == "my_rewards:score"


def test_the_schema_is_written_and_named(folder):
    init("--yes", "--name", "a.name")
    lines = (folder / "new" / "config.yaml").read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=rlhf-ray.schema.json" and "name: a.name" in lines
    assert "ppo" in json.loads((folder / "new" / "rlhf-ray.schema.json").read_text())["properties"]
    init("--yes", "--force", "--no-schema")
    assert "$schema" not in (folder / "new" / "config.yaml").read_text()


def test_a_file_can_be_named_and_is_not_overwritten(folder):
    command = ["init", "my run.yaml", "--yes"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert load_config(folder / "my run.yaml").name == "my-run"
    (folder / "my run.yaml").write_text("mine")
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "exists" in again.output and (folder / "my run.yaml").read_text() == "mine"
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert load_config(folder / "my run.yaml").name == "my-run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "--yes"], "'nowhere' is not a folder; expected a Hugging Face model folder"),
        (["--data", "nowhere.jsonl", "--yes"], "nowhere.jsonl: there is no such file; give a JSONL"),
        (["--yes", *given("other")], "other.jsonl, line 1: unknown format"),
        (["--yes", *given("pairs", "edits")], "pairs.jsonl and edits.jsonl both contain pairs"),
        (["--yes", "--data", "simulate", *given("pairs")], "leave the data files out"),
        (["--yes", *given("demonstrations")], "the data contains demonstrations, prompts; add a file of pairs"),
        (["--yes", "--reward", "a:b", *given("prompts")], "needs demonstrations, and the data contains prompts"),
        (["--yes", "--reward", "score"], "--reward score: give model, or a function as module:name"),
        (["--yes", "--reward", "a:b", "--reward", "c:d"], "one function as module:name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_refused(folder, arguments, message):
    with pytest.raises((InputError, FileNotFoundError)) as refused:
        init(*arguments)
    assert message in str(refused.value)
    assert not (folder / "new" / "config.yaml").exists()
