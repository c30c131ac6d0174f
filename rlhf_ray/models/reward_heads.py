"""What the rows of a reward model's head mean, and how they make one reward: written in, and read from, its `config.json`.

A reward model is a sequence-classification folder whose labels (`id2label`) are its aspects (`reward` where there is only
one), then for each annotator group what it adds to them: `group:<name>`, or `group:<name>/<aspect>` of several aspects.
Invariants: every reading of a model, the consensus r_0, a group's r_0 + δ_g or the mean over groups, is linear in the rows,
so a frozen reader or a value model needs a single one; a folder of somebody else with one label is read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from rlhf_ray.errors import InputError
from rlhf_ray.runs.run_folder import atomic_write

MEAN_OF_GROUPS = "mean"
"""The name of the reading that is the mean over all groups; no group can have it."""
SMALLEST_STD = 1e-6
"""Of rewards, to divide by."""
_GROUP = "group:"
_ON = "reward_normalised_on"


class RewardModelMismatch(InputError, ValueError):
    """A reward model's folder does not hold what is asked of it."""


@dataclass(frozen=True)
class RewardHeads:
    """The rows of a head: A aspects, and A more for each of G groups."""

    weights: Mapping[str, float]
    """Aspect to factor in the reward, in the order of the rows."""
    groups: tuple[str, ...] = ()
    """Those with a δ of their own."""

    @property
    def names(self) -> tuple[str, ...]:
        """Labels of the rows."""
        aspects = tuple(self.weights)
        rest = [_GROUP + g + (f"/{a}" if len(aspects) > 1 else "") for g in self.groups for a in aspects]
        return (*aspects, *rest)

    def __len__(self) -> int:
        return len(self.weights) * (1 + len(self.groups))

    @property
    def readings(self) -> tuple[str | None, ...]:
        """What can be asked for; the first is None, the consensus."""
        return (None, *self.groups, MEAN_OF_GROUPS) if self.groups else (None,)

    def coefficients(self, reading: str | None = None) -> np.ndarray:
        """float32 [rows]: the reward is their product with the rows' outputs.

        Raises:
            RewardModelMismatch: the model has no such group.
        """
        if reading not in self.readings:
            raise RewardModelMismatch(
                f"the reward model has no annotator group {reading!r}; it has "
                + (", ".join(self.readings[1:]) or "none")
            )
        shares = np.zeros(1 + len(self.groups))
        shares[0] = 1.0
        if reading == MEAN_OF_GROUPS:
            shares[1:] = 1.0 / len(self.groups)
        elif reading is not None:
            shares[1 + self.groups.index(reading)] = 1.0
        return np.outer(shares, list(self.weights.values())).ravel().astype(np.float32)

    def write(self, config: PreTrainedConfig, outputs: np.ndarray) -> None:
        """Name the rows, and note what makes each reading's mean 0 and std 1 over some reference samples.

        Args:
            outputs: float [n, rows], of the samples.
        """
        _name_rows(config, self.names, list(self.weights.values()))
        statistics = {reading: _mean_and_std(outputs @ self.coefficients(reading)) for reading in self.readings}
        config.reward_mean, config.reward_std = statistics.pop(None)
        config.reward_groups = {name: {"mean": mean, "std": std} for name, (mean, std) in statistics.items()}

    def join(self, config: PreTrainedConfig, reading: str | None) -> np.ndarray:
        """`coefficients(reading)`; the config is made that of the one row which they give, with its normalisation."""
        coefficients = self.coefficients(reading)
        noted = getattr(config, "reward_groups", {}).get(reading)
        if reading is not None and noted is not None:
            config.reward_mean, config.reward_std = noted["mean"], noted["std"]
        config.reward_groups = {}
        _name_rows(config, ("reward",), [1.0])
        return coefficients

    @classmethod
    def read(cls, config: PreTrainedConfig) -> RewardHeads:
        """The rows of a folder.

        Raises:
            RewardModelMismatch: several labels, and nothing says how they make one reward.
        """
        names = [config.id2label[row] for row in range(config.num_labels)]
        aspects = [name for name in names if not name.startswith(_GROUP)]
        weights = getattr(config, "reward_weights", [1.0] if len(aspects) == 1 else None)
        if weights is None or len(weights) != len(aspects):
            raise RewardModelMismatch(
                f"{config.name_or_path!r} has the labels {', '.join(aspects)}; its config.json must have reward_weights, "
                "one number for each, to make one reward of them"
            )
        suffix = f"/{aspects[0]}" if len(aspects) > 1 else ""
        rows = names[len(aspects) :: len(aspects)]
        return cls(dict(zip(aspects, weights, strict=True)), tuple(r[len(_GROUP) :].removesuffix(suffix) for r in rows))


def normalisation(config: PreTrainedConfig) -> tuple[float, float]:
    """Mean and std of the reward on reference samples; (0, 1) for a model that does not say."""
    return float(getattr(config, "reward_mean", 0.0)), float(getattr(config, "reward_std", 1.0))


def normalised_on(folder: Path, reading: str | None) -> str | None:
    """Which samples `renormalise` took the folder's normalisation from; None: it is that of the model's training."""
    return _noted(json.loads((folder / CONFIG_NAME).read_text()), reading).get(_ON)


def renormalise(folder: Path, reading: str | None, mean: float, std: float, samples: str) -> None:
    """Write another normalisation of a reading into a reward model's `config.json`.

    Args:
        mean, std: of the raw reward on the samples.
        samples: what these are, in words.
    """
    config = json.loads((folder / CONFIG_NAME).read_text())
    noted = _noted(config, reading)
    mean_key, std_key = ("reward_mean", "reward_std") if reading is None else ("mean", "std")
    noted |= {mean_key: mean, std_key: max(std, SMALLEST_STD), _ON: samples}
    atomic_write(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def _noted(config: dict, reading: str | None) -> dict:
    """Where a `config.json` says of a reading what its mean is."""
    return config if reading is None else config.setdefault("reward_groups", {}).setdefault(reading, {})


def _name_rows(config: PreTrainedConfig, names: Sequence[str], weights: list[float]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: row for row, name in config.id2label.items()}
    config.reward_weights = weights


def _mean_and_std(rewards: np.ndarray) -> tuple[float, float]:
    return float(rewards.mean()), float(max(rewards.std(), SMALLEST_STD))
