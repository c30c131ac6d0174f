"""The loop over workers written by hand: what happens in which order, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.algorithms.diagnostics import Diagnostics
from rlhf_ray.batch import Batch
from rlhf_ray.config import RunConfig, parse_config
from rlhf_ray.driver.checkpointer import TrainingState
from rlhf_ray.driver.hooks import LoopHook
from rlhf_ray.driver.loop import PpoLoop
from rlhf_ray.driver.run_logger import RunLogger
from rlhf_ray.driver.training_batch import TrainingBatch
from rlhf_ray.driver.workers import Roles
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.ledger import read_ledger
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runtime.stopping import RunStopped

STEPS = 3


def config(**ppo) -> RunConfig:
    fields = {
        "steps": STEPS, "batch_size": 2, "samples_per_prompt": 2, "checkpoint": {"every": 2},
        "algorithm": {"advantage": "grpo", "kl": {"placement": "none"}}, "reward": {"model": {"path": "reward"}},
    }  # fmt: skip
    data = {"prompts": {"location": "prompts.jsonl"}}
    return parse_config({"name": "r", "stages": ["ppo"], "model": {"path": "m"}, "data": data, "ppo": fields | ppo})


class World:
    """Stream, pool, learner, checkpointer and a hook; each writes down what it is asked for."""

    def __init__(self, experience: Callable) -> None:
        self.experience, self.calls, self.taken = experience, [], 0
        self.stops_at: int | None = None
        self.error: Exception | None = None
        self.next_group, self.unfinished = 0, ()

    # The stream.
    async def run(self) -> None:
        await asyncio.sleep(0)
        if self.error is not None:
            raise ExceptionGroup("tasks", [ExceptionGroup("tasks", [self.error])])
        await asyncio.Event().wait()

    async def take(self) -> list:
        if self.error is not None:
            await asyncio.Event().wait()
        if self.taken == self.stops_at:
            raise RunStopped("the run was asked to stop")
        self.taken, self.next_group = self.taken + 1, self.next_group + 1
        self.calls.append("take")
        return [self.experience(f"p{self.taken}", sample, score=float(sample), reference=False) for sample in (0, 1)]

    async def advance_version(self, version: int) -> None:
        self.calls.append(f"advance to {version}")

    # The pool.
    async def sync_weights(self, version: int, learner: World) -> None:
        self.calls.append(f"sync {version}")

    # The policy's learner.
    async def evaluate(self, batch: Batch, base: bool = False) -> np.ndarray:
        self.calls.append("evaluate")
        return np.zeros(int(batch.target_counts.sum()), dtype=np.float32)

    async def update(self, batch: Batch, rate: float, beta: float = 0.0) -> StepResult:
        self.calls.append(f"update on {len(batch)}")
        return StepResult(0.5, 1.0, rate, Nothing())

    # The checkpointer.
    async def save(self, state: TrainingState) -> Path:
        self.calls.append(f"checkpoint {state.step}, next group {state.next_group}")
        return Path(f"step_{state.step}")

    async def upload(self) -> None:
        self.calls.append("upload")


class Nothing(Diagnostics):
    """No diagnostics."""

    def __add__(self, other: Nothing) -> Nothing:
        return self


class Hook(LoopHook):
    """Writes down what it is called for."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.held_back = False
        self.seen: list[Mapping[str, float]] = []

    async def reward(self, experiences, steps_done):
        self.calls.append(f"reward after {steps_done}")
        return experiences

    def select(self, batch: TrainingBatch) -> TrainingBatch:
        return batch.untrained() if self.held_back else batch

    def extend_minibatch(self, minibatch: Batch, optimizer_steps_done: int) -> Batch:
        return minibatch.joined(minibatch.select([0]))

    async def during_update(self, experiences, steps_done):
        return {"learned": float(steps_done)}

    async def after_sync(self, step: int):
        self.calls.append(f"after sync {step}")
        return {"published": float(step)}

    async def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(f"on step {step}")
        self.seen.append(metrics)

    async def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def train(tmp_path, tiny_model, experience) -> Callable[..., tuple[World, Hook, RunFolder]]:
    """Run the loop over a world that `prepare` changes first; an error is returned."""
    folder, tokenizer = RunFolder(tmp_path / "run"), load_tokenizer(tiny_model)

    def run(settings: RunConfig, change: Callable[[World, Hook], None] = lambda world, hook: None):
        world = World(experience)
        hook = Hook(world.calls)
        change(world, hook)
        roles = Roles(world, learners={"policy": world})
        state = TrainingState.initial(settings.ppo.algorithm.kl)
        error = None
        with EventLog(folder.events) as events, RunLogger(folder, events, tokenizer, settings) as logger:
            try:
                asyncio.run(PpoLoop(settings, roles, world, logger, world, [hook]).run(state))
            except Exception as raised:
                error = raised
        return world, hook, folder, error

    return run


def test_the_order_of_a_step(train):
    world, hook, folder, error = train(config())
    assert error is None
    assert world.calls[:8] == [
        "take", "reward after 0", "update on 3", "sync 1", "after sync 1", "advance to 1", "on step 1", "take",
    ]  # fmt: skip
    assert world.calls[-8:] == [
        "reward after 2", "update on 3", "sync 3", "after sync 3", "checkpoint 3, next group 3", "upload", "on step 3", "close",
    ]  # fmt: skip
    assert "advance to 3" not in world.calls, "after the last step no more rollouts are wanted"
    assert "checkpoint 2, next group 2" in world.calls and "checkpoint 1, next group 1" not in world.calls
    records = read_metrics(folder.metrics)
    assert [(r["learned"], r["published"], r["policy/loss"]) for r in records] == [
        (s, s + 1, 0.5) for s in range(STEPS)
    ]
    assert [metrics["learned"] for metrics in hook.seen] == [0, 1, 2] and "time/update_s" in hook.seen[0]
    assert [entry.trained for entry in read_ledger(folder.path / "ledger.jsonl")] == [
        (f"p{step}/0", f"p{step}/1") for step in range(1, STEPS + 1)
    ]


def test_old_logprobs_are_evaluated_where_a_batch_has_several_optimizer_steps(train):
    world, *_ = train(config(epochs=2))
    assert world.calls.count("evaluate") == STEPS and world.calls.count("update on 3") == 2 * STEPS


def test_a_hook_can_hold_a_batch_back(train):
    def hold_back(world: World, hook: Hook) -> None:
        hook.held_back = True

    world, *_ = train(config(), hold_back)
    assert not [call for call in world.calls if call.startswith("update")] and "sync 3" in world.calls


def test_a_run_that_is_to_stop_saves_its_last_step_once(train):
    for stops_at, checkpoints in ((1, 1), (2, 1), (0, 0)):
        world, _, _, error = train(config(), lambda world, hook, at=stops_at: setattr(world, "stops_at", at))
        assert isinstance(error, RunStopped) and f"after step {stops_at} of {STEPS}" in str(error)
        assert len([call for call in world.calls if call.startswith("checkpoint")]) == checkpoints
        assert world.calls[-1:] == ["close"]


def test_the_failure_of_the_stream_is_raised_as_it_is(train):
    failed = RewardError("rule", "raised", ["p/0"])
    world, _, _, error = train(config(), lambda world, hook: setattr(world, "error", failed))
    assert error is failed and world.calls == ["close"]
