"""Accuracy of a small reward model on real human preferences, against length and bags of words.

A part of the pairs is held out by a hash of the prompt. The rest is used three times: the service trains
configs/reward-model-hh-cpu.yaml on it for each seed; a logistic regression on the words of the last answer is fitted, with a
regularisation chosen by cross-validation; and the better of the rules "longer" and "shorter" is chosen. All three order the
held-out pairs. Intervals are Wilson's, 95 %. scikit-learn is needed for the regression only:
`python -m pip install --no-deps --target build/sklearn -r requirements/benchmark-reward-model.txt`.
Usage: `python benchmarks/reward_model.py [--data pairs.jsonl] [--seeds 3] [--sklearn build/sklearn] [section.key=value …]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from common import report

from rlhf_ray.algorithms.reward_quality import longer_wins
from rlhf_ray.algorithms.statistics import Share, ordered
from rlhf_ray.config import RunConfig, load_config
from rlhf_ray.data.datasets import split_held_out
from rlhf_ray.data.labels import build_label_encoder, decided_comparisons, pack_examples
from rlhf_ray.data.limits import LengthLimit
from rlhf_ray.data.readers import Source, load
from rlhf_ray.data.records import Pair
from rlhf_ray.models.heads import SequenceScores
from rlhf_ray.models.loading import load_scalar_model, load_tokenizer
from rlhf_ray.models.reward_heads import normalisation
from rlhf_ray.rewards.model_reward import score_sequences
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.stages.run import run

CONFIG = Path(__file__).parents[1] / "configs" / "reward-model-hh-cpu.yaml"
DATA = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf-harmless" / "pairs.jsonl"
CUT_OFF, SALT = 0.3, "reward model benchmark"
STRENGTHS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
FOLDS = 5


def last(pair: Pair, side: str) -> str:
    """The text of the last turn of an answer."""
    return getattr(pair, side)[-1]["content"]


def lengths(pairs: Sequence[Pair]) -> np.ndarray:
    """int64 [pairs, 2]: characters of the chosen and of the rejected answer."""
    return np.asarray([[len(last(pair, side)) for side in ("chosen", "rejected")] for pair in pairs])


def by_length(train: Sequence[Pair], test: Sequence[Pair]) -> tuple[str, Share]:
    """The better of "longer" and "shorter" on the training pairs, and its accuracy on the others."""
    flat, numbers = lengths(train).ravel(), np.arange(2 * len(train))
    longer = longer_wins(flat, numbers[::2], numbers[1::2])
    more = lengths(test) @ (1, -1)
    return f"{'longer' if longer else 'shorter'} is better", ordered(more if longer else -more)


def by_words(train: Sequence[Pair], test: Sequence[Pair]) -> Share:
    """Logistic regression on the words that one answer has and the other does not."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import GroupKFold

    words = CountVectorizer(binary=True, min_df=2)
    words.fit([last(pair, side) for pair in train for side in ("chosen", "rejected")])

    def difference(pairs: Sequence[Pair]) -> object:
        chosen, rejected = (words.transform([last(p, side) for p in pairs]) for side in ("chosen", "rejected"))
        return (chosen - rejected).astype(float)

    half = difference(train)
    labels = np.repeat([1, 0], len(train))
    # Both orders of a pair belong to the same fold.
    folds = list(GroupKFold(FOLDS).split(labels, groups=np.tile(np.arange(len(train)), 2)))
    regression = LogisticRegressionCV(Cs=STRENGTHS, cv=folds, fit_intercept=False, max_iter=5000)
    regression.fit(vstack([half, -half]), labels)
    return ordered(difference(test) @ regression.coef_[0])


def train_model(pairs: Path, seed: int, overrides: Sequence[str], folder: Path) -> tuple[RunConfig, RunFolder]:
    """SFT and reward models on a file of pairs, through the service."""
    source = f"{{location: {json.dumps(str(pairs))}, format: pairs}}"
    config = load_config(
        CONFIG,
        [
            f"name=seed-{seed}", f"seed={seed}", f"folder={json.dumps(str(folder))}", f"data.demonstrations={source}",
            f"data.pairs={source}", *overrides,
        ],
    )  # fmt: skip
    return config, run(config)


def by_model(config: RunConfig, folder: RunFolder, test: Sequence[Pair]) -> tuple[Share, list[Share]]:
    """The accuracy of the members' mean, and of each member."""
    encoder = build_label_encoder(config.reward_model, test)
    limit = LengthLimit(config.model.build.max_positions)
    batch = pack_examples(encoder.encode(load_tokenizer(folder.reward_model), test, limit).items)
    better, worse = decided_comparisons(batch, "pairs")
    members = []
    for number in range(1, config.reward_model.members + 1):
        model = load_scalar_model(folder.reward_member(number)).eval()
        mean, std = normalisation(model.config)
        raw = score_sequences(SequenceScores(model), batch, 4096, torch.device("cpu"))
        members.append((raw - mean) / std)
    rewards = np.asarray(members)
    gains = rewards[:, better] - rewards[:, worse]
    return ordered(gains.mean(axis=0)), [ordered(gain) for gain in gains]


def first_loss(folder: RunFolder) -> float:
    """The loss of the reward model's first step."""
    return next(r["loss"] for r in read_metrics(folder.stage_metrics("reward_model")) if r.get("loss") is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.key=value of the config")
    parser.add_argument("--data", type=Path, default=DATA, help="hh-rlhf pairs, JSON lines")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sklearn", type=Path, default=Path("build/sklearn"), help="where scikit-learn is installed")
    arguments = parser.parse_args()
    sys.path.append(str(arguments.sklearn))

    pairs = load("pairs", Source(arguments.data, "hh", on_malformed="quarantine")).records
    train, test = split_held_out(pairs, lambda pair: pair.prompt, CUT_OFF, SALT)
    rule, length = by_length(train, test)
    words = by_words(train, test)
    rows: list[tuple] = [(rule, "", *shown(length)), ("bag of words, last answer", "", *shown(words))]
    record = {"train": len(train), "test": len(test), "length": asdict(length), "words": asdict(words), "model": []}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "train.jsonl"
        rows_of_train = ({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in train)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of_train))
        for seed in range(arguments.seeds):
            config, folder = train_model(file, seed, arguments.overrides, Path(place))
            model, members = by_model(config, folder, test)
            rows.append((f"reward model, {len(members)} members", seed, *shown(model)))
            record["model"].append(
                {"seed": seed, "first_loss": first_loss(folder), **asdict(model), "members": [m.value for m in members]}
            )
    report(f"{len(test)} held-out pairs", ("orders pairs by", "seed", "right", "95 % interval"), rows, record)


def shown(share: Share) -> tuple[str, str]:
    """Value and interval in per cent."""
    return f"{100 * share.value:.1f}", f"{100 * share.low:.1f} – {100 * share.high:.1f}"


if __name__ == "__main__":
    main()
