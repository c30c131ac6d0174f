"""What the rows of a reward model's head mean and how they are combined to one reward; stored in the model's `config.json`.

A reward model is a sequence-classification folder. Its labels (`id2label`) are its aspects (`reward` if there is only one), then
for each annotator group its offsets to them: `group:<name>`, or `group:<name>/<aspect>` with several aspects. A *reading* is the
consensus r_0, a group's r_0 + δ_g, or the mean over groups.

Invariants: every reading is linear in the rows, so a frozen reward model or a value model needs only one row; any folder with a
single label can be read as a reward model.
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
"""The name of the reading that is the mean over all groups. It is reserved: no group can have it."""
SMALLEST_STD = 1e-6
"""The smallest std of rewards that a normalisation divides by."""
_GROUP = "group:"
_ON = "reward_normalised_on"


class RewardModelMismatch(InputError, ValueError):
    """A folder holds no reward model, or not the requested reading."""


@dataclass(frozen=True)
class RewardHeads:
    """The rows of a head: A aspects, then A rows for each of G groups."""

    weights: Mapping[str, float]
    """Aspect to its weight in the reward, in the order of the rows."""
    groups: tuple[str, ...] = ()
    """The groups that have an offset δ."""

    @property
    def names(self) -> tuple[str, ...]:
        """The labels of the rows."""
        aspects = tuple(self.weights)
        rest = [_GROUP + g + (f"/{a}" if len(aspects) > 1 else "") for g in self.groups for a in aspects]
        return (*aspects, *rest)

    def __len__(self) -> int:
        return len(self.weights) * (1 + len(self.groups))

    @property
    def readings(self) -> tuple[str | None, ...]:
        """The names of the readings; None is the consensus."""
        return (None, *self.groups, MEAN_OF_GROUPS) if self.groups else (None,)

    def coefficients(self, reading: str | None = None) -> np.ndarray:
        """The coefficients of the rows' outputs in the reward: float32 [rows].

        Raises:
            RewardModelMismatch: the model has no such reading.
        """
        if reading not in self.readings:
            raise RewardModelMismatch(
                f"the reward model has no annotator group {reading!r}; it has "
                + (", ".join(name for name in self.readings if name is not None) or "none")
            )
        shares = np.zeros(1 + len(self.groups))
        shares[0] = 1.0
        if reading == MEAN_OF_GROUPS:
            shares[1:] = 1.0 / len(self.groups)
        elif reading is not None:
            shares[1 + self.groups.index(reading)] = 1.0
        return np.outer(shares, list(self.weights.values())).ravel().astype(np.float32)

    def write(self, config: PreTrainedConfig, outputs: np.ndarray) -> None:
        """Write the names of the rows and each reading's mean and std over reference samples into the config.

        Args:
            outputs: float [n, rows], the rows' outputs for the samples.
        """
        _name_rows(config, self.names, list(self.weights.values()))
        statistics = {reading: _mean_and_std(outputs @ self.coefficients(reading)) for reading in self.readings}
        config.reward_mean, config.reward_std = statistics.pop(None)
        config.reward_groups = {name: {"mean": mean, "std": std} for name, (mean, std) in statistics.items()}

    def join(self, config: PreTrainedConfig, reading: str | None) -> np.ndarray:
        """Change the config to that of a single row, with the normalisation of the reading; returns `coefficients(reading)`."""
        coefficients = self.coefficients(reading)
        noted = getattr(config, "reward_groups", {}).get(reading)
        if reading is not None and noted is not None:
            config.reward_mean, config.reward_std = noted["mean"], noted["std"]
        config.reward_groups = {}
        _name_rows(config, ("reward",), [1.0])
        return coefficients

    @classmethod
    def read(cls, config: PreTrainedConfig) -> RewardHeads:
        """The rows of a folder's head.

        Raises:
            RewardModelMismatch: there are several labels, and no weights to combine them to one reward.
        """
        names = [config.id2label[row] for row in range(config.num_labels)]
        aspects = [name for name in names if not name.startswith(_GROUP)]
        weights = getattr(config, "reward_weights", [1.0] if len(aspects) == 1 else None)
        if weights is None or len(weights) != len(aspects):
            raise RewardModelMismatch(
                f"{config.name_or_path!r} has the labels {', '.join(aspects)}; its config.json must have reward_weights, "
                "one number for each, to combine them to one reward"
            )
        suffix = f"/{aspects[0]}" if len(aspects) > 1 else ""
        rows = names[len(aspects) :: len(aspects)]
        return cls(dict(zip(aspects, weights, strict=True)), tuple(r[len(_GROUP) :].removesuffix(suffix) for r in rows))


def normalisation(config: PreTrainedConfig) -> tuple[float, float]:
    """Mean and std of the reward on reference samples; (0, 1) if the config has none."""
    return float(getattr(config, "reward_mean", 0.0)), float(getattr(config, "reward_std", 1.0))


def normalised_on(folder: Path, reading: str | None) -> str | None:
    """The samples that `renormalise` used; None if the normalisation is still that of the training."""
    return _normalisation_of(json.loads((folder / CONFIG_NAME).read_text()), reading).get(_ON)


def renormalise(folder: Path, reading: str | None, mean: float, std: float, samples: str) -> None:
    """Write a new normalisation of a reading into a reward model's `config.json`.

    Args:
        mean, std: mean and std of the raw reward on the samples.
        samples: a description of the samples.
    """
    config = json.loads((folder / CONFIG_NAME).read_text())
    noted = _normalisation_of(config, reading)
    mean_key, std_key = ("reward_mean", "reward_std") if reading is None else ("mean", "std")
    noted |= {mean_key: mean, std_key: max(std, SMALLEST_STD), _ON: samples}
    atomic_write(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def _normalisation_of(config: dict, reading: str | None) -> dict:
    """The part of a `config.json` that holds the normalisation of a reading."""
    return config if reading is None else config.setdefault("reward_groups", {}).setdefault(reading, {})


def _name_rows(config: PreTrainedConfig, names: Sequence[str], weights: list[float]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: row for row, name in config.id2label.items()}
    config.reward_weights = weights


def _mean_and_std(rewards: np.ndarray) -> tuple[float, float]:
    return float(rewards.mean()), float(max(rewards.std(), SMALLEST_STD))
