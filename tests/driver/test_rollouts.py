"""The stream of rollouts, with a pool and scorers written by hand: order, whole groups, what is dropped or replaced, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.driver.buffer import Admission
from rlhf_ray.driver.rollouts import PromptSource, RolloutStream
from rlhf_ray.environments.base import EnvironmentFailed
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.runtime.stopping import RunStopped, StopRequest
from rlhf_ray.telemetry.timing import PhaseTimer
from rlhf_ray.types import Experience, Prompt, Rollout, RolloutRequest, Score

GROUPS, SAMPLES, LENGTH = 2, 2, 6
TOKENS = 4 + LENGTH
"""Tokens of each rollout with its prompt."""

Outcome = Score | RewardError | EnvironmentFailed


class Workers:
    """Rollouts arrive in any order; what becomes of each is decided by its id."""

    def __init__(self, outcome: Callable[[str], Outcome] = lambda rollout: Score(0.0, {"rule": 0.0})) -> None:
        self.outcome = outcome
        self.generated: list[str] = []
        self.scored: list[list[str]] = []
        self.held_after: int | None = None
        """Hold generation back after that many rollouts, until `released`."""
        self.released = asyncio.Event()

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout | EnvironmentFailed]:
        for request in reversed(requests):
            if len(self.generated) == self.held_after:
                await self.released.wait()
            self.generated.append(request.id)
            column = np.zeros(LENGTH, dtype=np.float32)
            outcome = self.outcome(request.id)
            if isinstance(outcome, EnvironmentFailed):
                yield outcome
            else:
                yield Rollout(request, column.astype(np.int32), column, column.astype(np.int32), "stop")

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score | RewardError]:
        self.scored.append([rollout.id for rollout in rollouts])
        return [self.outcome(rollout.id) for rollout in rollouts]

    async def reference_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        return [np.full(len(rollout), float(rollout.request.sample_index)) for rollout in rollouts]

    async def teacher_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | None]:
        return [None] * len(rollouts)


class Log:
    """What the stream records."""

    def __init__(self) -> None:
        self.timer = PhaseTimer()
        self.dropped: dict[str, str] = {}
        self.replaced: list[str] = []

    def group_dropped(self, prompt_id: str, reason: str) -> None:
        self.dropped[prompt_id] = reason

    def group_replaced(self, prompt_id: str) -> None:
        self.replaced.append(prompt_id)


def config(batch_tokens: int = 3 * TOKENS, on_error: str = "fail", environment: str | None = None, **ppo) -> PpoConfig:
    fields = {
        "batch_size": GROUPS * SAMPLES, "samples_per_prompt": SAMPLES,
        "algorithm": {"advantage": "grpo", "kl": {"placement": "none"}},
        "reward": {
            "model": None, "functions": [{"name": "rule", "function": "a:b"}], "batch_tokens": batch_tokens,
            "on_error": on_error,
        },
        "environment": environment and {"class": "a:B", "on_error": environment},
    }  # fmt: skip
    return PpoConfig.model_validate(fields | ppo)


def streamed(
    ppo: PpoConfig, workers: Workers, use: Callable[[RolloutStream], Coroutine], admission: Admission | None = None
) -> tuple[object, Log]:
    """The result of `use(stream)` while the stream runs; an error of the stream is raised."""
    prompts = [Prompt(f"q{i}", np.zeros(4, dtype=np.int32), ()) for i in range(5)]
    log = Log()

    async def run() -> object:
        source = PromptSource(prompts, "run", 0, SAMPLES)
        stream = RolloutStream(ppo, workers, source, admission or Admission(GROUPS), log, StopRequest())
        streaming, using = asyncio.create_task(stream.run()), asyncio.create_task(use(stream))
        try:
            await asyncio.wait({streaming, using}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
            return await (streaming if streaming.done() else using)
        finally:
            for task in (streaming, using):
                task.cancel()
            await asyncio.gather(streaming, using, return_exceptions=True)

    return asyncio.run(run()), log


async def two_batches(stream: RolloutStream) -> list[list[Experience]]:
    first = await stream.take()
    await stream.advance_version(1)
    return [first, await stream.take()]


def prompts_of(batch: Sequence[Experience]) -> list[str]:
    return [experience.rollout.prompt.id for experience in batch]


def in_order(indices: Sequence[int]) -> list[str]:
    """The prompts of groups, by index, each as often as it has samples."""
    source = PromptSource([Prompt(f"q{i}", np.zeros(4, dtype=np.int32), ()) for i in range(5)], "run", 0, SAMPLES)
    return [request.prompt.id for index in indices for request in source.group(index)]


def test_batches_are_whole_groups_in_the_order_of_admission():
    """Although rollouts arrive in the reverse order."""
    workers = Workers()
    batches, log = streamed(config(), workers, two_batches)
    assert [prompts_of(batch) for batch in batches] == [in_order([0, 1]), in_order([2, 3])]
    for batch in batches:
        assert [e.rollout.request.sample_index for e in batch] == [0, 1, 0, 1]
        assert all((e.reference_logprobs == e.rollout.request.sample_index).all() for e in batch)
        assert [e.teacher_logprobs for e in batch] == [None] * 4
    assert workers.generated[:4] == [e.id for e in reversed(batches[0])]
    assert not log.dropped and not log.replaced


def test_only_as_many_groups_as_admission_allows_are_generated():
    async def wait(stream: RolloutStream) -> tuple[int, tuple[int, ...]]:
        for _ in range(200):
            await asyncio.sleep(0)
        return stream.next_group, stream.unfinished

    workers = Workers()
    assert streamed(config(), workers, wait)[0] == (2, (0, 1)) and len(workers.generated) == 4


def test_scoring_starts_as_soon_as_a_batch_is_full():
    """Three rollouts fill a scoring batch, while the fourth is still generated; the rest is scored at the end."""

    async def look(stream: RolloutStream) -> list[list[str]]:
        while not workers.scored:
            await asyncio.sleep(0)
        before = list(workers.scored)
        workers.released.set()
        await stream.take()
        return before

    workers = Workers()
    workers.held_after = 3
    before, _ = streamed(config(), workers, look)
    assert before == [workers.generated[:3]] and workers.scored == [workers.generated[:3], workers.generated[3:]]


def test_a_judge_that_compares_a_group_gets_it_whole():
    """Although a single rollout would fill a batch."""
    judge = {"name": "judge", "mode": "pairwise", "url": "http://127.0.0.1:1", "model": "m"}
    reward = {"model": None, "batch_tokens": 1, "judges": [judge]}
    workers = Workers()
    streamed(config(reward=reward), workers, lambda stream: stream.take())
    assert sorted(len({rollout.rpartition("/")[0] for rollout in batch}) for batch in workers.scored) == [1, 1]
    assert [len(batch) for batch in workers.scored] == [SAMPLES, SAMPLES]


def failing(rollout_id: str, error: Outcome) -> Callable[[str], Outcome]:
    return lambda rollout: error if rollout == rollout_id else Score(0.0, {"rule": 0.0})


FIRST = f"{in_order([0])[0]}/1"
"""The second sample of the first group."""
REWARD_ERROR = RewardError("rule", "returned NaN", [FIRST])
ENVIRONMENT_ERROR = EnvironmentFailed("a:B", "raised", FIRST)


@pytest.mark.parametrize(
    ("error", "ppo"),
    [(REWARD_ERROR, config(on_error="drop")), (ENVIRONMENT_ERROR, config(environment="drop"))],
    ids=["reward", "environment"],
)
def test_a_failure_drops_the_whole_group_and_another_takes_its_place(error, ppo):
    batches, log = streamed(ppo, Workers(failing(FIRST, error)), two_batches)
    assert [prompts_of(batch) for batch in batches] == [in_order([1, 2]), in_order([3, 4])]
    assert log.dropped == {FIRST.rpartition("/")[0]: str(error)}, "once, although its other sample was fine"


@pytest.mark.parametrize(
    ("error", "ppo"), [(REWARD_ERROR, config()), (ENVIRONMENT_ERROR, config(environment="fail"))],
    ids=["reward", "environment"],
)  # fmt: skip
def test_a_failure_ends_the_run_where_the_config_says_so(error, ppo):
    with pytest.raises(ExceptionGroup) as caught:
        streamed(ppo, Workers(failing(FIRST, error)), two_batches)
    found: BaseException = caught.value
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert found is error


def test_groups_without_signal_are_replaced_until_the_attempts_are_used_up():
    """Groups 0 and 3 have equal scores; with two attempts for each batch, another group takes the place of each."""
    equal = set(in_order([0, 3]))

    def outcome(rollout: str) -> Score:
        prompt, _, sample = rollout.rpartition("/")
        return Score(0.0 if prompt in equal else float(sample), {"rule": 0.0})

    ppo = config(algorithm={"advantage": "grpo", "kl": {"placement": "none"}, "dynamic_sampling": {"max_attempts": 2}})
    batches, log = streamed(ppo, Workers(outcome), two_batches, Admission(GROUPS, attempts=2))
    assert [prompts_of(batch) for batch in batches] == [in_order([1, 2]), in_order([4, 5])]
    assert log.replaced == in_order([0, 3])[::SAMPLES] and not log.dropped


def test_penalties_count_as_signal():
    """Equal scores of a truncated and a finished response differ by the penalty."""
    penalty = {"advantage": "grpo", "kl": {"placement": "none"}, "missing_eos_penalty": 1.0}
    stream = RolloutStream(config(algorithm=penalty), Workers(), None, Admission(GROUPS), Log(), StopRequest())
    request = PromptSource([Prompt("q", np.zeros(4, dtype=np.int32), ())], "run", 0, 1).group(0)[0]
    column = np.zeros(LENGTH, dtype=np.float32)
    rollout = Rollout(request, column.astype(np.int32), column, column.astype(np.int32), "stop")
    done, cut = (Experience(replace(rollout, finish_reason=why), Score(1.0, {}), None) for why in ("stop", "length"))
    assert stream.has_signal([done, cut]) and not stream.has_signal([done, done])


def test_a_run_that_is_to_stop_does_not_wait_for_its_batch():
    async def stop(stream: RolloutStream) -> None:
        asyncio.get_running_loop().call_soon(stream.stop.make)
        await stream.take()

    workers = Workers()
    workers.held_after = 1
    with pytest.raises(RunStopped):
        streamed(config(), workers, stop)
