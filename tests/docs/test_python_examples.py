"""Python in the documentation: it compiles, and what needs no engine runs."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.algorithms.advantages import EstimatorInput
from rlhf_ray.environments.base import Step
from tests.docs.commands import DOCUMENTS, fences

EXAMPLES = [
    (document.name, body) for document in DOCUMENTS for language, body in fences(document) if language == "python"
]


def defined_by(document: str, name: str) -> object:
    """An object of a document's example."""
    source = next(body for shown_in, body in EXAMPLES if shown_in == document and name in body)
    scope: dict[str, object] = {}
    exec(source, scope)
    return scope[name]


@pytest.mark.parametrize(("document", "source"), EXAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EXAMPLES)])
def test_it_compiles(document, source):
    compile(source, document, "exec")


def test_an_estimator_of_ones_own():
    scores, groups = torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.tensor([0, 0, 1, 1])
    batch = EstimatorInput(torch.zeros(4, 2), torch.ones(4, 2), scores, groups)
    advantages = defined_by("algorithms.md", "best_of_group").compute(batch).advantages
    assert advantages.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]


def test_a_reward_function():
    assert defined_by("README.md", "brevity")([], ["x" * 100, ""], []) == [-1.0, 0.0]


def test_an_environment():
    shop = defined_by("environments.md", "Shop")(patience=3)
    assert shop.reset(None, 0) == () and shop.step("Hello.") == Step("Which order?", reward=0.0)
