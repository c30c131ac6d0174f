"""The exact-answer reward: all notations of numbers, and all reference answers."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from rlhf_ray.rewards.gsm8k import exact_answer, parse_answer

FILE = Path("../shared/data/gsm8k/train.jsonl")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6 * 12 = 72\n#### 72", 72), ("#### 1,234", 1234), ("####1,234,567", 1234567), ("#### -5", -5), ("#### −5", -5),
        ("#### $12.50", "12.5"), ("#### -$3", -3), ("#### $-3", -3), ("#### 12.", 12), ("#### 0.5", "0.5"), ("#### .5", "0.5"),
        ("#### 72 clips.", 72), ("#### 50%", 50), ("#### 1\n#### 2", 2), ("#### 007", 7), ("####\n 8", 8), ("#### 3\nor 4", 3),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert parse_answer(text) == Fraction(str(value))


@pytest.mark.parametrize("text", ["72", "", "####", "#### none", "#### 1 or 2", "#### 1,23", "#### 1,2345", "#### 3/4"])
def test_no_answer(text):
    assert parse_answer(text) is None


def test_the_reward_is_one_or_zero():
    responses = ["so #### 1234.0", "#### 1235", "1234", "#### $1,234"]
    assert exact_answer([None] * 4, responses, [{"answer": "… #### 1,234"}] * 4) == [1.0, 0.0, 0.0, 1.0]


def test_a_reference_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="needs an 'answer' with a number after ####; got None"):
        exact_answer([None], ["#### 1"], [{}])


@pytest.mark.skipif(not FILE.is_file(), reason="needs the shared GSM8K file")
def test_every_reference_answer_is_read_right():
    """Compared with the rule of the data's authors: the text after the mark, without commas."""
    answers = [json.loads(line)["answer"] for line in FILE.read_text().splitlines()]
    assert len(answers) == 7473
    for answer in answers:
        written = re.search(r"#### (-?[0-9.,]+)$", answer)[1].replace(",", "")
        assert parse_answer(answer) == Fraction(Decimal(written))
    about = [{"answer": answer} for answer in answers]
    assert exact_answer([None] * len(answers), answers, about) == [1.0] * len(answers)
    wrong = [answer + "1" for answer in answers]
    assert exact_answer([None] * len(answers), wrong, about) == [0.0] * len(answers)
