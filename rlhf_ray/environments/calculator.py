"""A calculator that the policy may use before it answers, and marks for the answer.

The policy writes `<calc>12*(3+4)</calc>` and reads `<result>84</result>`; a turn without `<calc>` is its answer, such as
`#### 84`, and ends the episode. Prompts need an `answer` in their metadata: a number, or a solution that ends with `#### 84`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rlhf_ray.environments.arithmetic import NotArithmetic, compute, shown
from rlhf_ray.environments.base import Observation, Step
from rlhf_ray.rewards.gsm8k import MARK, parse_answer
from rlhf_ray.types import Prompt

_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)


class Calculator:
    """One problem. Rewards are settings, because a tiny model needs to be shown the way and a large one does not."""

    def __init__(
        self, correct: float = 1.0, computed: float = 0.0, refused: float = 0.0, tolerance: float = 1e-4
    ) -> None:
        """
        Args:
            correct: reward of the right answer.
            computed: reward of the episode's first expression that could be computed; later ones earn nothing.
            refused: reward of an expression that could not; usually negative.
            tolerance: largest difference of a right answer.
        """
        self.correct, self.computed, self.refused, self.tolerance = correct, computed, refused, Fraction(str(tolerance))

    def reset(self, prompt: Prompt, seed: int) -> Observation:
        """Nothing is said and nothing is random.

        Raises:
            KeyError, ValueError: the prompt has no number to compare an answer with.
        """
        self.answer = parse_answer(f"{MARK} {prompt.metadata['answer']}")
        if self.answer is None:
            raise ValueError(
                f"the metadata of prompt {prompt.id!r} has the answer {prompt.metadata['answer']!r:.80}, no number"
            )
        self.used = False
        return ()

    def step(self, response: str) -> Step:
        """The result of the last expression in the turn, or marks for the answer."""
        calls = _CALL.findall(response)
        if not calls:
            said = parse_answer(response)
            right = said is not None and abs(said - self.answer) <= self.tolerance
            return Step(reward=self.correct if right else 0.0, done=True)
        try:
            result, reward = shown(compute(calls[-1])), 0.0 if self.used else self.computed
            self.used = True
        except NotArithmetic as error:
            result, reward = f"error: {error}", self.refused
        return Step(f"<result>{result}</result>", reward)
