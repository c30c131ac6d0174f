"""PPO, as two coroutines joined by a bounded buffer.

`stream_rollouts` turns prompts into experience as far ahead as admission allows; `train` turns experience into new policies.
With a staleness of zero they take turns; nothing else is different in the asynchronous mode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Literal

from rlhf_ray.batch import Batch
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.driver.buffer import ExperienceBuffer
from rlhf_ray.driver.checkpointer import TrainingState
from rlhf_ray.driver.extras.discriminator import Discriminator, DiscriminatorOutput
from rlhf_ray.driver.extras.endpoint_publishing import Publishing
from rlhf_ray.driver.extras.ptx import DemonstrationSource, per_step, with_demonstrations
from rlhf_ray.driver.rollouts import PromptSource
from rlhf_ray.driver.run_logger import RunLogger
from rlhf_ray.driver.token_batches import TokenBatcher
from rlhf_ray.driver.training_batch import TrainingBatch, collate, minibatches, prepare, shaped_scores
from rlhf_ray.driver.workers import Roles
from rlhf_ray.environments.base import EnvironmentFailed
from rlhf_ray.learner.deepspeed_engine import learning_rate
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.runtime.stopping import RunStopped, StopRequest
from rlhf_ray.types import Experience, Rollout, RolloutRequest


class PpoLoop:
    """One training run over started roles."""

    def __init__(
        self,
        config: PpoConfig,
        roles: Roles,
        prompts: PromptSource,
        state: TrainingState,
        journal: RunLogger,
        seed: int,
        demonstrations: DemonstrationSource | None = None,
        imitation: Discriminator | None = None,
        stop: StopRequest | None = None,
        publishing: Publishing | None = None,
    ) -> None:
        """`demonstrations`: for `algorithm.ptx`; `imitation`: for `discriminator`; `stop`: who may end it early;
        `publishing`: gives better policies to an endpoint."""
        self.config, self.roles, self.prompts, self.state, self.journal, self.seed = (
            config, roles, prompts, state, journal, seed,
        )  # fmt: skip
        self.demonstrations, self.imitation, self.publishing = demonstrations, imitation, publishing
        self.stop, self.saved_step = stop or StopRequest(), state.step
        self.groups_per_batch = config.batch_size // config.samples_per_prompt
        dynamic = config.algorithm.dynamic_sampling
        attempts = dynamic.max_attempts if dynamic is not None else 1
        admission = state.admission(self.groups_per_batch, config.staleness, attempts)
        self.buffer = ExperienceBuffer(admission, config.samples_per_prompt, self.has_signal)

    async def run(self) -> None:
        """Train up to `config.steps`.

        Raises:
            RunStopped: asked for; the last complete step is in a checkpoint.
        """
        if self.state.step >= self.config.steps:
            return
        streaming = asyncio.create_task(self.stream_rollouts())
        training = asyncio.create_task(self.train())
        try:
            await asyncio.wait({streaming, training}, return_when=asyncio.FIRST_COMPLETED)
            # Streaming never ends by itself: if it is done, it failed, and training would wait for ever.
            await (streaming if streaming.done() else training)
        except ExceptionGroup as group:
            # Task groups wrap what failed; people want the failure itself.
            raise _first(group) from None
        finally:
            for task in (streaming, training):
                task.cancel()
            await asyncio.gather(streaming, training, return_exceptions=True)
            if self.publishing is not None:
                await self.publishing.settle()

    async def stream_rollouts(self) -> None:
        """Prompts → rollouts → experience, as far ahead as admission allows."""
        async with asyncio.TaskGroup() as running:
            while True:
                requests: list[RolloutRequest] = []
                for index in await self.buffer.admit():
                    group = self.prompts.group(index)
                    self.buffer.expect(group[0].prompt.id, index)
                    requests += group
                running.create_task(self.produce(requests))

    async def produce(self, requests: Sequence[RolloutRequest]) -> None:
        """Generate, and score whatever is ready as soon as it fills a scoring batch."""
        group = self.config.samples_per_prompt if self.config.reward.needs_groups else 1
        ready = TokenBatcher(self.config.reward.batch_tokens, group)
        async with asyncio.TaskGroup() as scoring:
            with self.journal.timer("rollout"):
                async with aclosing(self.roles.generate(requests)) as rollouts:
                    async for rollout in rollouts:
                        if isinstance(rollout, EnvironmentFailed):
                            await self.drop(rollout.prompt_id, rollout, self.config.environment.on_error)
                        elif batch := ready.add(rollout):
                            scoring.create_task(self.score(batch))
            if rest := ready.take():
                scoring.create_task(self.score(rest))

    async def score(self, rollouts: Sequence[Rollout]) -> None:
        """Reward, reference and teacher at the same time; into the buffer with what they say."""
        with self.journal.timer("scoring"):
            said = await asyncio.gather(
                self.roles.score(rollouts),
                self.roles.reference_logprobs(rollouts),
                self.roles.teacher_logprobs(rollouts),
            )
        for rollout, score, reference, teacher in zip(rollouts, *said, strict=True):
            if isinstance(score, RewardError):
                await self.drop(rollout.prompt.id, score, self.config.reward.on_error)
            elif not await self.buffer.put(Experience(rollout, score, reference, teacher)):
                self.journal.resampled(rollout.prompt.id)

    def has_signal(self, group: Sequence[Experience]) -> bool:
        """Whether the scores of a group differ: where they do not, every advantage is zero."""
        scores = shaped_scores(group, self.config.algorithm, self.config.longest_response)
        return bool((scores != scores[0]).any())

    async def drop(
        self, prompt_id: str, error: RewardError | EnvironmentFailed, on_error: Literal["fail", "drop"]
    ) -> None:
        """Give up the prompt's whole group, or the run, as the config says; never a silent zero."""
        if on_error == "fail":
            raise error
        if await self.buffer.drop(prompt_id):
            self.journal.dropped(prompt_id, str(error))

    async def train(self) -> None:
        """Experience → batch → new policy → rollout workers, once per step."""
        while self.state.step < self.config.steps:
            experiences, judgement = await self.judge(await self.take())
            prepared = await self.prepare(experiences)
            if judgement is not None and self.imitation.policy_waits(judgement):
                prepared = prepared.untrained()
            (policy_results, value_results), imitated = await asyncio.gather(
                self.update(prepared), self.imitate(experiences, judgement)
            )
            with self.journal.timer("publication"):
                await self.roles.pool.sync_weights(self.state.step + 1, self.roles.policy)
            offered = await self.offer(self.state.step + 1)
            services = await self.roles.service_metrics()
            # From here to the ledger's line nothing else runs: both know the same groups as given up.
            self.state = self.state.advance(
                prepared.kl, len(experiences), self.buffer.admission.next_group, self.buffer.unfinished
            )
            last = self.state.step == self.config.steps
            if not last:
                await self.buffer.advance_version(self.state.step)
            beside = services | imitated | offered
            self.journal.record(self.state, experiences, prepared, policy_results, value_results, beside)
            if last or self.state.step % self.config.checkpoint.every == 0:
                await self.checkpoint()

    async def take(self) -> list[Experience]:
        """The next batch. A run that is to stop does not wait for it: it is generated again, with the same seeds, on resume."""
        try:
            return await self.stop.or_result(self.buffer.take(self.groups_per_batch))
        except RunStopped:
            if self.saved_step < self.state.step:
                await self.checkpoint()
            raise RunStopped(f"stopped, as asked, after step {self.state.step} of {self.config.steps}") from None

    async def checkpoint(self) -> None:
        """Keep the state of now."""
        with self.journal.timer("checkpoint"):
            await self.journal.checkpoint(self.state, self.roles, self.imitation)
        self.saved_step = self.state.step

    async def offer(self, step: int) -> dict[str, float]:
        """The policy of a step to an endpoint, if it is better; before rollouts of the next batch keep its workers busy."""
        if self.publishing is None:
            return {}
        with self.journal.timer("evaluation"):
            return await self.publishing.offer(step)

    async def judge(self, experiences: Sequence[Experience]) -> tuple[Sequence[Experience], DiscriminatorOutput | None]:
        """The batch with the discriminator's part of the reward, and what it said; as it is where there is none."""
        if self.imitation is None:
            return experiences, None
        with self.journal.timer("discriminator"):
            judgement = await self.imitation.judge(experiences, self.state.step)
        return self.imitation.rewarded(experiences, judgement), judgement

    async def imitate(
        self, experiences: Sequence[Experience], judgement: DiscriminatorOutput | None
    ) -> dict[str, float]:
        """The discriminator learns from the batch that it has judged; its metrics."""
        if judgement is None:
            return {}
        with self.journal.timer("discriminator"):
            return await self.imitation.learn(experiences, judgement, self.state.step)

    async def prepare(self, experiences: Sequence[Experience]) -> TrainingBatch:
        """Old log-probabilities and values from the learners, then advantages over the global batch."""
        with self.journal.timer("preparation"):
            batch = collate(experiences)
            policy, value = self.roles.policy, self.roles.value
            old, values = await asyncio.gather(
                policy.evaluate(batch) if self.needs_old_logprobs else _nothing(),
                value.evaluate(batch) if value else _nothing(),
            )
            if old is not None:
                batch = batch.with_columns(old_logprobs=old)
            if values is not None:
                batch = batch.with_columns(old_values=values)
            if self.config.share_reference and self.config.algorithm.kl.placement != "none":
                batch = batch.with_columns(reference_logprobs=await policy.evaluate(batch, base=True))
            limit = self.config.longest_response
            teaching = self.config.teacher.coefficient if self.roles.teacher else 0.0
            return prepare(experiences, batch, self.config.algorithm, self.state.kl.beta, limit, teaching)

    async def update(self, prepared: TrainingBatch) -> tuple[list[StepResult], list[StepResult]]:
        """All optimizer steps of a batch, policy and value model at the same time."""
        config, policy_results, value_results = self.config, [], []
        parts = minibatches(
            prepared, config.algorithm, config.minibatches, config.epochs,
            config.longest_response, (self.seed, self.state.step),
        )  # fmt: skip
        total = config.steps * len(parts)
        with self.journal.timer("update"):
            for number, part in enumerate(parts):
                if part is None:
                    continue
                done = self.state.step * len(parts) + number
                policy_step = self.roles.policy.update(
                    self.for_policy(part, done), learning_rate(config.policy.optimizer, done, total), self.state.kl.beta
                )
                if self.roles.value is None:
                    policy_results.append(await policy_step)
                    continue
                value_step = self.roles.value.update(part, learning_rate(config.value.optimizer, done, total))
                policy, value = await asyncio.gather(policy_step, value_step)
                policy_results.append(policy)
                value_results.append(value)
        return policy_results, value_results

    def for_policy(self, part: Batch, optimizer_step: int) -> Batch:
        """A minibatch with the demonstrations that the policy also learns from in this optimizer step of the run."""
        if self.demonstrations is None:
            return part
        ptx, config = self.config.algorithm.ptx, self.config
        count = per_step(ptx.share, config.batch_size // config.minibatches)
        return with_demonstrations(part, self.demonstrations.take(optimizer_step * count, count), ptx.coefficient)

    @property
    def needs_old_logprobs(self) -> bool:
        """A single optimizer step starts at ratio 1, its own first pass is the old policy; unless a KL is in the reward, or a
        teacher in the advantages."""
        several = self.config.epochs * self.config.minibatches > 1
        return several or self.config.algorithm.kl.placement == "reward" or self.roles.teacher is not None


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


async def _nothing() -> None:
    return None
