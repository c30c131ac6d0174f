"""The simulated customer of `rlhf_ray.data.simulator`, who asks again when an answer leaves something out.

A turn's reward is by how much it raises the hidden utility of all that has been said to the customer, so an episode's rewards
add up to the utility of the whole dialogue, less what asking again costs. Prompts need the simulator's metadata.
"""

from __future__ import annotations

from random import Random

from rlhf_ray.data.simulator.grammar import SCENARIO_OF
from rlhf_ray.data.simulator.hidden_utility import Features, features, utility
from rlhf_ray.environments.base import Observation, Step
from rlhf_ray.types import Prompt

ORDER = ("My order is {order}.", "It is about order {order}.")
STEP = ("What will you do now?", "And what is next?")


class Customer:
    """One customer. The episode ends when nothing is missing, or their patience ends."""

    def __init__(self, patience: int = 2, asking_again: float = 0.5) -> None:
        """
        Args:
            patience: how often they ask again.
            asking_again: what each time costs.
        """
        self.patience, self.asking_again = patience, asking_again

    def reset(self, prompt: Prompt, seed: int) -> Observation:
        """The prompt has the customer's first words already.

        Raises:
            KeyError: the prompt is not the simulator's.
        """
        self.known, self.rng = prompt.metadata, Random(seed)
        self.scenario = SCENARIO_OF[self.known["scenario"]]
        self.heard: list[str] = []
        self.worth = 0.0
        return ()

    def step(self, response: str) -> Step:
        """A follow-up about what is missing most, or nothing any more."""
        self.heard.append(response)
        so_far = " ".join(self.heard)
        before, self.worth = self.worth, utility(self.known, so_far).total
        wordings = self._missing(features(self.known, so_far))
        if not wordings or len(self.heard) > self.patience:
            return Step(reward=self.worth - before, done=True)
        question = self.rng.choice(wordings).format(**self.known["slots"])
        return Step(question, self.worth - before - self.asking_again)

    def _missing(self, found: Features) -> tuple[str, ...]:
        """Wordings of what the customer says about the first thing that is missing."""
        if not found.order:
            return ORDER
        if not found.detail:
            return self.scenario.followups
        return () if found.step else STEP
