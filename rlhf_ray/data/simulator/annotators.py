"""Simulated annotators: groups with different tastes, people with biases and noise, and the choices that they make.

An annotator perceives the hidden utility, shifted by the group's taste and by a bias of their own, and chooses by
Bradley-Terry at their own temperature; now and then they slip and choose blindly. Invariants: `PANEL` is the same in
every process and for every seed, since these are the same people whatever they are shown; choice probabilities are
exact, so what noise allows can be computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from rlhf_ray.data.records import Pair
from rlhf_ray.data.simulator.answers import CARELESS, EXPERT, ORDINARY, Skill
from rlhf_ray.data.simulator.hidden_utility import Features, features, utility_of

TASTES: dict[str, dict[str, float]] = {
    "clerk": {"order": 0.5, "detail": 0.5, "wrong_values": -0.4, "politeness": -0.8},
    "technician": {"step": 0.8, "wrong_steps": -0.5, "politeness": -1.0, "words": -0.02},
    "host": {"politeness": 1.8, "rudeness": -0.8, "step": -0.5, "wrong_values": 0.3},
    "seller": {"flattery": 0.9, "words": 0.02, "order": -0.4, "wrong_steps": 0.3},
}
"""Professions: what each adds to the weight of a feature (utility per unit)."""

SKILLS: tuple[tuple[str, Skill, float], ...] = (
    ("expert", EXPERT, 0.25),
    ("ordinary", ORDINARY, 0.5),
    ("careless", CARELESS, 0.25),
)
"""Kinds of writers with their shares: demonstrations are of mixed quality."""

ASPECTS: dict[str, Callable[[Features], float]] = {
    "correctness": lambda found: found.order + found.detail - found.wrong_values,
    "helpfulness": lambda found: 2 * found.step - found.wrong_steps,
    "politeness": lambda found: 2 * found.politeness - found.rudeness,
    "clarity": lambda found: 2 - found.unclear - found.repeated,
}
"""What a score sheet asks beside the overall mark: each -2 to 2 for most answers."""


@dataclass(frozen=True)
class Annotator:
    """One simulated person."""

    id: str
    group: str
    """Their profession, a key of `TASTES`."""
    skill: str
    """The kind of writer that they are."""
    temperature: float
    """Noise of their choices, in units of utility."""
    flattery_bias: float
    """What they add for each flattering sentence, because flattery works."""
    length_bias: float
    """What they add for each word, because long looks thorough."""
    lapse: float
    """Probability of a blind choice."""

    def perceive(self, found: Features) -> float:
        """The worth of an answer in this person's eyes."""
        amounts = asdict(found)
        taste = sum(weight * amounts[name] for name, weight in TASTES[self.group].items())
        bias = self.flattery_bias * found.flattery + self.length_bias * found.words
        return utility_of(found).total + taste + bias

    def prefers(self, first: Features, second: Features) -> float:
        """Probability of choosing the first of two answers."""
        margin = (self.perceive(first) - self.perceive(second)) / self.temperature
        return self.lapse / 2 + (1 - self.lapse) / (1 + math.exp(-margin))

    def rank(self, rng: Random, answers: Sequence[Features], tie: float = 0.3) -> list[list[int]]:
        """Indices best first; answers closer than `tie` to the one before share its place. Plackett-Luce by Gumbel
        noise."""
        worth = [self.perceive(found) - self.temperature * math.log(-math.log(1 - rng.random())) for found in answers]
        places: list[list[int]] = []
        for index in sorted(range(len(answers)), key=lambda index: -worth[index]):
            if places and worth[places[-1][-1]] - worth[index] < tie:
                places[-1].append(index)
            else:
                places.append([index])
        return places

    def mark(self, rng: Random, found: Features) -> tuple[int, dict[str, int]]:
        """The overall mark and one mark for each aspect, all 1 to 5."""
        noise = self.temperature * rng.gauss(0, 1)
        # A mark of 5 needs about a perfect answer (10), 1 is for what does more harm than good.
        overall = _to_mark(1.5 + (self.perceive(found) + noise) / 2.5)
        return overall, {
            name: _to_mark(3 + read(found) + 0.3 * self.temperature * rng.gauss(0, 1)) for name, read in ASPECTS.items()
        }


def _to_mark(value: float) -> int:
    return max(1, min(5, round(value)))


def draw_panel(seed: int, size: int = 24) -> tuple[Annotator, ...]:
    """`size` annotators, spread evenly over the groups."""
    rng = Random(f"panel/{seed}")
    groups = list(TASTES)
    names, weights = [name for name, _, _ in SKILLS], [share for _, _, share in SKILLS]
    return tuple(
        Annotator(
            id=f"annotator-{index:02d}",
            group=groups[index % len(groups)],
            skill=rng.choices(names, weights)[0],
            temperature=round(rng.uniform(0.4, 0.8), 3),
            flattery_bias=round(rng.uniform(0.6, 2.4), 3),
            length_bias=round(rng.uniform(0.0, 0.03), 4),
            lapse=round(rng.uniform(0.0, 0.06), 3),
        )
        for index in range(size)
    )


PANEL = draw_panel(0)
"""The people who label the simulator's data."""


def skill_of(annotator: Annotator) -> Skill:
    """How this annotator writes demonstrations."""
    return next(skill for name, skill, _ in SKILLS if name == annotator.skill)


def population_preference(
    metadata: Mapping[str, Any], first: str, second: str, panel: Sequence[Annotator] = PANEL
) -> float:
    """Probability that somebody drawn from the panel chooses the first text."""
    one, other = features(metadata, first), features(metadata, second)
    return sum(annotator.prefers(one, other) for annotator in panel) / len(panel)


def pair_accuracy_ceiling(pairs: Sequence[Pair], panel: Sequence[Annotator] = PANEL) -> float:
    """Best expected accuracy on `pairs` of a predictor that does not know who labelled: the mean of max(p, 1 - p).

    p is the probability that a member of the panel chooses as the label says. Raises ValueError where there is no pair,
    and KeyError where a pair's metadata is not the simulator's.
    """
    if not pairs:
        raise ValueError("the ceiling of no pairs is undefined: give at least one pair")
    chances = [
        population_preference(pair.metadata, pair.chosen[-1]["content"], pair.rejected[-1]["content"], panel)
        for pair in pairs
    ]
    return sum(max(chance, 1 - chance) for chance in chances) / len(chances)
