"""A reward from demonstrations: in every step the discriminator judges the batch, and then learns from it.

Invariants: samples are judged before anything is learned from them; which demonstrations and old samples a step sees is a
function of the run's seed and the step, so a resumed run is bit-exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from rlhf_ray.algorithms.adversarial import (
    balanced_weights,
    discriminator_accuracy,
    discriminator_loss,
    imitation_reward,
    is_sufficient,
)
from rlhf_ray.batch import Batch, pack_rollouts
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.driver.extras.ptx import DemonstrationSource
from rlhf_ray.learner.deepspeed_engine import learning_rate
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.types import Experience, Score


@dataclass(frozen=True)
class Replay:
    """The newest samples, at most `capacity` of them."""

    capacity: int
    samples: Batch | None = None
    """Oldest first; None: there are none yet."""

    def __len__(self) -> int:
        return 0 if self.samples is None else len(self.samples)

    def added(self, samples: Batch) -> Replay:
        """With a batch of new ones, without the oldest that have no room."""
        everything = samples if self.samples is None else self.samples.joined(samples)
        kept = np.arange(max(0, len(everything) - self.capacity), len(everything))
        return replace(self, samples=everything.select(kept))

    def save(self, path: Path) -> None:
        """Write token ids and lengths as safetensors."""
        token_ids, lengths = (
            (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64))
            if self.samples is None
            else (self.samples.token_ids, self.samples.lengths)
        )
        save_file({"token_ids": token_ids, "lengths": lengths}, path)

    def loaded(self, path: Path) -> Replay:
        """With the samples that `save` wrote, as many as this one has room for."""
        columns, empty = load_file(path), replace(self, samples=None)
        saved = scored_at_end(columns["token_ids"], columns["lengths"])
        return empty.added(saved) if len(saved) else empty


def scored_at_end(token_ids: np.ndarray, lengths: np.ndarray) -> Batch:
    """Sequences whose only target is their last token."""
    mask = np.zeros(len(token_ids), dtype=bool)
    mask[np.cumsum(lengths) - 1] = True
    return Batch(token_ids, lengths, mask)


def told_apart(demonstrations: Batch, samples: Batch) -> Batch:
    """Both in one batch, with labels and with weights by which each side counts half."""
    batch = demonstrations.joined(samples)
    demonstrated = np.arange(len(batch)) < len(demonstrations)
    weighted = batch.with_columns(weights=balanced_weights(demonstrated))
    return replace(weighted, labels=demonstrated.astype(np.float32)[:, None])


def discriminator_batches(
    samples: Batch, replay: Replay, replayed: int, demonstrations: Sequence[Batch], count: int, seed: Sequence[int]
) -> list[Batch]:
    """`count` batches for each pass, one after another.

    Args:
        samples: the batch's, at least `count`.
        replay: where `replayed` older ones are drawn from without replacement in each pass, or all there are.
        demonstrations: of each pass, at least `count`.
    """
    generator, result = np.random.default_rng(seed), []
    for shown in demonstrations:
        order = generator.permutation(len(samples))
        drawn = generator.permutation(len(replay))[:replayed]
        deals = zip(*(np.array_split(deck, count) for deck in (order, drawn, np.arange(len(shown)))), strict=True)
        for new, old, positive in deals:
            negatives = samples.select(new)
            if len(old):
                negatives = negatives.joined(replay.samples.select(old))
            result.append(told_apart(shown.select(positive), negatives))
    return result


DISCRIMINATOR = "discriminator"
"""Name of the part of a score that the discriminator gives."""


@dataclass(frozen=True)
class DiscriminatorOutput:
    """How well a batch's samples are told from as many demonstrations."""

    logits: np.ndarray
    """float32 [B]: f of each sample."""
    loss: float
    """log 2 for a discriminator that knows nothing, without smoothing."""
    accuracy_samples: float
    accuracy_demonstrations: float
    score_gap: float
    """Mean f of the demonstrations less that of the samples, nats; at the optimum the sum of both KLs between their densities."""

    @classmethod
    def of(cls, logits: np.ndarray, demonstrations: np.ndarray, smoothing: float) -> DiscriminatorOutput:
        """From f of the samples and of demonstrations, float32."""
        both = torch.from_numpy(np.concatenate([demonstrations, logits]))
        side = np.arange(len(both)) < len(demonstrations)
        demonstrated = torch.from_numpy(side)
        losses, right = discriminator_loss(both, demonstrated, smoothing), discriminator_accuracy(both, demonstrated)
        return cls(
            logits,
            float((losses * torch.from_numpy(balanced_weights(side))).sum()),
            float(right[~demonstrated].mean()),
            float(right[demonstrated].mean()),
            float(demonstrations.mean() - logits.mean()),
        )

    @property
    def accuracy(self) -> float:
        """Of both sides, each counting half."""
        return 0.5 * (self.accuracy_samples + self.accuracy_demonstrations)


class Discriminator:
    """The discriminator's learner, what it is shown, and the old samples it is reminded of."""

    def __init__(
        self, config: PpoConfig, learner: LearnerGroup, demonstrations: DemonstrationSource, seed: int
    ) -> None:
        """`demonstrations`: whole sequences that end with the answer's last token, their only target."""
        self.config, self.learner, self.demonstrations, self.seed = config, learner, demonstrations, seed
        self.settings = config.discriminator
        kept = self.settings.replay.batches if self.settings.replay else 0
        self.replayed = self.settings.replay.per_pass(config.batch_size) if self.settings.replay else 0
        self.replay = Replay(kept * config.batch_size)

    async def judge(self, experiences: Sequence[Experience], step: int) -> DiscriminatorOutput:
        """f = log D − log(1 − D) of every sample, and of as many of the demonstrations that step `step` will learn from."""
        samples = _samples(experiences)
        shown = self._shown(step)[0]
        shown = shown.select(np.arange(min(len(samples), len(shown))))
        logits = await self.learner.evaluate(samples.joined(shown))
        return DiscriminatorOutput.of(logits[: len(samples)], logits[len(samples) :], self.settings.smoothing)

    def trusts(self, judgement: DiscriminatorOutput) -> bool:
        """Whether the discriminator tells the two sides apart well enough to reward anybody."""
        return judgement.accuracy >= self.settings.trusted_accuracy

    def policy_waits(self, judgement: DiscriminatorOutput) -> bool:
        """Whether nothing at all rewards the batch."""
        others = self.config.reward.has_sources or self.config.environment or self.config.teacher
        return not self.trusts(judgement) and not others

    def rewarded(self, experiences: Sequence[Experience], judgement: DiscriminatorOutput) -> list[Experience]:
        """The batch with the discriminator's part in every score; it counts in the total where it is trusted."""
        parts = imitation_reward(torch.from_numpy(judgement.logits), self.settings.clip).tolist()
        weight = self.settings.weight if self.trusts(judgement) else 0.0
        return [
            replace(e, score=Score(e.score.total + weight * part, e.score.parts | {DISCRIMINATOR: part}))
            for e, part in zip(experiences, parts, strict=True)
        ]

    async def learn(
        self, experiences: Sequence[Experience], judgement: DiscriminatorOutput, step: int
    ) -> dict[str, float]:
        """The optimizer steps of PPO step `step`, as long as the discriminator is not accurate enough; the metrics.

        Whether one more is needed is read off the judgement, then off each update, which measures its batch before it steps.
        """
        samples, settings = _samples(experiences), self.settings
        shown, seed = self._shown(step), (self.seed, step)
        batches = discriminator_batches(samples, self.replay, self.replayed, shown, settings.minibatches, seed)
        results: list[StepResult] = []
        accuracy, loss = judgement.accuracy, judgement.loss
        while len(results) < len(batches) and not is_sufficient(accuracy, loss, settings.sufficient_accuracy):
            done, total = step * len(batches) + len(results), self.config.steps * len(batches)
            rate = learning_rate(settings.optimizer, done, total)
            results.append(await self.learner.update(batches[len(results)], rate))
            accuracy, loss = results[-1].diagnostics.accuracy, results[-1].loss
        self.replay = self.replay.added(samples)
        return self._metrics(judgement, results, len(batches))

    async def save(self, folder: Path) -> None:
        """Write the learner's state and the old samples below `folder`."""
        await self.learner.save_checkpoint(folder / "discriminator_learner")
        self.replay.save(folder / _REPLAY)

    async def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        await self.learner.load_checkpoint(folder / "discriminator_learner")
        self.replay = self.replay.loaded(folder / _REPLAY)

    def _shown(self, step: int) -> list[Batch]:
        """The demonstrations of each pass of a step, as many as there may be samples beside them."""
        count, epochs = self.config.batch_size + self.replayed, self.settings.epochs
        return [self.demonstrations.take((step * epochs + epoch) * count, count) for epoch in range(epochs)]

    def _metrics(self, judgement: DiscriminatorOutput, results: Sequence[StepResult], planned: int) -> dict[str, float]:
        metrics = {
            "discriminator/loss": judgement.loss,
            "discriminator/accuracy": judgement.accuracy,
            "discriminator/accuracy_demonstrations": judgement.accuracy_demonstrations,
            "discriminator/score_gap": judgement.score_gap,
            "discriminator/trusted": float(self.trusts(judgement)),
            "discriminator/skipped": 1.0 - len(results) / planned,
        }
        if results:
            metrics["discriminator/grad_norm"] = float(np.mean([result.grad_norm for result in results]))
            metrics["discriminator/learning_rate"] = results[-1].learning_rate
        return metrics


_REPLAY = "discriminator_replay.safetensors"


def _samples(experiences: Sequence[Experience]) -> Batch:
    """Of an episode the last turn, as a response to all that was said before it."""
    batch = pack_rollouts([experience.rollout.final_turn for experience in experiences])
    return scored_at_end(batch.token_ids, batch.lengths)
