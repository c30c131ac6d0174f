"""Writes the problems of calculator-cpu.yaml: demonstrations that use the calculator, and prompts with their answers.

Invariant: it writes the same bytes everywhere, so a test can check the two files in this folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from rlhf_ray.environments.calculator import compute, format_number

DEMONSTRATIONS, PROMPTS = 1200, 400
QUESTIONS = ("What is {}?", "Compute {}.", "How much is {}?")


def problems(count: int) -> list[tuple[str, str]]:
    """`count` different questions with their expressions. Numbers have two digits, which are one token each."""
    rng, found = Random(0), {}
    while len(found) < count:
        expression = f"{rng.randint(10, 39)}{rng.choice('+-*')}{rng.randint(10, 39)}"
        found.setdefault(rng.choice(QUESTIONS).format(expression), expression)
    return list(found.items())


def by_calculator(expression: str, value: str) -> list[dict]:
    """Turns that use the calculator: the expression, its result, and the answer."""
    return [
        {"role": "assistant", "content": f"<calc>{expression}</calc>"},
        {"role": "user", "content": f"<result>{value}</result>"},
        {"role": "assistant", "content": f"#### {value}"},
    ]


def at_once(expression: str, value: str) -> list[dict]:
    """A turn with the answer only, which a small model cannot compute."""
    return [{"role": "assistant", "content": f"#### {value}"}]


def rows() -> tuple[list[dict], list[dict]]:
    """Demonstrations and prompts, for different questions."""
    solved = [
        (question, expression, format_number(compute(expression)))
        for question, expression in problems(DEMONSTRATIONS + PROMPTS)
    ]
    demonstrations = [
        {
            "messages": [
                {"role": "user", "content": question},
                *(by_calculator if index % 2 else at_once)(expression, value),
            ]
        }
        for index, (question, expression, value) in enumerate(solved[PROMPTS:])
    ]
    asked = [
        {"prompt": [{"role": "user", "content": question}], "metadata": {"answer": value}}
        for question, _, value in solved[:PROMPTS]
    ]
    return demonstrations, asked


def write(folder: Path) -> None:
    """Write both files."""
    for name, lines in zip(("demonstrations", "prompts"), rows(), strict=True):
        (folder / f"calculator-{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
