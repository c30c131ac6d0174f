"""The config file that `rlhf-ray init` writes: from a model, data and rewards to commented YAML.

Invariant: `load_config` accepts every file that `starter_config` returns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.data.formats import PARSERS, detect_format
from rlhf_ray.data.records import Scored
from rlhf_ray.data.rows import DataError, Row, load_rows
from rlhf_ray.errors import InputError
from rlhf_ray.models.loading import check_model_folder, context_of

TINY, SIMULATE, REWARD_MODEL = "tiny", "simulate", "model"
"""Answers that are not a path or a function."""
_KINDS = ("rankings", "pairs", "scores", "demonstrations", "prompts")
"""A file's main content is the first of these that its format contains; pairs, for example, also contain prompts."""
_FEEDBACK = ("pairs", "rankings", "scores")
_SIMULATED = "{demonstrations: 4400, pairs: 16000, held_out_pairs: 1000, prompts: 4000, held_out_prompts: 256}"
_TINY = "{architecture: llama, vocab_size: 768, hidden_size: 128, layers: 3, heads: 4, kv_heads: 4, max_positions: 512}"


class StarterError(InputError, ValueError):
    """The answers do not make a config."""


@dataclass(frozen=True)
class Answers:
    """What `rlhf-ray init` asks for."""

    name: str
    """Name of the run."""
    model: str
    """A Hugging Face folder, or `tiny`."""
    data: tuple[str, ...]
    """Data files, or `simulate`."""
    rewards: tuple[str, ...]
    """`model`, a function `module:name`, or both."""


@dataclass(frozen=True)
class _Sources:
    """The data file of each section of `data`."""

    by_kind: dict[str, str]
    aspects: tuple[str, ...] = ()
    """Aspects of the scores, if there are scores."""

    @property
    def feedback(self) -> str | None:
        """The kind of feedback that the reward model learns from."""
        return next((kind for kind in _FEEDBACK if kind in self.by_kind), None)


def starter_config(answers: Answers, schema: str | None = None) -> str:
    """The text of the config.

    Args:
        schema: path or URL of the JSON schema that editors use; None leaves the header line out.

    Raises:
        StarterError, DataError, NotAModel, FileNotFoundError: an answer cannot be used, or the answers do not fit together.
    """
    tiny, simulated = answers.model == TINY, SIMULATE in answers.data
    if not tiny:
        check_model_folder(answers.model, "--model")
    context = 512 if tiny else min(1024, context_of(answers.model))
    if simulated and len(answers.data) > 1:
        raise StarterError("--data simulate generates all data; leave the data files out, or leave simulate out")
    sources = _Sources({}) if simulated else _sources(answers.data)
    functions = [reward for reward in answers.rewards if reward != REWARD_MODEL]
    learned = REWARD_MODEL in answers.rewards
    _check(answers, simulated, sources, functions, learned)
    sft = simulated or "demonstrations" in sources.by_kind
    stages = [*["sft"] * sft, *["reward_model"] * learned, "ppo", "evaluation"]
    header = [f"# yaml-language-server: $schema={schema}"] if schema else []
    header += [
        "# Written by `rlhf-ray init`. `rlhf-ray config docs KEY` explains a key, for example ppo.rollout.sampling.",
        f"name: {answers.name}",
        "seed: 0",
        f"stages: [{', '.join(stages)}]",
    ]
    sections = [header, _model(answers.model), _data(sources, context)]
    if sft:
        sections.append(_supervised("sft", "Supervised fine-tuning on the demonstrations.", "3e-3" if tiny else "1e-5"))
    if learned:
        sections.append(_reward_model(sources, tiny))
    sections.append(_ppo(functions, learned, tiny, context))
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _sources(files: Sequence[str]) -> _Sources:
    """Which file serves which section: a file whose main content is of that kind, else one that also contains it."""
    main: dict[str, str] = {}
    also: dict[str, str] = {}
    aspects: tuple[str, ...] = ()
    for file in files:
        row = _first_row(file)
        try:
            format = detect_format(row.value)
            own, *others = (kind for kind in _KINDS if format in PARSERS[kind])
            record = PARSERS[own][format](row.value)
        except ValueError as error:
            raise DataError(f"{file}, {row.unit} {row.number}: {error}") from error
        if own in main:
            raise StarterError(f"{main[own]} and {file} both contain {own}; data.{own} takes one file, so join them")
        main[own] = file
        for kind in {"demonstrations", "prompts"} & set(others):
            also.setdefault(kind, file)
        if own == "scores" and isinstance(record, Scored):
            aspects = tuple(record.scores)
    return _Sources(also | main, aspects)


def _first_row(file: str) -> Row:
    if not Path(file).expanduser().is_file():
        raise FileNotFoundError(
            f"--data {file}: there is no such file; give a JSONL, CSV or Parquet file, or {SIMULATE}"
        )
    row = next((row for row in load_rows(file) if isinstance(row, Row)), None)
    if row is None:
        raise DataError(f"{file} has no readable row; `rlhf-ray data check {file}` shows why")
    return row


def _check(answers: Answers, simulated: bool, sources: _Sources, functions: Sequence[str], learned: bool) -> None:
    """Check that the answers fit together."""
    if wrong := [function for function in functions if not all(function.partition(":"))]:
        raise StarterError(f"--reward {wrong[0]}: give {REWARD_MODEL}, or a function as module:name")
    if len(functions) > 1 or not answers.rewards:
        raise StarterError(f"--reward: give {REWARD_MODEL}, one function as module:name, or both; got {len(functions)}")
    if simulated:
        return
    given = ", ".join(sorted(sources.by_kind)) or "nothing"
    if learned and sources.feedback is None:
        raise StarterError(
            f"a reward model learns from pairs, rankings, scores or edits, and the data contains {given}; add a file of "
            "pairs with --data, or name a function with --reward module:name"
        )
    if "prompts" not in sources.by_kind:
        raise StarterError(f"PPO needs prompts, and the data contains {given}; add a file of prompts with --data")
    if answers.model == TINY and "demonstrations" not in sources.by_kind:
        raise StarterError(
            f"a {TINY} model starts with random weights and needs demonstrations, and the data contains {given}; add a file "
            "of demonstrations with --data, or name a model folder with --model"
        )


def _model(model: str) -> list[str]:
    if model == TINY:
        return [
            "model:",
            "  # A small random model with its own tokenizer; for trying things out.",
            f"  build: {_TINY}",
        ]
    return ["model:", "  # A Hugging Face folder with safetensors.", f"  path: {_quoted(model)}"]


def _data(sources: _Sources, context: int) -> list[str]:
    lines = ["data:"]
    if not sources.by_kind:
        lines += ["  # Simulated customers and annotators; the numbers of records.", f"  simulate: {_SIMULATED}"]
    for kind, file in sources.by_kind.items():
        lines.append(f"  {kind}: {{location: {_quoted(file)}}}")
    return [
        *lines,
        f"  max_prompt_tokens: {context // 2}      # longer prompts are left out and counted",
        f"  max_dialogue_tokens: {context}",
    ]


def _supervised(stage: str, comment: str, rate: str) -> list[str]:
    return [
        f"# {comment}",
        f"{stage}:",
        "  epochs: 1",
        "  batch_size: 16",
        "  learner:",
        "    workers: {count: 1}         # on GPUs: {count: 2, gpus: 1.0}",
        f"    optimizer: {{learning_rate: {rate}, warmup_steps: 20, schedule: linear}}",
    ]


def _reward_model(sources: _Sources, tiny: bool) -> list[str]:
    feedback = sources.feedback or "pairs"
    lines = _supervised("reward_model", f"A reward model, trained on the {feedback}.", "1e-3" if tiny else "1e-5")
    if feedback in ("rankings", "scores"):
        lines.insert(2, f"  kind: {feedback}")
    if feedback == "scores":
        weights = dict.fromkeys(sources.aspects, round(1 / len(sources.aspects), 3))
        lines.insert(3, f"  aspects: {json.dumps(weights, ensure_ascii=False)}   # their weights in the reward")
    return lines


def _ppo(functions: Sequence[str], learned: bool, tiny: bool, context: int) -> list[str]:
    """PPO with a value model if a reward model is trained; GRPO, which needs none, if a function alone is the reward."""
    lines = [
        "# Reinforcement learning.",
        "ppo:",
        "  steps: 20",
        "  batch_size: 64               # responses of one step",
    ]
    if learned:
        lines += [
            "  minibatches: 4               # optimizer steps of one batch",
            "  algorithm: {missing_eos_penalty: 1.0, kl: {coefficient: 0.05}}",
        ]
    else:
        lines += [
            "  samples_per_prompt: 8",
            "  algorithm: {advantage: grpo, aggregation: sequence_mean, kl: {placement: loss, coefficient: 0.01}}",
        ]
    lines += [
        f"  rollout: {{sampling: {{max_new_tokens: {context // 4}}}}}",
        f"  policy: {{optimizer: {{learning_rate: {'5e-4' if tiny else '1e-6'}}}}}",
    ]
    if learned:
        lines.append(f"  value: {{optimizer: {{learning_rate: {'1e-3' if tiny else '5e-6'}}}}}")
    if functions:
        lines += ["  reward:", *_function(functions[0], learned)]
    return [*lines, "  checkpoint: {every: 10}"]


def _function(function: str, learned: bool) -> Iterator[str]:
    if not learned:
        yield "    model: null                # no reward model"
    yield "    # Called as (prompts, responses, metadata); returns one number for each response."
    yield f"    functions: [{{name: {function.partition(':')[2]}, function: {_quoted(function)}}}]"


def _quoted(text: Any) -> str:
    """A YAML string: JSON's strings are YAML's double-quoted ones."""
    return json.dumps(str(text), ensure_ascii=False)
