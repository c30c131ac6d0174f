"""Failures of services: a bounded number of retries, then an error, never an invented number."""

from __future__ import annotations

import json
import threading
import time

import pytest

from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.rewards.http import LONGEST_WAIT_S, read_keys
from rlhf_ray.types import Score
from tests.rewards.services import Answer, Request, completion, mark, serve, verdict

KEY = "sk-Very-Secret-42"
UNREADABLE = {
    "prose": (completion("A is better."), "Invalid JSON"),
    "two objects": (completion('{"reasoning": "", "verdict": "A"} {"verdict": "B"}'), "trailing characters"),
    "in a fence": (completion('```json\n{"reasoning": "", "verdict": "A"}\n```'), "Invalid JSON"),
    "another verdict": (completion('{"reasoning": "", "verdict": "a"}'), "verdict: Input should be 'A', 'B' or 'tie'"),
    "further keys": (completion('{"reasoning": "", "verdict": "A", "sure": true}'), "sure: Extra inputs"),
    "no verdict": (completion('{"reasoning": ""}'), "verdict: Field required"),
    "cut short": (completion('{"reasoning": "", "verdict": "A"}', "length"), "cut short (length)"),
    "refused": (completion(None), "has no text"),
    "no choices": ({"choices": []}, "not a chat completion"),
    "an error as an answer": ({"error": {"message": "overloaded"}}, "not a chat completion"),
    "not JSON": (b"<html>", "not JSON"),
    "not an object": ([1], "not a JSON object"),
    "not text": (b"\xff\xfe", "not JSON"),
}


@pytest.mark.parametrize(("reply", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_answers_are_errors_after_the_last_reading(served_worker, answers, reply, reason):
    with serve(lambda request: Answer(reply)) as service:
        worker = served_worker("judges", {"url": service.url, "readings": 2})
        scores = worker.score(answers("1", "Yes.", "No."))
        usage = worker.usage()["judge"]
    assert all(isinstance(score, RewardError) and reason in str(score) for score in scores), scores
    assert "no readable answer in 2 attempts" in str(scores[0]) and scores[0].source == "judge"
    assert len(service.requests) == usage.requests == usage.unreadable == 2 * 2 and usage.failures == 2


@pytest.mark.parametrize("value", ["0", "10.5", '"7"', "true", "NaN", "null"])
def test_ratings_off_the_scale_are_errors(served_worker, answers, value):
    with serve(lambda request: Answer(completion(f'{{"reasoning": "", "mark": {value}}}'))) as service:
        worker = served_worker("judges", {"url": service.url, "mode": "pointwise"})
        (score,) = worker.score(answers("1", "Yes."))
    assert isinstance(score, RewardError) and "mark" in str(score)


LINES = [
    "",
    "Verdict: C",
    "verdict: A",
    "Verdict: A\nI am sure.",
    "Verdict: A\nVerdict: A",
    "**Verdict: B**\nVerdict: A",
    "A",
]


@pytest.mark.parametrize("text", LINES)
def test_the_verdict_must_be_the_last_line_and_the_only_one(served_worker, answers, text):
    with serve(lambda request: Answer(completion(text))) as service:
        worker = served_worker("judges", {"url": service.url, "answer": "line", "readings": 1})
        assert all(isinstance(score, RewardError) for score in worker.score(answers("1", "Yes.", "No.")))


def test_the_judge_is_told_what_was_wrong_and_can_correct_it(served_worker, answers):
    def second_thought(request: Request) -> Answer:
        if len(request.body["messages"]) == 1:
            return Answer(completion("B!"))
        _, reply, remark = request.body["messages"]
        assert reply == {"role": "assistant", "content": "B!"} and "cannot be read" in remark["content"]
        return Answer(mark(10))

    with serve(second_thought) as service:
        worker = served_worker("judges", {"url": service.url, "mode": "pointwise"})
        assert [score.total for score in worker.score(answers("1", "Yes."))] == [1.0]
    assert worker.usage()["judge"].unreadable == 1


TROUBLE = {
    "busy": Answer({"error": "slow down"}, 429),
    "busy for a while": Answer({"error": "slow down"}, 429, {"Retry-After": "0"}),
    "broken": Answer(b"oops", 500),
    "away": Answer(b"", 503, {"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"}),
    "slow": Answer(verdict("A"), before=lambda: time.sleep(0.6)),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_temporary_failures_are_retried(served_worker, answers, trouble):
    seen, lock = set(), threading.Lock()

    def at_first(request: Request) -> Answer:
        question = request.body["messages"][0]["content"]
        with lock:
            new = question not in seen
            seen.add(question)
        return trouble if new else Answer(verdict("tie"))

    with serve(at_first) as service:
        worker = served_worker("judges", {"url": service.url, "timeout_s": 0.3})
        assert [score.total for score in worker.score(answers("1", "Yes.", "No."))] == [0.5, 0.5]
        usage = worker.usage()["judge"]
    assert (usage.requests, usage.retries, usage.unreadable, usage.failures) == (4, 2, 0, 0)


@pytest.mark.parametrize(
    ("trouble", "reason"), [(TROUBLE["broken"], "HTTP 500: 'oops'"), (TROUBLE["slow"], "no answer within")]
)
def test_lasting_failures_are_errors(served_worker, answers, trouble, reason):
    with serve(lambda request: trouble) as service:
        worker = served_worker("judges", {"url": service.url, "mode": "pointwise", "timeout_s": 0.2})
        (score,) = worker.score(answers("1", "Yes."))
    assert isinstance(score, RewardError) and reason in str(score) and "in the last of 3 attempts" in str(score)
    assert len(service.requests) == 3


def test_a_service_that_cannot_be_reached(served_worker, answers):
    with serve(lambda request: Answer({})) as service:
        pass
    (score,) = served_worker("judges", {"url": service.url, "mode": "pointwise"}).score(answers("1", "Yes."))
    assert isinstance(score, RewardError) and "cannot be reached (ConnectError" in str(score)


def test_a_refused_request_is_not_retried_and_the_key_is_hidden(served_worker, answers):
    """The server repeats the key in its answer, as some do."""
    with serve(lambda request: Answer({"error": f"wrong key {request.authorization}"}, 401)) as service:
        worker = served_worker("judges", {"url": service.url, "mode": "pointwise", "api_key_env": "TEST_KEY"}, key=KEY)
        (score,) = worker.score(answers("1", "Yes."))
    assert len(service.requests) == 1 and service.requests[0].authorization == f"Bearer {KEY}"
    assert "HTTP 401 (is TEST_KEY right?)" in str(score) and "<key>" in str(score)
    assert KEY not in str(score) + repr(score) + repr(vars(score))


def test_requests_at_once_are_bounded_over_all_batches(served_worker, answers):
    with serve(lambda request: Answer(mark(5), before=lambda: time.sleep(0.02))) as service:
        worker = served_worker("judges", {"url": service.url, "mode": "pointwise", "concurrency": 3})
        batches = [answers(str(n), *(f"{n} {i}" for i in range(8))) for n in range(4)]
        threads = [threading.Thread(target=worker.score, args=(batch,)) for batch in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(service.requests) == 32 and service.busiest == 3


def test_requests_per_minute(served_worker, answers):
    with serve(lambda request: Answer(mark(5))) as service:
        settings = {"mode": "pointwise", "requests_per_minute": 60 / 0.05}
        worker = served_worker("judges", {"url": service.url} | settings)
        began = time.monotonic()
        worker.score(answers("1", *(f"{i}" for i in range(9))))
        assert time.monotonic() - began >= 8 * 0.05


def test_retry_after_holds_back_all_requests(served_worker, answers):
    times = []

    def busy_once(request: Request) -> Answer:
        times.append(time.monotonic())
        return Answer({}, 429, {"Retry-After": "1"}) if len(times) == 1 else Answer(mark(5))

    with serve(busy_once) as service:
        worker = served_worker("judges", {"url": service.url, "mode": "pointwise", "concurrency": 1})
        assert all(isinstance(score, Score) for score in worker.score(answers("1", "a", "b", "c")))
    assert times[1] - times[0] >= 1.0 and LONGEST_WAIT_S >= 1.0, "no request is sent meanwhile"


def test_metadata_that_json_cannot_hold(served_worker, answers):
    with serve(lambda request: Answer({"scores": [1.0]})) as service:
        worker = served_worker("http", {"name": "far", "url": service.url})
        (score,) = worker.score(answers("1", "Yes.", about={1, 2}))
    assert isinstance(score, RewardError) and "cannot be written as JSON" in str(score) and "metadata" in str(score)
    assert service.requests == []


SCORES = {
    "too few": {"scores": [1.0]},
    "too many": {"scores": [1.0, 2.0, 3.0]},
    "text": {"scores": ["1.0", 2.0]},
    "a flag": {"scores": [True, 2.0]},
    "NaN": b'{"scores": [NaN, 2.0]}',
    "infinite": b'{"scores": [1e999, 2.0]}',
    "a huge integer": b'{"scores": [1' + b"0" * 400 + b", 2.0]}",
    "another shape": {"results": [1.0, 2.0]},
    "no object": [1.0, 2.0],
}


@pytest.mark.parametrize("reply", SCORES.values(), ids=SCORES)
def test_invalid_scores_are_errors(served_worker, answers, reply):
    with serve(lambda request: Answer(reply)) as service:
        worker = served_worker("http", {"name": "far", "url": service.url, "readings": 2})
        scores = worker.score(answers("1", "Yes.", "No."))
    assert all(isinstance(score, RewardError) and "no readable answer in 2" in str(score) for score in scores)
    assert len(service.requests) == 2


def test_a_service_that_scores(served_worker, answers):
    def scored(request: Request) -> Answer:
        assert request.path == "/v1" and request.authorization == f"Bearer {KEY}"
        body = request.body
        assert body["model"] == "rm" and body["prompts"] == [
            [{"role": "user", "content": "Where is my order 1?"}]
        ] * len(body["responses"])
        assert all(about == {"n": 1} for about in body["metadata"])
        return Answer({"scores": [None if text == "No." else len(text) for text in body["responses"]]})

    with serve(scored) as service:
        source = {"name": "far", "url": service.url, "batch_size": 3, "api_key_env": "TEST_KEY", "model": "rm"}
        worker = served_worker("http", source | {"weight": -1.0}, key=KEY)
        scores = worker.score(answers("1", "Yes.", "No.", "It left.", "It is here.", n=1))
    assert [score.total for score in (scores[0], *scores[2:])] == [-4.0, -8.0, -11.0]
    assert isinstance(scores[1], RewardError) and "null" in str(scores[1]) and scores[1].rollout_ids == ("1/1",)
    assert sorted(len(request.body["responses"]) for request in service.requests) == [1, 3]


def test_keys_come_from_the_environment_and_are_hidden(served_worker):
    from rlhf_ray.config.reward import RewardConfig

    judge = {"url": "http://judge/v1", "model": "m", "api_key_env": "TEST_KEY"}
    config = RewardConfig.model_validate({"judges": [judge]})
    keys = read_keys(config, {"TEST_KEY": KEY})
    assert KEY not in repr(keys) + str(keys) + json.dumps({k: str(v) for k, v in keys.items()})
    with pytest.raises(RuntimeError, match="TEST_KEY is not set"):
        read_keys(config, {"TEST_KEY": ""})
