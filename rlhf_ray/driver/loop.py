"""PPO over running workers. Two coroutines, joined by a bounded buffer:

      RolloutStream.run                                                PpoLoop.train

      prompts --> rollout workers --> reward, reference, teacher --> buffer --> batch of experiences
                        ^                                                              |
                        |                                             hooks.reward (discriminator)
                        |                                                              |
                        |                              policy, value: evaluate --> training batch
                        |                                                              |  hooks.select
                        |                                                              v
                  weight sync <-- policy and value learners: update <------------ minibatches
                        |                     hooks.extend_minibatch (PTX), hooks.during_update
                        v
                  hooks.after_sync (endpoint publishing), metrics, checkpoint, hooks.on_step

With a staleness of zero the two take turns; nothing else would differ in an asynchronous mode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from rlhf_ray.config.run import RunConfig
from rlhf_ray.driver.checkpointer import Checkpointer, TrainingState
from rlhf_ray.driver.hooks import HookChain, LoopHook
from rlhf_ray.driver.rollouts import RolloutStream
from rlhf_ray.driver.run_logger import RunLogger
from rlhf_ray.driver.training_batch import TrainingBatch, collate, minibatches, prepare
from rlhf_ray.driver.workers import Roles
from rlhf_ray.learner.deepspeed_engine import learning_rate
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.runtime.stopping import RunStopped
from rlhf_ray.types import Experience


class PpoLoop:
    """One training run."""

    def __init__(
        self,
        config: RunConfig,
        roles: Roles,
        stream: RolloutStream,
        logger: RunLogger,
        checkpointer: Checkpointer,
        hooks: Iterable[LoopHook] = (),
    ) -> None:
        self.config, self.seed = config.ppo, config.seed
        self.roles, self.stream, self.logger, self.checkpointer = roles, stream, logger, checkpointer
        self.hooks = HookChain(hooks, logger.timer)
        self.state = TrainingState.initial(self.config.algorithm.kl)
        self.saved_step = 0

    async def run(self, state: TrainingState) -> None:
        """Train from `state`, which the stream continues, too, up to `config.steps`.

        Raises:
            RunStopped: the run was asked to stop; the last complete step is in a checkpoint.
        """
        self.state, self.saved_step = state, state.step
        if state.step >= self.config.steps:
            return
        streaming = asyncio.create_task(self.stream.run())
        training = asyncio.create_task(self.train())
        try:
            await asyncio.wait({streaming, training}, return_when=asyncio.FIRST_COMPLETED)
            # The stream never ends by itself: if it is done, it failed, and training would wait forever.
            await (streaming if streaming.done() else training)
        except ExceptionGroup as group:
            # Task groups wrap what failed; users want the failure itself.
            raise _first(group) from None
        finally:
            for task in (streaming, training):
                task.cancel()
            await asyncio.gather(streaming, training, return_exceptions=True)
            await self.hooks.close()

    async def train(self) -> None:
        """Once per step: experiences → training batch → new policy → rollout workers."""
        while self.state.step < self.config.steps:
            experiences = await self.hooks.reward(await self.take(), self.state.step)
            batch = self.hooks.select(await self.prepare(experiences))
            (policy_results, value_results), learned = await asyncio.gather(
                self.update(batch), self.hooks.during_update(experiences, self.state.step)
            )
            with self.logger.timer("publication"):
                await self.roles.pool.sync_weights(self.state.step + 1, self.roles.policy)
            published = await self.hooks.after_sync(self.state.step + 1)
            services = await self.roles.service_metrics()
            # Nothing else runs between these lines and `record`, so state and ledger know the same groups as dropped.
            next_group, unfinished = self.stream.next_group, self.stream.unfinished
            self.state = self.state.advance(batch.kl, len(experiences), next_group, unfinished)
            last = self.state.step == self.config.steps
            if not last:
                await self.stream.advance_version(self.state.step)
            metrics = self.logger.record(
                self.state, experiences, batch, policy_results, value_results, services | learned | published
            )
            if last or self.state.step % self.config.checkpoint.every == 0:
                await self.checkpoint()
            await self.hooks.on_step(self.state.step, metrics)

    async def take(self) -> Sequence[Experience]:
        """The next batch; a run that is to stop saves its last step instead."""
        try:
            return await self.stream.take()
        except RunStopped:
            if self.saved_step < self.state.step:
                await self.checkpoint()
            steps = f"step {self.state.step} of {self.config.steps}"
            raise RunStopped(f"the run was asked to stop, and stopped after {steps}") from None

    async def prepare(self, experiences: Sequence[Experience]) -> TrainingBatch:
        """Evaluate the batch with the learners, then compute advantages over the global batch."""
        with self.logger.timer("preparation"):
            batch, algorithm = collate(experiences), self.config.algorithm
            policy, value = self.roles.policy, self.roles.value
            old, values = await asyncio.gather(
                policy.evaluate(batch) if self.needs_old_logprobs else _none(),
                value.evaluate(batch) if value else _none(),
            )
            if old is not None:
                batch = batch.with_columns(old_logprobs=old)
            if values is not None:
                batch = batch.with_columns(old_values=values)
            if self.config.share_reference and algorithm.kl.placement != "none":
                batch = batch.with_columns(reference_logprobs=await policy.evaluate(batch, base=True))
            teacher = self.config.teacher if self.roles.teacher else None
            teaching = teacher.coefficient if teacher else 0.0
            return prepare(experiences, batch, algorithm, self.state.kl.beta, self.config.longest_response, teaching)

    async def update(self, batch: TrainingBatch) -> tuple[list[StepResult], list[StepResult]]:
        """All optimizer steps of a batch; policy and value model step at the same time."""
        config = self.config
        results: tuple[list[StepResult], list[StepResult]] = ([], [])
        parts = minibatches(
            batch, config.algorithm, config.minibatches, config.epochs,
            config.longest_response, (self.seed, self.state.step),
        )  # fmt: skip
        total = config.steps * len(parts)
        with self.logger.timer("update"):
            for done, minibatch in enumerate(parts, start=self.state.step * len(parts)):
                if minibatch is None:
                    continue
                rate = learning_rate(config.policy.optimizer, done, total)
                extended = self.hooks.extend_minibatch(minibatch, done)
                steps = [self.roles.policy.update(extended, rate, self.state.kl.beta)]
                if self.roles.value is not None:
                    rate = learning_rate(config.value.optimizer, done, total)
                    steps.append(self.roles.value.update(minibatch, rate))
                for role_results, result in zip(results, await asyncio.gather(*steps), strict=False):
                    role_results.append(result)
        return results

    async def checkpoint(self) -> None:
        """Save the current state."""
        with self.logger.timer("checkpoint"):
            self.logger.flush()
            path = await self.checkpointer.save(self.state)
            self.logger.checkpoint_saved(self.state.step, path)
            await self.checkpointer.upload()
        self.saved_step = self.state.step

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy evaluates the batch first.

        A single optimizer step starts at ratio 1, so its own forward pass gives the old log-probabilities; a KL in the
        reward and a teacher's advantages need them before.
        """
        several = self.config.epochs * self.config.minibatches > 1
        return several or self.config.algorithm.kl.placement == "reward" or self.roles.teacher is not None


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


async def _none() -> None:
    return None
