"""An environment with a calculator, which rewards the right answer to a problem.

The policy writes `<calc>12*(3+4)</calc>` and reads `<result>84</result>`. A turn without `<calc>` is its answer, such as
`#### 84`, and ends the episode. Prompts need an `answer` in their metadata: a number, or a solution that ends with `#### 84`.

Invariants of `compute`: only numbers, + − * / // % and parentheses are computed, and nothing is evaluated as code; results are
exact fractions and no larger than `LARGEST`, so no expression takes long.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from rlhf_ray.environments.base import Observation, Step
from rlhf_ray.rewards.gsm8k import MARK, parse_answer
from rlhf_ray.types import Prompt

_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)

LONGEST = 200
"""Maximum number of characters of an expression."""
LARGEST = Fraction(10) ** 30
"""Upper limit of every number and intermediate result, and of its denominator."""


class Calculator:
    """One problem. The rewards are arguments, because a tiny model needs more guidance than a large one."""

    def __init__(
        self, correct: float = 1.0, computed: float = 0.0, refused: float = 0.0, tolerance: float = 1e-4
    ) -> None:
        """
        Args:
            correct: reward of the right answer.
            computed: reward of the first expression of the episode that could be computed; later ones earn nothing.
            refused: reward of an expression that could not be computed; usually negative.
            tolerance: maximum difference between a right answer and the expected one.
        """
        self.correct, self.computed, self.refused, self.tolerance = correct, computed, refused, Fraction(str(tolerance))

    def reset(self, prompt: Prompt, seed: int) -> Observation:
        """Read the expected answer; there is no opening message, and nothing is random.

        Raises:
            KeyError, ValueError: the prompt's metadata has no number to compare an answer with.
        """
        answer = parse_answer(f"{MARK} {prompt.metadata['answer']}")
        if answer is None:
            raise ValueError(
                f"the answer in the metadata of prompt {prompt.id!r} is not a number: {prompt.metadata['answer']!r:.80}"
            )
        self.answer, self.used = answer, False
        return ()

    def step(self, response: str) -> Step:
        """The result of the last expression in the turn, or the reward of the answer."""
        calls = _CALL.findall(response)
        if not calls:
            answer = parse_answer(response)
            right = answer is not None and abs(answer - self.answer) <= self.tolerance
            return Step(reward=self.correct if right else 0.0, done=True)
        try:
            result, reward = format_number(compute(calls[-1])), 0.0 if self.used else self.computed
            self.used = True
        except NotArithmetic as error:
            result, reward = f"error: {error}", self.refused
        return Step(f"<result>{result}</result>", reward)


class NotArithmetic(ValueError):
    """An expression cannot be computed; the policy reads the message."""


def compute(expression: str) -> Fraction:
    """The value of an expression such as `12*(3+4)`.

    Raises:
        NotArithmetic: the expression is too long, is not arithmetic, divides by zero, or a number is too large.
    """
    if len(expression) > LONGEST:
        raise NotArithmetic(f"longer than {LONGEST} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise NotArithmetic("not an expression") from error
    return _value(tree.body)


def format_number(value: Fraction) -> str:
    """A number as people write it: an integer, or at most four decimals."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.4f}".rstrip("0").rstrip(".")


_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(lambda: Fraction(str(number)))
        case ast.BinOp(left=left, op=op, right=right) if (binary := _BINARY.get(type(op))) is not None:
            a, b = _value(left), _value(right)
            return _bounded(lambda: binary(a, b))
        case ast.UnaryOp(op=op, operand=operand) if (unary := _UNARY.get(type(op))) is not None:
            return unary(_value(operand))
    raise NotArithmetic("only numbers, + - * / // % and parentheses are computed")


def _bounded(number: Callable[[], Fraction]) -> Fraction:
    try:
        value = number()
    except ZeroDivisionError as error:
        raise NotArithmetic("division by zero") from error
    except (ValueError, OverflowError) as error:  # 1e999 is infinite and not a fraction
        raise NotArithmetic("a number is too large") from error
    if abs(value) > LARGEST or value.denominator > LARGEST:
        raise NotArithmetic("a number is too large")
    return value
