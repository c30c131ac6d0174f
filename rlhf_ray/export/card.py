"""The model card: training data, evaluation, and known limits.

Invariants: every figure is read from a file of the run; every limit that the run's figures show is named, and so is what was not
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from rlhf_ray.report.reader import Content, read_content
from rlhf_ray.runs.run_folder import RunFolder

TEMPLATE = Path(__file__).with_name("card.md.jinja")
MUCH_LONGER = 1.25
"""Ratio to the length of SFT's responses above which the card warns."""
POORLY_CALIBRATED = 0.1
"""Expected calibration error above which the card warns."""


def model_card(folder: RunFolder, what: str) -> ModelCard:
    """The model card of a run's model.

    Args:
        what: `policy`, `sft` or `reward_model`.
    """
    run = read_content(folder)
    config = yaml.safe_load(run.config) if run.config else {}
    task = "text-classification" if what == "reward_model" else "text-generation"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["rlhf", "reward-model" if what == "reward_model" else "conversational"],
        base_model=_base(config),
        model_name=folder.name,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=folder.name,
        what=what,
        stages=config.get("stages", []),
        sources=dict(sources(config)),
        steps=run.stages["ppo"].last_step,
        evaluation=run.evaluation if what == "policy" else None,
        quality=run.reward_quality if what == "reward_model" else None,
        limits=list(limits(run, what)),
        config=run.config or "",
    )


def sources(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kind and location of the data in a run's config."""
    data = config.get("data", {})
    if data.get("simulate"):
        yield "everything", "simulated customers and annotators with a hidden utility (rlhf_ray.data.simulator)"
        return
    for kind in ("demonstrations", "pairs", "rankings", "scores", "edits", "prompts"):
        if source := data.get(kind):
            yield kind, source["location"]


def limits(run: Content, what: str) -> Iterator[str]:
    """Sentences about what the figures do not show."""
    if what == "reward_model":
        yield from _limits_of_rewards(run.reward_quality)
        return
    evaluation = run.evaluation
    if what == "sft" or evaluation is None:
        yield "It was trained on demonstrations only." if what == "sft" else "It was not evaluated."
        return
    if evaluation.get("win_rate_vs_sft") is None:
        yield "It was evaluated only by the reward that it was trained on: human preference was not measured."
    else:
        yield "Its win rate is judged by a utility function, not by people."
    lengths = evaluation["length"]
    if lengths.get("ppo") and lengths.get("sft") and lengths["ppo"] > MUCH_LONGER * lengths["sft"]:
        yield f"Its responses are {lengths['ppo'] / lengths['sft']:.1f} times as long as before; the reward may favour length."
    if run.reward_quality is not None:
        yield from _limits_of_rewards(run.reward_quality)


def _limits_of_rewards(quality: Mapping[str, Any] | None) -> Iterator[str]:
    if quality is None:
        yield "The agreement of the reward model with people was not measured."
        return
    accuracy, length = quality["accuracy"], quality["length_baseline"]
    yield (
        f"The reward model agrees with people on {accuracy['value']:.1%} of held-out comparisons "
        f"({accuracy['low']:.1%}–{accuracy['high']:.1%} of {accuracy['count']})."
    )
    if length["high"] >= accuracy["low"]:
        yield f"Choosing the longer response agrees on {length['value']:.1%}: the reward model may know no more than length."
    if quality["expected_calibration_error"] > POORLY_CALIBRATED:
        yield f"Its confidence is off by {quality['expected_calibration_error']:.0%} on average."


def _base(config: Mapping[str, Any]) -> str | None:
    path = (config.get("model") or {}).get("path")
    return path if path and not Path(path).is_absolute() else None
