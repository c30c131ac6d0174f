"""Answers of every quality: a plan of acts, worded, and sometimes spoilt.

Invariants: an answer is a pure function of the generator's state, the dialogue and the `Skill`; sentences come from the
grammar, so an unspoilt answer has no unclear sentence; merits and faults are drawn independently, so that a learner can
tell one from the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from rlhf_ray.data.simulator.dialogues import Dialogue, draw_value
from rlhf_ray.data.simulator.grammar import FACTS, SCENARIOS, SENTENCES, ActKind


@dataclass(frozen=True)
class Skill:
    """How somebody writes: probabilities of each merit and fault in one answer."""

    states_facts: float = 0.65
    wrong_order: float = 0.12
    wrong_detail: float = 0.12
    states_step: float = 0.7
    wrong_step: float = 0.2
    polite: float = 0.25
    """Of thanks, apology and closing, each."""
    rude: float = 0.1
    evasive: float = 0.1
    flattering: float = 0.15
    verbose: float = 0.12
    spoilt: float = 0.0
    """Of a slip of the pen: an unfinished end, a sentence said twice, or a word lost."""


EXPERT = Skill(0.85, 0.02, 0.02, 0.9, 0.03, 0.5, 0.0, 0.0, 0.05, 0.05)
ORDINARY = Skill()
CARELESS = Skill(0.5, 0.2, 0.2, 0.6, 0.3, 0.15, 0.2, 0.2, 0.25, 0.2)
ANYONE = Skill(0.75, 0.3, 0.3, 0.8, 0.3, 0.45, 0.12, 0.12, 0.25, 0.2, spoilt=0.1)
"""The widest spread, for answers that are to be compared."""


@dataclass(frozen=True)
class Plan:
    """The sentences of one answer, by act and in the order in which they are said; None leaves the act out."""

    thanks: str | None = None
    apology: str | None = None
    flattery: str | None = None
    facts: str | None = None
    filler: str | None = None
    step: str | None = None
    rude: str | None = None
    evasion: str | None = None
    closing: str | None = None

    def text(self) -> str:
        """The answer as one line."""
        return " ".join(sentence for sentence in vars(self).values() if sentence)


def draw_sentence(rng: Random, dialogue: Dialogue, skill: Skill, act: ActKind) -> str | None:
    """The sentence for one act, or None where this writer leaves it out."""
    chance = {
        "facts": skill.states_facts,
        "step": skill.states_step,
        "rude": skill.rude,
        "evasion": skill.evasive,
        "flattery": skill.flattering,
        "filler": skill.verbose,
    }.get(act, skill.polite)
    if rng.random() >= chance:
        return None
    if act not in ("facts", "step"):
        return rng.choice(SENTENCES[act])
    detail, slots = dialogue.scenario.detail, dict(dialogue.slots)
    if rng.random() < skill.wrong_order:
        slots["order"] = draw_value(rng, "order")
    if rng.random() < skill.wrong_detail:
        slots[detail] = draw_value(rng, detail)
    if act == "facts":
        return rng.choice(FACTS[detail]).format(**slots)
    scenario = rng.choice(SCENARIOS) if rng.random() < skill.wrong_step else dialogue.scenario
    if scenario.detail not in slots:
        slots[scenario.detail] = draw_value(rng, scenario.detail)
    return rng.choice(scenario.steps).format(**slots)


def draw_plan(rng: Random, dialogue: Dialogue, skill: Skill) -> Plan:
    """A whole answer."""
    return Plan(**{act: draw_sentence(rng, dialogue, skill, act) for act in vars(Plan())})


def vary(rng: Random, plan: Plan, dialogue: Dialogue, skill: Skill) -> Plan:
    """The same answer with one of its acts drawn again: what an annotator can compare point by point.

    What the answer is about, its facts and its next step, is drawn again more often than its manners.
    """
    act = rng.choice([*vars(plan), *["facts", "step"] * 2])
    return replace(plan, **{act: draw_sentence(rng, dialogue, skill, act)})


def spoil(rng: Random, text: str) -> str:
    """A slip of the pen: the end is missing, a sentence is said twice, or a word is lost or comes twice."""
    words = text.split()
    if len(words) < 4:
        return text
    match rng.randrange(4):
        case 0:
            return " ".join(words[: rng.randint(len(words) // 3, len(words) - 1)])
        case 1:
            sentences = [sentence + "." for sentence in text.split(".") if sentence.strip()]
            sentences.insert(rng.randint(0, len(sentences)), rng.choice(sentences).strip())
            return " ".join(sentence.strip() for sentence in sentences)
        case 2:
            del words[rng.randrange(len(words))]
        case 3:
            position = rng.randrange(len(words))
            words.insert(position, words[position])
    return " ".join(words)


def draw_answer(rng: Random, dialogue: Dialogue, skill: Skill) -> str:
    """The text of one answer; never empty."""
    return finish(rng, draw_plan(rng, dialogue, skill), dialogue, skill)


def finish(rng: Random, plan: Plan, dialogue: Dialogue, skill: Skill) -> str:
    """A plan's text with this writer's slips; somebody with nothing to say is evasive."""
    text = plan.text() or rng.choice(SENTENCES["evasion"])
    return spoil(rng, text) if rng.random() < skill.spoilt else text
