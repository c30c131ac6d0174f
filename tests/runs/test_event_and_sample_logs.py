"""Events are never lost, samples are cut back on resume, and any text of a model is read back unchanged."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rlhf_ray.runs.events import EventLog, read_events
from rlhf_ray.runs.samples import SampleLog, read_samples
from rlhf_ray.types import Experience, Prompt, Rollout, RolloutRequest, Score


def experience(total: float = 1.0) -> Experience:
    prompt = Prompt("p7", np.array([1, 2], np.int32), ({"role": "user", "content": "Where is my order?"},))
    tokens = np.array([3, 4], np.int32)
    rollout = Rollout(RolloutRequest(prompt, 2, seed=5), tokens, np.zeros(2, np.float32), np.zeros(2, np.int32), "stop")
    return Experience(rollout, Score(total, {"reward_model": total, "function": 0.25}), reference_logprobs=None)


def test_events_survive_a_crash_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.emit("fault", "rollout worker 1 died", worker=1, rollouts=17)
    with open(path, "a") as file:
        file.write('{"time": 1, "kind": "dr')
    with EventLog(path) as log:
        log.emit("drop", "prompt too long", reason="prompt_too_long", count=2)
    first, second = read_events(path)
    assert (first.kind, first.message, first.fields) == (
        "fault",
        "rollout worker 1 died",
        {"worker": 1, "rollouts": 17},
    )
    assert second.fields["reason"] == "prompt_too_long"
    assert first.time <= second.time


def test_event_is_on_its_way_before_the_log_is_closed(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("warning", "look here")
    assert read_events(tmp_path / "events.jsonl")[0].message == "look here"
    log.close()


@pytest.mark.parametrize(("field", "error"), [(math.nan, ValueError), (object(), TypeError)])
def test_event_that_json_cannot_hold_is_refused_and_leaves_no_trace(tmp_path, field, error):
    with EventLog(tmp_path / "events.jsonl") as log:
        with pytest.raises(error):
            log.emit("fault", "…", field=field)
        log.emit("fault", "next")
    assert [event.message for event in read_events(tmp_path / "events.jsonl")] == ["next"]


def test_sample_carries_the_rollout_and_its_score(tmp_path):
    with SampleLog(tmp_path / "samples.jsonl") as log:
        log.write(3, experience(1.5), "It is on its way.")
    (sample,) = read_samples(tmp_path / "samples.jsonl")
    assert (sample.step, sample.id, sample.response) == (3, "p7/2", "It is on its way.")
    assert sample.prompt == ({"role": "user", "content": "Where is my order?"},)
    assert (sample.reward, sample.reward_parts) == (1.5, {"reward_model": 1.5, "function": 0.25})
    assert sample.finish_reason == "stop"


def test_samples_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    with SampleLog(path) as log:
        for step in (1, 2, 2, 3):
            log.write(step, experience(), f"from step {step}")
    with SampleLog(path, resume_step=2) as log:
        log.write(3, experience(), "again")
    assert [sample.response for sample in read_samples(path)] == ["from step 1", "from step 2", "from step 2", "again"]


@pytest.mark.parametrize("text", ["two\nlines\r\u2028", 'quote " and \\', "half a pair \ud83d", "🙂 漢字", ""])
def test_any_text_comes_back_as_it_was(tmp_path, text):
    with SampleLog(tmp_path / "samples.jsonl") as log:
        log.write(1, experience(), text)
        log.write(2, experience(), "next")
    assert [sample.response for sample in read_samples(tmp_path / "samples.jsonl")] == [text, "next"]


def test_reward_that_is_not_finite_is_null(tmp_path):
    with SampleLog(tmp_path / "samples.jsonl") as log:
        log.write(1, experience(math.nan), "…")
    record = json.loads((tmp_path / "samples.jsonl").read_text())
    assert record["reward"] is None
    assert record["reward_parts"] == {"reward_model": None, "function": 0.25}
