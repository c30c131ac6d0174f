"""A question is asked once: asked again, also by another process, it gets the same answer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf_ray.rewards.answers import RewardError, ServiceError
from rlhf_ray.rewards.judge import AnswerCache, question_key
from tests.rewards.services import Answer, completion, serve, verdict

WRITER = """
import asyncio, sys
from pathlib import Path
from rlhf_ray.rewards.judge import AnswerCache

async def write(cache, who):
    for number in range(150):
        key = f"question {number}"
        kept = await cache.put(key, f"{who} says {number}")
        assert await cache.get(key) == kept
        print(kept)

cache = AnswerCache(Path(sys.argv[1]))
asyncio.run(write(cache, sys.argv[2]))
cache.close()
"""


def test_a_later_worker_reads_known_answers_from_the_cache(served_worker, answers, tmp_path):
    """Even though the service is stopped."""
    with serve(lambda request: Answer(verdict("A"))) as service:
        config = {"url": service.url}
        first = served_worker("judges", config).score(answers("1", "Yes.", "No.", "It left."))
        asked = len(service.requests)
    worker = served_worker("judges", config)
    again = worker.score(answers("1", "Yes.", "No.", "It left."))
    assert [score.total for score in again] == [score.total for score in first] and asked == 6
    usage = worker.usage()["judge"]
    assert (usage.questions, usage.cached, usage.requests) == (6, 6, 0)
    assert usage.metrics("judge")["service/judge/cache_hit_rate"] == 1.0
    (new, _) = worker.score(answers("1", "Yes.", "Something else."))
    assert isinstance(new, RewardError), "what is not known must be asked"
    assert (tmp_path / "judge_cache.sqlite").is_file()


CHANGES = [
    {"model": "judge-2"}, {"rubric": "brevity"}, {"request": {"temperature": 0.5}}, {"answer": "line"}, {"template": "?"},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_any_change_of_the_question_asks_again(served_worker, answers, change):
    reply = completion('{"reasoning": "", "verdict": "A"}')
    with serve(lambda request: Answer(reply)) as service:
        served_worker("judges", {"url": service.url}).score(answers("1", "Yes.", "No."))
        before = len(service.requests)
        served_worker("judges", {"url": service.url, "readings": 1} | change).score(answers("1", "Yes.", "No."))
    assert before == 2 and len(service.requests) > before


def test_the_same_question_at_the_same_time_is_asked_once(served_worker, answers):
    with serve(lambda request: Answer(verdict("A"))) as service:
        worker = served_worker("judges", {"url": service.url, "cache": None})
        scores = worker.score(answers("1", "Yes.", "No.", "Yes.", "No."))
    assert [score.total for score in scores] == [0.5] * 4 and len(service.requests) == 2


def test_unreadable_answers_are_not_cached(served_worker, answers):
    with serve(lambda request: Answer(completion("hm"))) as service:
        bad = served_worker("judges", {"url": service.url}).score(answers("1", "Yes.", "No."))
    assert all(isinstance(score, RewardError) for score in bad)
    worker = served_worker("judges", {"url": service.url})
    worker.score(answers("1", "Yes.", "No."))
    assert worker.usage()["judge"].cached == 0


def test_two_processes_share_a_file(tmp_path):
    """They write at the same time; one answer per question is kept, and both processes get it."""
    path = tmp_path / "deep" / "cache.sqlite"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, who], stdout=subprocess.PIPE, text=True) for who in ("Ada", "Bob")]
    heard = [writer.communicate(timeout=60)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert heard[0] == heard[1] and len(heard[0]) == 150


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "cache.sqlite"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(ServiceError, match=rf"{path} cannot be used: .*move it away"):
        AnswerCache(path)


def test_keys():
    body = {"model": "m", "messages": [{"role": "user", "content": "é"}]}
    assert question_key("u", body) == question_key("u", dict(reversed(body.items())))
    assert len({question_key("u", body), question_key("v", body), question_key("u", body | {"seed": 1})}) == 3
