"""The actors: `RewardWorker` says how good rollouts are, `ReferenceWorker` how likely the frozen policy finds them."""

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
from rlhf_ray.rewards.http import Keys, Usage
from rlhf_ray.rewards.model_reward import EnsembleScore, ModelReward
from rlhf_ray.rewards.sources import RewardSource, build_sources
from rlhf_ray.runs.storage.folders import fetch
from rlhf_ray.runs.storage.location import local
from rlhf_ray.types import Rollout, Score


def _device(gpus: float) -> torch.device:
    return torch.device("cuda" if gpus > 0 else "cpu")


class RewardWorker:
    """All sources of reward, in one actor. Calls from several threads wait for services at the same time."""

    def __init__(
        self,
        config: RewardConfig,
        model_paths: Sequence[str],
        tokenizer_path: str,
        keys: Keys | None = None,
        folder: str = ".",
    ) -> None:
        """`model_paths`: of reward models; `keys`: of the services, by the names of their variables; `folder`: of the run."""
        torch.set_num_threads(config.workers.threads)
        tokenizer, device = load_tokenizer(fetch(tokenizer_path)), _device(config.workers.gpus)
        folders = tuple(map(fetch, model_paths))
        self.sources = build_sources(config, folders, tokenizer, device, keys or {}, local(folder))
        self._here = threading.Lock()

    def score(self, rollouts: Sequence[Rollout]) -> list[Score | RewardError]:
        """One answer per rollout: a score, or why there is none. A failing source costs the rollouts that it fails on.

        Of an episode the last turn is scored, as a response to all that was said before it.
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
        """float64 [K] for each rollout: what the K reward models say of it, not normalised."""
        with self._here:
            return list(self._model_reward.raw([rollout.final_turn for rollout in rollouts]).T)

    def normalise(self, statistics: Sequence[tuple[float, float]]) -> None:
        """Normalise the reward models by these means and standard deviations from now on."""
        with self._here:
            self._model_reward.normalise(statistics)

    @property
    def _model_reward(self) -> ModelReward:
        return next(source for source in self.sources if isinstance(source, ModelReward))

    def usage(self) -> dict[str, Usage]:
        """What each service was asked for since the last call."""
        return {source.name: source.meter.take() for source in self.sources if source.remote}

    def _ask(self, source: RewardSource, rollouts: Sequence[Rollout]) -> Sequence[float | EnsembleScore | RewardError]:
        if not rollouts:
            return []
        if source.remote:
            return source.score(rollouts)
        with self._here:
            return source.score(rollouts)

    def _total(self, parts: dict[str, float]) -> Score:
        return Score(sum(source.weight * parts[source.name] for source in self.sources), parts)


class ReferenceWorker:
    """The policy that training started from, frozen."""

    def __init__(self, config: ScorerConfig, model_path: str, temperature: float) -> None:
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
        (plan,) = plan_micro_batches(batch.lengths, 1, self.budget, packing=self.packing).micro_batches
        lay_out = pack if self.packing else pad
        flat = [self._forward(lay_out(batch.select(indices), self.device)) for indices in plan]
        column = batch.scatter(np.concatenate(plan), np.concatenate(flat))
        return np.split(column, np.cumsum(batch.target_counts)[:-1])

    def _forward(self, inputs: ModelInput) -> np.ndarray:
        return self.policy(inputs)[0].float().cpu().numpy()


class TeacherWorker(ReferenceWorker):
    """A frozen model with the policy's tokenizer, at the policy's sampling temperature.

    At the same temperature, so that a teacher that is the policy has nothing to teach.
    """


Answer = TypeVar("Answer")


class ScoringPool(Generic[Answer]):
    """Workers that answer one value per rollout."""

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
        """The answers, in order."""
        return await self.ask(self.method, rollouts)

    async def ask(self, method: str, rollouts: Sequence[Rollout]) -> list[Any]:
        """What a worker says of the rollouts by another of its methods, in order."""
        index = self.outstanding.index(min(self.outstanding))
        tokens = sum(len(r.prompt.token_ids) + len(r) for r in rollouts)
        self.outstanding[index] += tokens
        try:
            return await getattr(self.workers[index], method).remote(list(rollouts))
        finally:
            self.outstanding[index] -= tokens

    async def ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """What every worker answers to the same call."""
        return await asyncio.gather(*(getattr(worker, method).remote(*arguments) for worker in self.workers))

    def close(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
