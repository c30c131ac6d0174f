"""The actors: `RewardWorker` says how good rollouts are, `ReferenceWorker` how likely the frozen policy finds them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlhf_ray.batch import PaddedBatch, pad
from rlhf_ray.config.scoring import RewardConfig, ScorerConfig
from rlhf_ray.learner.planning import plan_micro_batches
from rlhf_ray.models.heads import TokenLogprobs
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer
from rlhf_ray.scoring.sources import RewardError, build_sources, sequences
from rlhf_ray.types import Rollout, Score


def _device(gpus: float) -> torch.device:
    return torch.device("cuda" if gpus > 0 else "cpu")


class RewardWorker:
    """All sources of reward, in one actor."""

    def __init__(self, config: RewardConfig, model_path: str | None, tokenizer_path: str) -> None:
        torch.set_num_threads(config.workers.threads)
        tokenizer = load_tokenizer(tokenizer_path)
        self.sources = build_sources(config, model_path, tokenizer, _device(config.workers.gpus))

    def score(self, rollouts: Sequence[Rollout]) -> list[Score | RewardError]:
        """One answer per rollout: a score, or why there is none.

        A failing source costs only the rollouts it named; the others are asked for again without them.
        """
        failures: dict[str, RewardError] = {}
        rest = list(rollouts)
        while rest:
            try:
                scores = self._score(rest)
                break
            except RewardError as error:
                failures |= dict.fromkeys(error.rollout_ids, error)
                rest = [r for r in rest if r.id not in failures]
        answers = failures | {r.id: s for r, s in zip(rest, scores if rest else [], strict=True)}
        return [answers[r.id] for r in rollouts]

    def _score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        parts = {source.name: source.score(rollouts) for source in self.sources}
        total = sum(source.weight * parts[source.name] for source in self.sources)
        return [
            Score(float(total[i]), {name: float(values[i]) for name, values in parts.items()})
            for i in range(len(rollouts))
        ]


class ReferenceWorker:
    """The policy that training started from, frozen."""

    def __init__(self, config: ScorerConfig, model_path: str, temperature: float) -> None:
        torch.set_num_threads(config.workers.threads)
        self.device = _device(config.workers.gpus)
        self.budget = config.micro_batch_tokens
        model = load_causal_lm(model_path, config.dtype, config.attention).eval().to(self.device)
        self.policy = TokenLogprobs(model, temperature)

    @torch.inference_mode()
    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """float32 [T] per rollout: log-probabilities of its tokens, in nats, at the sampling temperature."""
        batch = sequences(rollouts)
        plan = plan_micro_batches(batch.lengths, 1, self.budget).micro_batches[0]
        flat = [self._forward(pad(batch.select(indices), self.device)) for indices in plan]
        column = batch.scatter(np.concatenate(plan), np.concatenate(flat))
        return np.split(column, np.cumsum(batch.target_counts)[:-1])

    def _forward(self, padded: PaddedBatch) -> np.ndarray:
        return self.policy(padded)[0].float().cpu().numpy()
