"""Arithmetic that a model wrote, computed without running what it wrote.

Invariants: only numbers, + − * / // % and parentheses are computed, nothing is ever evaluated as code; the result is exact (a
fraction) and no larger than `LARGEST`, so no expression takes long.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

LONGEST = 200
"""Characters of an expression."""
LARGEST = Fraction(10) ** 30
"""Of any number or intermediate result, and of its denominator."""

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class NotArithmetic(ValueError):
    """An expression cannot be computed; the message says why, to whoever wrote it."""


def compute(expression: str) -> Fraction:
    """The value of an expression such as `12*(3+4)`.

    Raises:
        NotArithmetic: too long, not readable, something other than arithmetic, a division by zero, a number too large.
    """
    if len(expression) > LONGEST:
        raise NotArithmetic(f"longer than {LONGEST} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise NotArithmetic("not an expression") from error
    return _value(tree.body)


def shown(value: Fraction) -> str:
    """A number as people write it: whole, or with at most four decimals."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.4f}".rstrip("0").rstrip(".")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(lambda: Fraction(str(number)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _value(left), _value(right)
            return _bounded(lambda: _BINARY[type(op)](a, b))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
    raise NotArithmetic("only numbers, + - * / // % and parentheses are computed")


def _bounded(number: Callable[[], Fraction]) -> Fraction:
    try:
        value = number()
    except ZeroDivisionError as error:
        raise NotArithmetic("division by zero") from error
    except (ValueError, OverflowError) as error:  # 1e999 is infinite, and no fraction
        raise NotArithmetic("a number is too large") from error
    if abs(value) > LARGEST or value.denominator > LARGEST:
        raise NotArithmetic("a number is too large")
    return value
