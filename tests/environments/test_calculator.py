"""The calculator: exact arithmetic and nothing but arithmetic, and an episode that uses it."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.environments.base import Step
from rlhf_ray.environments.calculator import Calculator, NotArithmetic, compute, format_number
from rlhf_ray.types import Prompt


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12*(3+4)", "84"), ("0.1+0.2", "0.3"), ("-3", "-3"), ("7//2", "3"), ("7%4", "3"), ("1/3", "0.3333"), ("+2*-3", "-6"),
        ("1e3", "1000"), (" 48/2 ", "24"), ("2.50", "2.5"), ("10/4", "2.5"),
    ],
)  # fmt: skip
def test_values(expression, result):
    assert format_number(compute(expression)) == result


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')", "9**9", "9**9**9", "open('x')", "a", "1 if 1 else 2", "[1]", "1,2", "'a'*9", "True",
        "1/0", "7%0", "7//(1-1)", "1e999", "1e31", "", "1+", "(" * 150, "1" * 201, "10**-400", "1;2", "1\n2", "lambda: 1", "2j",
        "0x", "\0", "9" * 31, "1/" * 90 + "1e-999",
    ],
)  # fmt: skip
def test_everything_else_is_refused_at_once(expression):
    began = time.monotonic()
    with pytest.raises(NotArithmetic):
        compute(expression)
    assert time.monotonic() - began < 0.5


NUMBERS = st.integers(0, 99).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS, lambda inner: st.builds("({}{}{})".format, inner, st.sampled_from("+-*"), inner), max_leaves=8
)


@given(EXPRESSIONS)
def test_it_computes_what_python_would(expression):
    assert compute(expression) == Fraction(eval(expression))


@pytest.fixture
def calculator() -> Calculator:
    made = Calculator(correct=1.0, computed=0.2, refused=-0.1)
    assert made.reset(Prompt("p", np.zeros(1, dtype=np.int32), (), {"answer": "He has 80 + 4 = 84.\n#### 84"}), 0) == ()
    return made


def test_an_episode_that_computes_and_answers(calculator):
    assert calculator.step("<calc>12*(3+4)</calc>") == Step("<result>84</result>", 0.2)
    assert calculator.step("<calc>1+1</calc> and <calc>84/1</calc>") == Step("<result>84</result>", 0.0), (
        "once is enough"
    )
    assert calculator.step("So #### 84") == Step(reward=1.0, done=True)


def test_an_expression_that_cannot_be_computed_is_reported_and_may_cost(calculator):
    assert calculator.step("<calc>12 apples</calc>") == Step("<result>error: not an expression</result>", -0.1)
    assert calculator.step("#### $84.00.").reward == 1.0


@pytest.mark.parametrize("response", ["#### 85", "", "84", "#### ", "84 or #### 85", "#### eighty-four"])
def test_a_wrong_answer_ends_the_episode_without_a_reward(calculator, response):
    assert calculator.step(response) == Step(reward=0.0, done=True)


@pytest.mark.parametrize(("metadata", "error"), [({}, KeyError), ({"answer": "many"}, ValueError)])
def test_a_prompt_without_an_answer_is_an_error(metadata, error):
    with pytest.raises(error):
        Calculator().reset(Prompt("p", np.zeros(1, dtype=np.int32), (), metadata), 0)
