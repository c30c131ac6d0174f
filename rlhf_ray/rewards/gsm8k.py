"""The exact-answer reward of GSM8K (Cobbe et al., arXiv 2110.14168): whether the number after `####` is right.

Invariant: numbers are compared by value and without rounding, so `1,234`, `$1234.00` and `1234` are the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

MARK = "####"
_NUMBER = re.compile(
    r"(?P<sign>[-−–]?)\s*[$€£]?\s*(?P<minus>[-−]?)(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+)?"
)
"""Matches `-$1,234.50` and `.5`. `1,23` is two numbers, so it is not an answer."""


def exact_answer(
    prompts: Sequence[Any], responses: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> list[float]:
    """1 for each response whose answer equals the one in `metadata["answer"]`, 0 for the others.

    Raises:
        ValueError: a reference has no answer, which is an error in the data.
    """
    return [float(parse_answer(text) == _reference(about)) for text, about in zip(responses, metadata, strict=True)]


def parse_answer(text: str) -> Fraction | None:
    """The number on the line after the last `####`; None if there is no such line, or not exactly one number on it."""
    _, mark, rest = text.rpartition(MARK)
    if not mark:
        return None
    line = rest.strip().splitlines()[0] if rest.strip() else ""
    numbers = [match for match in _NUMBER.finditer(line) if match["digits"] or match["decimals"]]
    return _value(numbers[0]) if len(numbers) == 1 else None


def _value(match: re.Match[str]) -> Fraction:
    digits = (match["digits"] or "0").replace(",", "") + (match["decimals"] or "")
    return -Fraction(digits) if match["sign"] or match["minus"] else Fraction(digits)


def _reference(about: Mapping[str, Any]) -> Fraction:
    answer = parse_answer(str(about.get("answer", "")))
    if answer is None:
        raise ValueError(f"the reference needs an 'answer' with a number after {MARK}; got {about.get('answer')!r}")
    return answer
