"""Simulated annotators: groups with different tastes, people with biases and noise, and their choices, rankings and ratings.

An annotator perceives the hidden utility plus the group's taste and a personal bias, and chooses by Bradley-Terry at a personal
temperature; sometimes the choice is blind. Invariants: `PANEL` is the same in every process and for every seed; choice
probabilities are exact, so the accuracy that the noise allows can be computed.
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
"""Professions, with what each adds to the weights of features (utility per unit)."""

SKILLS: tuple[tuple[str, Skill, float], ...] = (
    ("expert", EXPERT, 0.25),
    ("ordinary", ORDINARY, 0.5),
    ("careless", CARELESS, 0.25),
)
"""Kinds of writers with their shares, so that demonstrations are of mixed quality."""

ASPECTS: dict[str, Callable[[Features], float]] = {
    "correctness": lambda found: found.order + found.detail - found.wrong_values,
    "helpfulness": lambda found: 2 * found.step - found.wrong_steps,
    "politeness": lambda found: 2 * found.politeness - found.rudeness,
    "clarity": lambda found: 2 - found.unclear - found.repeated,
}
"""The aspects that are rated besides the overall rating; each value is -2 to 2 for most answers."""


@dataclass(frozen=True)
class Annotator:
    """One simulated person."""

    id: str
    group: str
    """Their profession, a key of `TASTES`."""
    skill: str
    """The kind of writer, a name in `SKILLS`."""
    temperature: float
    """Noise of the choices, in units of utility."""
    flattery_bias: float
    """Utility added for each flattering sentence."""
    length_bias: float
    """Utility added for each word, because a long answer looks thorough."""
    lapse: float
    """Probability of a blind choice."""

    def perceive(self, found: Features) -> float:
        """The utility of an answer as this annotator perceives it."""
        amounts = asdict(found)
        taste = sum(weight * amounts[name] for name, weight in TASTES[self.group].items())
        bias = self.flattery_bias * found.flattery + self.length_bias * found.words
        return utility_of(found).total + taste + bias

    def prefers(self, first: Features, second: Features) -> float:
        """Probability of choosing the first of two answers."""
        margin = (self.perceive(first) - self.perceive(second)) / self.temperature
        return self.lapse / 2 + (1 - self.lapse) / (1 + math.exp(-margin))

    def rank(self, rng: Random, answers: Sequence[Features], tie: float = 0.3) -> list[list[int]]:
        """Indices, best first, ties (closer than `tie` to the one before) in one list. Plackett-Luce by Gumbel noise."""
        worth = [self.perceive(found) - self.temperature * math.log(-math.log(1 - rng.random())) for found in answers]
        places: list[list[int]] = []
        for index in sorted(range(len(answers)), key=lambda index: -worth[index]):
            if places and worth[places[-1][-1]] - worth[index] < tie:
                places[-1].append(index)
            else:
                places.append([index])
        return places

    def rate(self, rng: Random, found: Features) -> tuple[int, dict[str, int]]:
        """The overall rating and one rating for each aspect, all 1 to 5."""
        noise = self.temperature * rng.gauss(0, 1)
        # A rating of 5 needs an almost perfect answer (10); 1 means that the answer does harm.
        overall = _to_rating(1.5 + (self.perceive(found) + noise) / 2.5)
        return overall, {
            name: _to_rating(3 + read(found) + 0.3 * self.temperature * rng.gauss(0, 1))
            for name, read in ASPECTS.items()
        }


def _to_rating(value: float) -> int:
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
"""The annotators of the simulated data."""


def skill_of(annotator: Annotator) -> Skill:
    """The skill with which this annotator writes demonstrations."""
    return next(skill for name, skill, _ in SKILLS if name == annotator.skill)


def population_preference(
    metadata: Mapping[str, Any], first: str, second: str, panel: Sequence[Annotator] = PANEL
) -> float:
    """Probability that a random member of the panel chooses the first text."""
    one, other = features(metadata, first), features(metadata, second)
    return sum(annotator.prefers(one, other) for annotator in panel) / len(panel)


def pair_accuracy_ceiling(pairs: Sequence[Pair], panel: Sequence[Annotator] = PANEL) -> float:
    """Best expected accuracy on `pairs` of a predictor that does not know the annotator: the mean of max(p, 1 - p).

    p is the probability that a member of the panel makes the labelled choice. Raises ValueError if there is no pair, and
    KeyError if a pair's metadata is not the simulator's.
    """
    if not pairs:
        raise ValueError("the accuracy ceiling needs at least one pair")
    chances = [
        population_preference(pair.metadata, pair.chosen[-1]["content"], pair.rejected[-1]["content"], panel)
        for pair in pairs
    ]
    return sum(max(chance, 1 - chance) for chance in chances) / len(chances)
