"""A reward from demonstrations (adversarial imitation): in every step the discriminator scores the batch, then learns from it.

Invariants: samples are scored before the discriminator learns from them; the demonstrations and old samples of a step depend
only on the run's seed and the step, so a resumed run is bit-exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from rlhf_ray.driver.hooks import LoopHook
from rlhf_ray.driver.training_batch import TrainingBatch
from rlhf_ray.learner.deepspeed_engine import learning_rate
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.learner.objectives import DiscriminatorDiagnostics
from rlhf_ray.learner.sharded_model import StepResult
from rlhf_ray.types import Experience, Score


@dataclass(frozen=True)
class Replay:
    """The newest samples of the policy, at most `capacity`."""

    capacity: int
    samples: Batch | None = None
    """Oldest first; None if there are none yet."""

    def __len__(self) -> int:
        return 0 if self.samples is None else len(self.samples)

    def added(self, samples: Batch) -> Replay:
        """The replay with new samples, without the oldest if there are too many."""
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
        """The replay with the samples that `save` wrote, at most as many as its capacity."""
        columns, empty = load_file(path), replace(self, samples=None)
        saved = scored_at_end(columns["token_ids"], columns["lengths"])
        return empty.added(saved) if len(saved) else empty


def scored_at_end(token_ids: np.ndarray, lengths: np.ndarray) -> Batch:
    """Sequences whose only target is their last token."""
    mask = np.zeros(len(token_ids), dtype=bool)
    mask[np.cumsum(lengths) - 1] = True
    return Batch(token_ids, lengths, mask)


def labeled_batch(demonstrations: Batch, samples: Batch) -> Batch:
    """Demonstrations (label 1) and samples (label 0) in one batch; the weights of each side add up to ½."""
    batch = demonstrations.joined(samples)
    demonstrated = np.arange(len(batch)) < len(demonstrations)
    weighted = batch.with_columns(weights=balanced_weights(demonstrated))
    return replace(weighted, labels=demonstrated.astype(np.float32)[:, None])


def discriminator_batches(
    samples: Batch, replay: Replay, replayed: int, demonstrations: Sequence[Batch], count: int, seed: Sequence[int]
) -> list[Batch]:
    """The minibatches of all passes, `count` for each.

    Args:
        samples: the current batch, at least `count` sequences.
        replay: in each pass, `replayed` older samples are drawn from it without replacement, or all if it has fewer.
        demonstrations: those of each pass, at least `count` sequences.
    """
    generator = np.random.default_rng(seed)
    result: list[Batch] = []
    for shown in demonstrations:
        order = generator.permutation(len(samples))
        drawn = generator.permutation(len(replay))[:replayed]
        deals = zip(*(np.array_split(deck, count) for deck in (order, drawn, np.arange(len(shown)))), strict=True)
        for new, old, positive in deals:
            negatives = samples.select(new)
            if replay.samples is not None and len(old):
                negatives = negatives.joined(replay.samples.select(old))
            result.append(labeled_batch(shown.select(positive), negatives))
    return result


DISCRIMINATOR = "discriminator"
"""The name of the discriminator's part of a score."""


@dataclass(frozen=True)
class DiscriminatorOutput:
    """The discriminator's scores of a batch, compared with those of as many demonstrations."""

    logits: np.ndarray
    """float32 [B]: f = log D − log(1 − D) of each sample."""
    loss: float
    """Cross-entropy; log 2 without smoothing if the discriminator knows nothing."""
    accuracy_samples: float
    accuracy_demonstrations: float
    score_gap: float
    """Mean f of demonstrations minus that of samples, nats; at the optimum, the sum of the KLs in both directions."""

    @classmethod
    def of(cls, logits: np.ndarray, demonstrations: np.ndarray, smoothing: float) -> DiscriminatorOutput:
        """Compare f of the samples with f of the demonstrations, both float32."""
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
        """Mean accuracy of samples and demonstrations, each counting half."""
        return 0.5 * (self.accuracy_samples + self.accuracy_demonstrations)


class Discriminator(LoopHook):
    """Rewards samples that look like demonstrations; the discriminator learns from the newest and some older samples."""

    phase = "discriminator"

    def __init__(
        self, config: PpoConfig, learner: LearnerGroup, demonstrations: DemonstrationSource, seed: int
    ) -> None:
        """`demonstrations`: sequences that end with an answer's last token, which is their only target."""
        assert config.discriminator is not None
        self.config, self.learner, self.demonstrations, self.seed = config, learner, demonstrations, seed
        self.settings = config.discriminator
        kept = self.settings.replay.batches if self.settings.replay else 0
        self.replayed = self.settings.replay.per_pass(config.batch_size) if self.settings.replay else 0
        self.replay = Replay(kept * config.batch_size)
        self._output: DiscriminatorOutput | None = None

    async def reward(self, experiences: Sequence[Experience], steps_done: int) -> Sequence[Experience]:
        """Score the batch and add the discriminator's part to every score."""
        self._output = await self.evaluate(experiences, steps_done)
        return self.add_reward(experiences, self._output)

    def select(self, batch: TrainingBatch) -> TrainingBatch:
        """Nothing of the batch is trained on if nothing rewards it."""
        return batch.untrained() if self._output and self.leaves_unrewarded(self._output) else batch

    async def during_update(self, experiences: Sequence[Experience], steps_done: int) -> Mapping[str, float]:
        """Learn from the batch that `reward` has scored."""
        assert self._output is not None
        return await self.learn(experiences, self._output, steps_done)

    async def evaluate(self, experiences: Sequence[Experience], steps_done: int) -> DiscriminatorOutput:
        """Score every sample, and as many of the demonstrations that this step will learn from."""
        samples = _samples(experiences)
        shown = self._shown(steps_done)[0]
        shown = shown.select(np.arange(min(len(samples), len(shown))))
        logits = await self.learner.evaluate(samples.joined(shown))
        return DiscriminatorOutput.of(logits[: len(samples)], logits[len(samples) :], self.settings.smoothing)

    def trusts(self, output: DiscriminatorOutput) -> bool:
        """Whether the discriminator is accurate enough for its scores to count as rewards."""
        return output.accuracy >= self.settings.trusted_accuracy

    def leaves_unrewarded(self, output: DiscriminatorOutput) -> bool:
        """Whether the discriminator's scores do not count and there is no other reward."""
        others = self.config.reward.has_sources or self.config.environment or self.config.teacher
        return not self.trusts(output) and not others

    def add_reward(self, experiences: Sequence[Experience], output: DiscriminatorOutput) -> list[Experience]:
        """The batch with the discriminator's part in every score; the total includes it if it is trusted."""
        parts = imitation_reward(torch.from_numpy(output.logits), self.settings.clip).tolist()
        weight = self.settings.weight if self.trusts(output) else 0.0
        return [
            replace(e, score=Score(e.score.total + weight * part, e.score.parts | {DISCRIMINATOR: part}))
            for e, part in zip(experiences, parts, strict=True)
        ]

    async def learn(
        self, experiences: Sequence[Experience], output: DiscriminatorOutput, steps_done: int
    ) -> dict[str, float]:
        """Optimizer steps until the discriminator is accurate enough; returns the metrics.

        Accuracy and loss are first those of `output`, then those of each update, which measures its batch before it steps.
        """
        samples, settings = _samples(experiences), self.settings
        shown, seed = self._shown(steps_done), (self.seed, steps_done)
        batches = discriminator_batches(samples, self.replay, self.replayed, shown, settings.minibatches, seed)
        results: list[StepResult] = []
        accuracy, loss = output.accuracy, output.loss
        while len(results) < len(batches) and not is_sufficient(accuracy, loss, settings.sufficient_accuracy):
            done, total = steps_done * len(batches) + len(results), self.config.steps * len(batches)
            rate = learning_rate(settings.optimizer, done, total)
            results.append(await self.learner.update(batches[len(results)], rate))
            diagnostics = results[-1].diagnostics
            assert isinstance(diagnostics, DiscriminatorDiagnostics)
            accuracy, loss = diagnostics.accuracy, results[-1].loss
        self.replay = self.replay.added(samples)
        return self._metrics(output, results, len(batches))

    async def save(self, folder: Path) -> None:
        """Write the old samples."""
        self.replay.save(folder / _REPLAY)

    async def restore(self, folder: Path) -> None:
        """Read the old samples."""
        self.replay = self.replay.loaded(folder / _REPLAY)

    def _shown(self, steps_done: int) -> list[Batch]:
        """The demonstrations of each pass of a step, as many as it can have samples."""
        count, epochs = self.config.batch_size + self.replayed, self.settings.epochs
        return [self.demonstrations.take((steps_done * epochs + epoch) * count, count) for epoch in range(epochs)]

    def _metrics(self, output: DiscriminatorOutput, results: Sequence[StepResult], planned: int) -> dict[str, float]:
        metrics = {
            "discriminator/loss": output.loss,
            "discriminator/accuracy": output.accuracy,
            "discriminator/accuracy_demonstrations": output.accuracy_demonstrations,
            "discriminator/score_gap": output.score_gap,
            "discriminator/trusted": float(self.trusts(output)),
            "discriminator/skipped": 1.0 - len(results) / planned,
        }
        if results:
            metrics["discriminator/grad_norm"] = float(np.mean([result.grad_norm for result in results]))
            metrics["discriminator/learning_rate"] = results[-1].learning_rate
        return metrics


_REPLAY = "discriminator_replay.safetensors"


def _samples(experiences: Sequence[Experience]) -> Batch:
    """Responses scored at their last token; of an episode, the last turn as a response to everything before it."""
    batch = pack_rollouts([experience.rollout.final_turn for experience in experiences])
    return scored_at_end(batch.token_ids, batch.lengths)
