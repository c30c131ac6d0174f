"""Customers' dialogues: a scenario, values for its slots, and the turns up to the one to answer.

Invariants: a dialogue is a pure function of the generator's state; every dialogue ends with a user's turn and names the
order number and the scenario's detail; `draw_dialogues` never returns the same turns twice, so its result can be split
anywhere without a leak.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from rlhf_ray.data.simulator.grammar import (
    DAYS,
    GREETINGS,
    MONTHS,
    PRODUCTS,
    QUESTIONS_BACK,
    SCENARIOS,
    STREETS,
    Scenario,
)

SEVERAL_TURNS = 0.25
"""Share of dialogues with more than one user's turn."""


@dataclass(frozen=True)
class Dialogue:
    """A customer's dialogue and its facts."""

    scenario: Scenario
    slots: dict[str, str]
    """`order` and the scenario's detail."""
    messages: tuple[dict[str, str], ...]
    """Turns as `{"role", "content"}`; the last is the user's."""

    @property
    def metadata(self) -> dict[str, object]:
        """The metadata of the dialogue in data files, which `utility` reads."""
        return {"scenario": self.scenario.name, "slots": dict(self.slots)}


def draw_value(rng: Random, slot: str) -> str:
    """A value for one slot."""
    match slot:
        case "order":
            # Two digits become one token once the tokenizer has seen them, so a tiny model can learn to copy them.
            return str(rng.randint(10, 39))
        case "product":
            return rng.choice(PRODUCTS)
        case "month":
            return rng.choice(MONTHS)
        case "day":
            return rng.choice(DAYS)
        case "street":
            return rng.choice(STREETS)
    raise ValueError(f"slot {slot!r} is unknown; expected order, product, month, day or street")


def draw_dialogue(rng: Random) -> Dialogue:
    """One dialogue of any scenario."""
    scenario = rng.choice(SCENARIOS)
    slots = {slot: draw_value(rng, slot) for slot in ("order", scenario.detail)}
    greeting = rng.choice(GREETINGS)
    if rng.random() < SEVERAL_TURNS:
        turns: tuple[str, ...] = (
            f"{greeting} {scenario.opening}",
            rng.choice(QUESTIONS_BACK),
            rng.choice(scenario.followups),
        )
    else:
        turns = (f"{greeting} {rng.choice(scenario.requests)}",)
    messages = tuple(
        {"role": ("user", "assistant")[i % 2], "content": turn.format(**slots)} for i, turn in enumerate(turns)
    )
    return Dialogue(scenario, slots, messages)


def draw_dialogues(rng: Random, count: int) -> list[Dialogue]:
    """`count` dialogues with pairwise different turns."""
    found: dict[tuple[str, ...], Dialogue] = {}
    while len(found) < count:
        dialogue = draw_dialogue(rng)
        found.setdefault(tuple(turn["content"] for turn in dialogue.messages), dialogue)
    return list(found.values())
