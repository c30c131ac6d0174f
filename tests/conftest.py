"""Shared by all tests: one Ray and one tiny model per session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.stores import google_server, s3_server  # noqa: F401 — fixtures

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A busy machine is no failure, and a test that passed must pass again.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

FAST = "not engine"
"""The selection of `make test-fast`: tests that start neither Ray nor vLLM."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the shared Ray as an `engine` test; other tests that start engines carry the mark themselves."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.engine)


@pytest.fixture(autouse=True)
def fast_tests_start_no_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test of the fast tier that has started Ray, without which no engine runs here."""
    yield
    if request.config.getoption("markexpr") == FAST and "ray" in sys.modules:
        assert not sys.modules["ray"].is_initialized(), "this test starts Ray: mark it with pytest.mark.engine"


@pytest.fixture(scope="session")
def ray_cluster():
    """A private Ray with more logical CPUs than this machine may have; roles are bookkeeping."""
    import ray

    from rlhf_ray.runtime.cluster import local_runtime_env

    runtime_env = local_runtime_env()
    ray.init(address="local", include_dashboard=False, num_cpus=8, log_to_driver=False, runtime_env=runtime_env)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Hugging Face folder: random weights, its own tokenizer."""
    from rlhf_ray.models.tiny import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    texts = ["Hello, where is my order 1234?", "I am sorry. Your order 1234 will arrive on Monday."] * 20
    build_tiny_model(folder, texts, vocab_size=300, hidden_size=64, layers=2, heads=2, kv_heads=1, max_positions=128)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory, tiny_model) -> Path:
    """A larger model with the tokenizer of `tiny_model`, and other opinions."""
    from transformers import AutoTokenizer

    from rlhf_ray.models.tiny import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "teacher"
    shape = {"hidden_size": 128, "layers": 3, "heads": 2, "kv_heads": 1, "max_positions": 128}
    build_tiny_model(folder, ["Hello, where is my order 1234?"] * 20, vocab_size=300, seed=5, **shape)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder
