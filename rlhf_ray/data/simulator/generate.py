"""Writes a whole data set of the simulator: demonstrations, pairs, rankings, scores, edits and prompts, as JSONL.

Invariants: the same seed and sizes give the same bytes on any machine and under any hash seed; held-out dialogues occur
in no training file; the folder appears complete or not at all (it is written under a temporary name, then renamed).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any

from rlhf_ray.data.simulator.annotators import PANEL, Annotator, skill_of
from rlhf_ray.data.simulator.answers import ANYONE, EXPERT, draw_answer, draw_plan, finish, vary
from rlhf_ray.data.simulator.dialogues import Dialogue, draw_dialogues
from rlhf_ray.data.simulator.hidden_utility import Features, features

Row = dict[str, Any]
Label = Callable[[Random, Dialogue, Annotator], Row]

ALIKE = 0.4
"""Share of pairs whose answers have the same plan except for one act."""


@dataclass(frozen=True)
class Sizes:
    """Number of rows in each file."""

    demonstrations: int = 4000
    pairs: int = 16000
    held_out_pairs: int = 600
    rankings: int = 200
    scores: int = 200
    edits: int = 200
    prompts: int = 2000
    held_out_prompts: int = 200


@dataclass(frozen=True)
class SimulatedData:
    """Where the files of one data set are."""

    demonstrations: Path
    pairs: Path
    held_out_pairs: Path
    rankings: Path
    scores: Path
    edits: Path
    prompts: Path
    held_out_prompts: Path
    annotators: Path
    """The panel of annotators, with their groups, temperatures and biases."""

    @classmethod
    def at(cls, folder: Path) -> SimulatedData:
        """The paths of the data set in `folder`, which need not exist."""
        return cls(**{file.name: folder / f"{file.name}.jsonl" for file in fields(cls)})


def _annotation(who: Annotator, dialogue: Dialogue) -> Row:
    return {"annotator": who.id, "group": who.group, "metadata": dialogue.metadata}


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _demonstration(rng: Random, dialogue: Dialogue, who: Annotator) -> Row:
    answer = draw_answer(rng, dialogue, skill_of(who))
    return {"messages": [*dialogue.messages, *_turn(answer)], **_annotation(who, dialogue)}


def _pair(rng: Random, dialogue: Dialogue, who: Annotator) -> Row:
    """Two answers, often equal except for one act; they always differ in more than wording."""
    texts: list[str] = []
    found: list[Features] = []
    while not found or found[0] == found[1]:
        plan = draw_plan(rng, dialogue, ANYONE)
        other = vary(rng, plan, dialogue, ANYONE) if rng.random() < ALIKE else draw_plan(rng, dialogue, ANYONE)
        texts = [finish(rng, one, dialogue, ANYONE) for one in (plan, other)]
        found = [features(dialogue.metadata, text) for text in texts]
    chosen, rejected = texts if rng.random() < who.prefers(found[0], found[1]) else reversed(texts)
    return {
        "prompt": list(dialogue.messages),
        "chosen": _turn(chosen),
        "rejected": _turn(rejected),
        **_annotation(who, dialogue),
    }


def _ranking(rng: Random, dialogue: Dialogue, who: Annotator) -> Row:
    texts = [draw_answer(rng, dialogue, ANYONE) for _ in range(rng.randint(3, 5))]
    order = who.rank(rng, [features(dialogue.metadata, text) for text in texts])
    return {"prompt": list(dialogue.messages), "responses": texts, "order": order, **_annotation(who, dialogue)}


def _score(rng: Random, dialogue: Dialogue, who: Annotator) -> Row:
    text = draw_answer(rng, dialogue, ANYONE)
    overall, aspects = who.rate(rng, features(dialogue.metadata, text))
    ratings = {"response": text, "overall": overall, "aspects": aspects}
    return {"prompt": list(dialogue.messages), **ratings, **_annotation(who, dialogue)}


def _edit(rng: Random, dialogue: Dialogue, who: Annotator) -> Row:
    """An answer and an annotator's edit of it: acts are rewritten until the annotator finds the answer no worse."""
    plan = draw_plan(rng, dialogue, ANYONE)
    original = edited = finish(rng, plan, dialogue, ANYONE)
    care = replace(skill_of(who) if who.skill != "careless" else EXPERT, spoilt=0.0)
    worth = who.perceive(features(dialogue.metadata, original))
    while edited == original or who.perceive(features(dialogue.metadata, edited)) < worth:
        plan = vary(rng, plan, dialogue, care)
        edited = finish(rng, plan, dialogue, care)
    return {
        "prompt": list(dialogue.messages),
        "original": original,
        "edited": edited,
        **_annotation(who, dialogue),
    }


def _prompts(dialogues: Iterable[Dialogue]) -> Iterator[Row]:
    for dialogue in dialogues:
        yield {"prompt": list(dialogue.messages), "metadata": dialogue.metadata}


def _rows(seed: int, sizes: Sizes) -> Iterator[tuple[str, Iterable[Row]]]:
    """The name and rows of each file. Each file has its own random stream."""
    held_out_count = max(sizes.held_out_prompts, sizes.held_out_pairs)
    # Up to two pairs are drawn for one dialogue.
    pair_dialogues = -(-sizes.pairs // 2)
    train_count = max(sizes.prompts, sizes.demonstrations, pair_dialogues, sizes.rankings, sizes.scores, sizes.edits)
    dialogues = draw_dialogues(Random(f"{seed}/dialogues"), held_out_count + train_count)
    held_out, train = dialogues[:held_out_count], dialogues[held_out_count:]

    def labelled(name: str, label: Label, pool: Sequence[Dialogue], count: int) -> tuple[str, Iterator[Row]]:
        rng = Random(f"{seed}/{name}")
        rounds = -(-count // len(pool)) if pool else 0
        return name, (label(rng, dialogue, rng.choice(PANEL)) for dialogue in rng.sample([*pool] * rounds, count))

    yield labelled("demonstrations", _demonstration, train, sizes.demonstrations)
    yield labelled("pairs", _pair, train, sizes.pairs)
    yield labelled("held_out_pairs", _pair, held_out, sizes.held_out_pairs)
    yield labelled("rankings", _ranking, train, sizes.rankings)
    yield labelled("scores", _score, train, sizes.scores)
    yield labelled("edits", _edit, train, sizes.edits)
    yield "prompts", _prompts(train[: sizes.prompts])
    yield "held_out_prompts", _prompts(held_out[: sizes.held_out_prompts])
    yield "annotators", (asdict(annotator) for annotator in PANEL)


def simulate(folder: Path, seed: int, sizes: Sizes = Sizes()) -> SimulatedData:
    """Write the data set into `folder`. Raises FileExistsError if the folder exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: the simulator writes into a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, rows in _rows(seed, sizes):
            with (draft / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        draft.chmod(0o755)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return SimulatedData.at(folder)
