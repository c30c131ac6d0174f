"""Answers of every quality: a plan of acts, its sentences, and sometimes a slip in the text.

Invariants: an answer is a pure function of the generator's state, the dialogue and the `Skill`; sentences come from the
grammar, so only a slip makes a sentence unclear; merits and faults are drawn independently, so that a learner can
distinguish them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from rlhf_ray.data.simulator.dialogues import Dialogue, draw_value
from rlhf_ray.data.simulator.grammar import FACTS, SCENARIOS, SENTENCES, ActKind


@dataclass(frozen=True)
class Skill:
    """Probabilities of each merit and fault in one answer."""

    states_facts: float = 0.65
    wrong_order: float = 0.12
    wrong_detail: float = 0.12
    states_step: float = 0.7
    wrong_step: float = 0.2
    polite: float = 0.25
    """Probability of each of thanks, apology and closing."""
    rude: float = 0.1
    evasive: float = 0.1
    flattering: float = 0.15
    verbose: float = 0.12
    spoilt: float = 0.0
    """Probability of a slip: an unfinished end, a repeated sentence, or a lost or repeated word."""


EXPERT = Skill(0.85, 0.02, 0.02, 0.9, 0.03, 0.5, 0.0, 0.0, 0.05, 0.05)
ORDINARY = Skill()
CARELESS = Skill(0.5, 0.2, 0.2, 0.6, 0.3, 0.15, 0.2, 0.2, 0.25, 0.2)
ANYONE = Skill(0.75, 0.3, 0.3, 0.8, 0.3, 0.45, 0.12, 0.12, 0.25, 0.2, spoilt=0.1)
"""The widest spread of qualities, for answers that are compared."""


@dataclass(frozen=True)
class Plan:
    """The sentences of one answer, by act and in order; None: the act is left out."""

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


ACTS: tuple[ActKind, ...] = ("thanks", "apology", "flattery", "facts", "filler", "step", "rude", "evasion", "closing")
"""The acts in the order of a `Plan`."""
TOPIC: tuple[ActKind, ...] = ("facts", "step")


def draw_sentence(rng: Random, dialogue: Dialogue, skill: Skill, act: ActKind) -> str | None:
    """The sentence for one act, or None if the writer leaves it out."""
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
    """The plan of a whole answer."""
    return Plan(**{act: draw_sentence(rng, dialogue, skill, act) for act in ACTS})


def vary(rng: Random, plan: Plan, dialogue: Dialogue, skill: Skill) -> Plan:
    """The same answer with one of its acts drawn again. Facts and the next step are drawn again more often than manners."""
    act: ActKind = rng.choice([*ACTS, *TOPIC * 2])
    return replace(plan, **{act: draw_sentence(rng, dialogue, skill, act)})


def spoil(rng: Random, text: str) -> str:
    """The text with a slip: the end is missing, a sentence is repeated, or a word is lost or repeated."""
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
    """The text of a plan, perhaps with a slip. An empty plan becomes an evasive sentence."""
    text = plan.text() or rng.choice(SENTENCES["evasion"])
    return spoil(rng, text) if rng.random() < skill.spoilt else text
