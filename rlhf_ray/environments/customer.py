"""An environment that plays the simulated customer of `rlhf_ray.data.simulator`, who asks again if an answer is incomplete.

A turn's reward is the increase of the hidden utility of everything the policy has told the customer, so an episode's rewards
add up to the utility of the whole dialogue minus the cost of asking again. Prompts need the simulator's metadata.
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
    """One customer. The episode ends when nothing is missing or the customer's patience ends."""

    def __init__(self, patience: int = 2, asking_again: float = 0.5) -> None:
        """
        Args:
            patience: how many times the customer asks again.
            asking_again: cost of each time.
        """
        self.patience, self.asking_again = patience, asking_again

    def reset(self, prompt: Prompt, seed: int) -> Observation:
        """Read the customer's case; the prompt already has the customer's first message.

        Raises:
            KeyError: the prompt does not have the simulator's metadata.
        """
        self.metadata, self.rng = prompt.metadata, Random(seed)
        self.scenario = SCENARIO_OF[self.metadata["scenario"]]
        self.responses: list[str] = []
        self.utility = 0.0
        return ()

    def step(self, response: str) -> Step:
        """A question about the most important missing part, or the end of the episode."""
        self.responses.append(response)
        so_far = " ".join(self.responses)
        before, self.utility = self.utility, utility(self.metadata, so_far).total
        wordings = self._missing(features(self.metadata, so_far))
        if not wordings or len(self.responses) > self.patience:
            return Step(reward=self.utility - before, done=True)
        question = self.rng.choice(wordings).format(**self.metadata["slots"])
        return Step(question, self.utility - before - self.asking_again)

    def _missing(self, found: Features) -> tuple[str, ...]:
        """The customer's possible questions about the first missing part; `()` if nothing is missing."""
        if not found.order:
            return ORDER
        if not found.detail:
            return self.scenario.followups
        return () if found.step else STEP
