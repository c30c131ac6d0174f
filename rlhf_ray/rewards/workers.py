"""The scoring actors, and the driver's view of them: rewards and log-probabilities of rollouts by frozen models and functions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from rlhf_ray.batch import ModelInput, pack, pack_rollouts, pad
from rlhf_ray.config.reward import RewardConfig, ScorerConfig
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.models.heads import TokenLogprobs
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer
from rlhf_ray.models.packing import enable_packing
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.rewards.http import ApiKeys, Usage
from rlhf_ray.rewards.model_reward import EnsembleScore, ModelReward
from rlhf_ray.rewards.sources import RewardSource, build_sources
from rlhf_ray.runs.storage.folders import fetch
from rlhf_ray.runs.storage.location import local
from rlhf_ray.types import Rollout, Score

Answer = TypeVar("Answer")


class ScoringPool(Generic[Answer]):
    """The driver's handle to equal workers of one role. Each batch goes to the worker with the fewest outstanding tokens."""

    def __init__(self, workers: Sequence[ActorHandle], method: str) -> None:
        self.workers = tuple(workers)
        self.method = method
        self.outstanding = [0] * len(self.workers)

    @classmethod
    async def start(
        cls, actor: type, method: str, count: int, options: Callable[[int], dict[str, Any]], *arguments: Any
    ) -> ScoringPool:
        """Start `count` actors and wait until they have loaded their models."""
        remote = ray.remote(actor)
        workers = [remote.options(**options(index)).remote(*arguments) for index in range(count)]
        await asyncio.gather(*(worker.__ray_ready__.remote() for worker in workers))
        return cls(workers, method)

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[Answer]:
        """The answers of the pool's default method, in order."""
        return await self.ask(self.method, rollouts)

    async def ask(self, method: str, rollouts: Sequence[Rollout]) -> list[Any]:
        """The answers of another method for the rollouts, in order."""
        index = self.outstanding.index(min(self.outstanding))
        tokens = sum(len(r.prompt.token_ids) + len(r) for r in rollouts)
        self.outstanding[index] += tokens
        try:
            return await getattr(self.workers[index], method).remote(list(rollouts))
        finally:
            self.outstanding[index] -= tokens

    async def ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all workers to the same call."""
        return await asyncio.gather(*(getattr(worker, method).remote(*arguments) for worker in self.workers))

    def close(self) -> None:
        for worker in self.workers:
            ray.kill(worker)


class RewardWorker:
    """An actor with all sources of reward. Calls from several threads wait for services at the same time."""

    def __init__(
        self,
        config: RewardConfig,
        model_paths: Sequence[str],
        tokenizer_path: str,
        keys: ApiKeys | None = None,
        folder: str = ".",
    ) -> None:
        """
        Args:
            model_paths: folders of the reward models.
            keys: API keys of the services, by the names of their variables.
            folder: the run folder.
        """
        torch.set_num_threads(config.workers.threads)
        tokenizer, device = load_tokenizer(fetch(tokenizer_path)), _device(config.workers.gpus)
        folders = tuple(map(fetch, model_paths))
        self.sources = build_sources(config, folders, tokenizer, device, keys or {}, local(folder))
        self._local_sources = threading.Lock()

    def score(self, rollouts: Sequence[Rollout]) -> list[Score | RewardError]:
        """A score or an error for each rollout. A failing source affects only the rollouts that it fails on.

        For an episode, the last turn is scored as a response to everything before it.
        """
        rollouts = [rollout.final_turn for rollout in rollouts]
        failures: dict[str, RewardError] = {}
        parts: dict[str, dict[str, float]] = {rollout.id: {} for rollout in rollouts}
        for source in self.sources:
            rest = [rollout for rollout in rollouts if rollout.id not in failures]
            for rollout, answer in zip(rest, self._ask(source, rest), strict=True):
                if isinstance(answer, RewardError):
                    failures[rollout.id] = answer
                    continue
                if isinstance(answer, EnsembleScore):
                    parts[rollout.id][f"{source.name}_disagreement"] = answer.disagreement
                    answer = answer.value
                parts[rollout.id][source.name] = float(answer)
        return [failures.get(rollout.id) or self._total(parts[rollout.id]) for rollout in rollouts]

    def raw_rewards(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """float64 [K] for each rollout: the rewards of the K reward models, not normalised."""
        with self._local_sources:
            return list(self._model_reward.raw([rollout.final_turn for rollout in rollouts]).T)

    def normalise(self, statistics: Sequence[tuple[float, float]]) -> None:
        """From now on, normalise the reward models by these means and standard deviations."""
        with self._local_sources:
            self._model_reward.normalise(statistics)

    @property
    def _model_reward(self) -> ModelReward:
        return next(source for source in self.sources if isinstance(source, ModelReward))

    def usage(self) -> dict[str, Usage]:
        """The usage of each service since the last call."""
        return {source.name: source.meter.take() for source in self.sources if source.meter is not None}

    def _ask(self, source: RewardSource, rollouts: Sequence[Rollout]) -> Sequence[float | EnsembleScore | RewardError]:
        if not rollouts:
            return []
        if source.meter is not None:
            return source.score(rollouts)
        with self._local_sources:
            return source.score(rollouts)

    def _total(self, parts: dict[str, float]) -> Score:
        return Score(sum(source.weight * parts[source.name] for source in self.sources), parts)


class LogprobWorker:
    """An actor with a frozen language model that computes log-probabilities of the policy's tokens."""

    def __init__(self, config: ScorerConfig, model_path: str, temperature: float) -> None:
        """`temperature`: the policy's sampling temperature."""
        torch.set_num_threads(config.workers.threads)
        self.device = _device(config.workers.gpus)
        self.budget, self.packing = config.micro_batch_tokens, config.packing
        model = load_causal_lm(fetch(model_path), config.dtype, config.attention).eval().to(self.device)
        self.policy = TokenLogprobs(model, temperature)
        if config.packing:
            enable_packing(model, self.policy, exact=config.dtype == "fp32")

    @torch.inference_mode()
    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """float32 [C] per rollout: log-probabilities, in nats and at the sampling temperature, of the C tokens that the policy
        chose."""
        batch = pack_rollouts(rollouts)
        (plan,) = plan_micro_batches(batch.lengths, 1, self.budget, packing=self.packing)
        lay_out = pack if self.packing else pad
        flat = [self._forward(lay_out(batch.select(indices), self.device)) for indices in plan]
        column = batch.scatter(np.concatenate(plan), np.concatenate(flat))
        return np.split(column, np.cumsum(batch.target_counts)[:-1])

    def _forward(self, inputs: ModelInput) -> np.ndarray:
        return self.policy(inputs)[0].float().cpu().numpy()


class ReferenceWorker(LogprobWorker):
    """The reference policy. Ray lists actors by class name, so that each role has a class."""


class TeacherWorker(LogprobWorker):
    """The teacher of on-policy distillation. At the policy's temperature, a teacher equal to the policy teaches nothing."""


def _device(gpus: float) -> torch.device:
    return torch.device("cuda" if gpus > 0 else "cpu")
