"""The data of a run: limits, held-out shares and malformed lines; training and held-out data share no prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray.config.data import DataConfig, SimulateConfig, SourceConfig
from rlhf_ray.data.datasets import Datasets, fitting, is_held_out, load_datasets, split_held_out
from rlhf_ray.data.limits import Encoded, LengthLimit
from rlhf_ray.data.rows import DataError

SMALL = SimulateConfig(
    demonstrations=60, pairs=50, held_out_pairs=20, prompts=40, held_out_prompts=20, rankings=1, scores=1, edits=1
)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write(path: Path, rows: list) -> SourceConfig:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return SourceConfig(location=str(path))


def prompts(count: int) -> list[dict]:
    return [{"prompt": [turn("user", f"question {i}")]} for i in range(count)]


def pairs(count: int) -> list[dict]:
    return [p | {s: [turn("assistant", s)] for s in ("chosen", "rejected")} for p in prompts(count)]


def demonstrations(count: int) -> list[dict]:
    return [{"messages": [*p["prompt"], turn("assistant", "answer")]} for p in prompts(count)]


def questions(records) -> set[str]:
    """The user's turns of each record."""
    return {json.dumps(getattr(r, "prompt", None) or [m for m in r.messages if m["role"] == "user"]) for r in records}


@pytest.fixture
def everything(tmp_path) -> DataConfig:
    """The same 200 prompts in three files of three formats."""
    return DataConfig(
        demonstrations=write(tmp_path / "demonstrations.jsonl", demonstrations(200)),
        pairs=write(tmp_path / "pairs.jsonl", pairs(200)),
        prompts=write(tmp_path / "prompts.jsonl", prompts(200)),
        held_out_fraction=0.2,
    )


def test_a_prompt_is_held_out_of_every_kind_or_of_none(everything, tmp_path):
    data = load_datasets(everything, tmp_path / "run", 0, print)
    kinds = (data.demonstrations, data.pairs, data.prompts)
    trained = set.union(*(questions(kind.train) for kind in kinds))
    held_out = set.union(*(questions(kind.held_out) for kind in kinds))
    assert not trained & held_out and len(trained | held_out) == 200
    assert 20 <= len(held_out) <= 60
    assert all(len(kind.train) + len(kind.held_out) == 200 for kind in kinds)


def test_texts_for_the_tokenizer_are_of_training_dialogues_only(everything, tmp_path):
    data = load_datasets(everything, tmp_path / "run", 0, print)
    assert set(data.texts) == {m["content"] for r in data.demonstrations.train for m in r.messages}
    assert not {r.messages[0]["content"] for r in data.demonstrations.held_out} & set(data.texts)


def test_simulated_stages_share_no_held_out_prompt(tmp_path):
    config = DataConfig(simulate=SMALL)
    data = load_datasets(config, tmp_path, 3, print)
    assert (len(data.pairs.train), len(data.pairs.held_out)) == (50, 20)
    assert (len(data.prompts.train), len(data.prompts.held_out)) == (40, 20)
    assert len(data.demonstrations.train) + len(data.demonstrations.held_out) == 60 and data.demonstrations.held_out

    def dialogues(split: str) -> set[str]:
        return {
            *(json.dumps(r.messages[:-1]) for r in getattr(data.demonstrations, split)),
            *(json.dumps(r.prompt) for r in getattr(data.pairs, split)),
            *(json.dumps(r.messages) for r in getattr(data.prompts, split)),
        }

    measured = {json.dumps(r.prompt) for r in data.pairs.held_out} | {
        json.dumps(r.messages) for r in data.prompts.held_out
    }
    assert not dialogues("train") & measured
    assert not {json.dumps(r.messages[:-1]) for r in data.demonstrations.held_out} & {
        json.dumps(r.messages[:-1]) for r in data.demonstrations.train
    }


def test_simulated_edits_are_never_held_out(tmp_path):
    """Half of the dialogues with edits also have pairs, so the dialogue of a held-out edit could be in the training pairs."""
    data = load_datasets(DataConfig(simulate=SMALL.model_copy(update={"edits": 40})), tmp_path, 3, print)
    assert len(data.edits.train) == 40 and data.edits.held_out == ()
    assert not {json.dumps(r.prompt) for r in data.edits.train} & {json.dumps(r.prompt) for r in data.pairs.held_out}


def test_ties_are_left_out_of_demonstrations_with_a_message(tmp_path):
    rows = [row | {"preference": 0.5 if i < 7 else 1.0} for i, row in enumerate(pairs(100))]
    told = []
    data = load_datasets(DataConfig(demonstrations=write(tmp_path / "p.jsonl", rows)), tmp_path / "run", 0, told.append)
    assert len(data.demonstrations.train) + len(data.demonstrations.held_out) == 93
    assert told == [
        f"7 rows of {tmp_path / 'p.jsonl'} have no answer that is marked as good; data.demonstrations leaves them out"
    ]


def test_a_second_attempt_reads_the_same_simulated_data(tmp_path):
    first = load_datasets(DataConfig(simulate=SMALL), tmp_path, 3, print)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    assert load_datasets(DataConfig(simulate=SMALL), tmp_path, 3, print) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == files


def test_a_limit_takes_the_first_records(everything, tmp_path):
    limited = everything.model_copy(update={"prompts": everything.prompts.model_copy(update={"limit": 30})})
    data = load_datasets(limited, tmp_path, 0, print)
    contents = {r.messages[0]["content"] for r in (*data.prompts.train, *data.prompts.held_out)}
    assert contents == {f"question {i}" for i in range(30)}


def test_sources_that_are_not_named_are_none(tmp_path):
    data = load_datasets(DataConfig(prompts=write(tmp_path / "p.jsonl", prompts(50))), tmp_path, 0, print)
    assert data == Datasets(None, None, data.prompts) and data.prompts.held_out


def test_a_malformed_line_is_fatal_with_its_number(tmp_path):
    config = DataConfig(prompts=write(tmp_path / "p.jsonl", [*prompts(20), "{broken", *prompts(40)[20:]]))
    with pytest.raises(DataError, match=r"p\.jsonl, line 21: not JSON"):
        load_datasets(config, tmp_path / "run", 0, print)


def test_a_malformed_line_can_be_quarantined(tmp_path):
    source = write(tmp_path / "p.jsonl", [*prompts(20), "{broken", *prompts(40)[20:], json.dumps({"prompt": []})])
    config = DataConfig(prompts=source, on_malformed="quarantine")
    data = load_datasets(config, tmp_path / "run", 0, print)
    assert len(data.prompts.train) + len(data.prompts.held_out) == 40
    aside = [json.loads(x) for x in (tmp_path / "run/data/quarantined_prompts.jsonl").read_text().splitlines()]
    assert [(line["line"], line["text"]) for line in aside] == [(21, "{broken"), (42, '{"prompt": []}')]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "is empty"), (prompts(1), "1 records of .* leave (1|0) for training and (0|1) held out")],
)
def test_too_little(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_datasets(DataConfig(prompts=write(tmp_path / "p.jsonl", rows)), tmp_path / "run", 0, print)


def test_no_file(tmp_path):
    config = DataConfig(prompts=SourceConfig(location=str(tmp_path / "absent.jsonl")))
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        load_datasets(config, tmp_path / "run", 0, print)


def test_what_is_too_long_is_left_out_with_a_message():
    told = []
    limit = LengthLimit(9, key="data.max_prompt_tokens")
    assert fitting(Encoded((1, 2), 5, shortened=1), "prompts", limit, told.append) == (1, 2)
    assert told == [
        "5 of 7 prompts are longer than data.max_prompt_tokens and left out",
        "1 of 7 prompts lost their oldest turns to fit data.max_prompt_tokens",
    ]
    with pytest.raises(DataError, match="all 5 prompts are longer than data.max_prompt_tokens 9"):
        fitting(Encoded((), 5), "prompts", limit, told.append)
    with pytest.raises(DataError, match="5 of 7 prompts are longer .* data.too_long is fail"):
        fitting(Encoded((1, 2), 5), "prompts", replace(limit, too_long="fail"), told.append)


PROMPTS = [({"role": "user", "content": f"question {number}"},) for number in range(2000)]


def test_the_side_depends_on_the_prompt_alone():
    train, held_out = split_held_out(PROMPTS, lambda prompt: prompt, 0.1)
    again = split_held_out(PROMPTS[::-1] + PROMPTS[:10], lambda prompt: prompt, 0.1)
    assert {str(prompt) for prompt in held_out} == {str(prompt) for prompt in again[1]}
    assert not {str(prompt) for prompt in train} & {str(prompt) for prompt in again[1]}


def test_the_share_is_about_the_fraction_and_the_salt_changes_who():
    sides = [sum(is_held_out(prompt, 0.1, salt) for prompt in PROMPTS) for salt in ("", "other")]
    assert all(150 < count < 250 for count in sides)
    both = sum(is_held_out(prompt, 0.1) and is_held_out(prompt, 0.1, "other") for prompt in PROMPTS)
    assert both < 50


def test_the_bounds_hold_out_nothing_and_everything():
    assert split_held_out(PROMPTS, lambda prompt: prompt, 0)[1] == []
    assert split_held_out(PROMPTS, lambda prompt: prompt, 1)[0] == []
    with pytest.raises(ValueError, match=r"fraction 1.5"):
        split_held_out(PROMPTS, lambda prompt: prompt, 1.5)


def test_known_sides_stay_as_they_are():
    # A changed hash would move prompts from training to held-out between releases.
    assert [number for number in range(30) if is_held_out(PROMPTS[number], 0.2)] == [0, 6, 14, 19, 27, 28]
