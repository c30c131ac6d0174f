"""Rollouts on the tiny model's vocabulary, reward functions that misbehave, and a reward model with a normalisation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import SecretStr

from rlhf_ray.config.reward import RewardConfig, RewardFunctionSource
from rlhf_ray.config.section import Workers
from rlhf_ray.models.loading import load_scalar_model, load_tokenizer
from rlhf_ray.rewards.workers import RewardWorker
from rlhf_ray.types import Prompt, Rollout, RolloutRequest

FUNCTIONS = '''
import math

def length(prompts, responses, metadata):
    return [len(response) for response in responses]

def wanted(prompts, responses, metadata):
    """The scores in the prompts' metadata, to check the order."""
    assert [prompt[-1]["content"] for prompt in prompts] == [about["text"] for about in metadata]
    return [about["score"] for about in metadata]

def echo(prompts, responses, metadata):
    """1 for each response that has the expected text."""
    return [float(response == about["response"]) for response, about in zip(responses, metadata, strict=True)]

def raises(prompts, responses, metadata):
    raise KeyError("no such order")

def raises_on_marked(prompts, responses, metadata):
    return [1 / about["score"] for about in metadata]

def nan_where_marked(prompts, responses, metadata):
    return [math.nan if about["score"] < 0 else 1.0 for about in metadata]

def infinite(prompts, responses, metadata):
    return [math.inf] * len(responses)

def too_few(prompts, responses, metadata):
    return [0.0] * (len(responses) - 1)

def one_number(prompts, responses, metadata):
    return 1.0

def matrix(prompts, responses, metadata):
    return [[0.0]] * len(responses)

def words(prompts, responses, metadata):
    return ["good"] * len(responses)

def nothing(prompts, responses, metadata):
    return None

NOT_A_FUNCTION = 3

def two_parameters(prompts, responses):
    return [0.0] * len(responses)

def other_names(prompts, responses, about):
    return [0.0] * len(responses)

async def asynchronous(prompts, responses, metadata):
    return [0.0] * len(responses)

def keywords(**texts):
    return [1.0] * len(texts["responses"])
'''


@pytest.fixture(scope="session")
def functions(tmp_path_factory) -> Path:
    """A folder with the module `misbehaving`, which can be imported from now on."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "misbehaving.py").write_text(FUNCTIONS)
    (folder / "misbehaving_on_import.py").write_text("1 / 0")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def rollouts(tiny_model) -> list[Rollout]:
    """Twelve rollouts of very different lengths; the scores in their metadata are -2, -1, …, 9."""
    tokenizer = load_tokenizer(tiny_model)
    generator = np.random.default_rng(0)
    result = []
    for i in range(12):
        prompt_ids = generator.integers(3, 300, 2 + 3 * i, dtype=np.int32)
        text = f"Your order {i} will arrive on Monday." + " Thank you." * (11 - i)
        response = np.asarray([*tokenizer.encode(f" {text}\n"), tokenizer.eos_token_id], dtype=np.int32)
        about = {"text": f"question {i}", "score": float(i - 2), "response": text}
        prompt = Prompt(f"p{i}", prompt_ids, ({"role": "user", "content": f"question {i}"},), about)
        zeros = np.zeros(len(response), dtype=np.int32)
        result.append(Rollout(RolloutRequest(prompt, 0, i), response, zeros.astype(np.float32), zeros, "stop"))
    return result


@pytest.fixture(scope="session")
def reward_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with a scalar head and a normalisation in its config."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    model = load_scalar_model(tiny_model, seed=3)
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.config.reward_mean, model.config.reward_std = 0.7, 2.5
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def reward_worker(functions, tiny_model) -> Callable[..., RewardWorker]:
    """A worker in this process with functions of `misbehaving` by name and weight, and optionally a model."""

    def make(model: Path | None = None, micro_batch_tokens: int = 8192, **weights: float) -> RewardWorker:
        sources = [RewardFunctionSource(name=n, function=f"misbehaving:{n}", weight=w) for n, w in weights.items()]
        config = RewardConfig.model_validate(
            {"functions": sources, "micro_batch_tokens": micro_batch_tokens, "workers": Workers(threads=1)}
            | ({} if model else {"model": None})
        )
        return RewardWorker(config, [str(model)] if model else [], str(tiny_model))

    return make


@pytest.fixture(scope="session")
def answers(tiny_model) -> Callable[..., list[Rollout]]:
    """Rollouts of one prompt with these texts, in order; the prompt has this metadata."""
    tokenizer = load_tokenizer(tiny_model)

    def make(prompt_id: str, *texts: str, **metadata: object) -> list[Rollout]:
        messages = ({"role": "user", "content": f"Where is my order {prompt_id}?"},)
        prompt = Prompt(prompt_id, np.arange(3, 9, dtype=np.int32), messages, metadata)
        result = []
        for index, text in enumerate(texts):
            ids = np.asarray([*tokenizer.encode(text), tokenizer.eos_token_id], dtype=np.int32)
            zeros = np.zeros(len(ids), dtype=np.int32)
            result.append(Rollout(RolloutRequest(prompt, index, index), ids, zeros.astype(np.float32), zeros, "stop"))
        return result

    return make


@pytest.fixture
def served_worker(tiny_model, tmp_path) -> Callable[..., RewardWorker]:
    """A worker in this process whose only sources are services; `kind` is judges or http."""

    def make(kind: str, *sources: dict, key: str | None = None, folder: Path = tmp_path) -> RewardWorker:
        quick = {"backoff_s": 0.01, "attempts": 3, "timeout_s": 5.0}
        configs = [quick | ({"model": "judge-1"} if kind == "judges" else {}) | source for source in sources]
        config = RewardConfig.model_validate({"model": None, kind: configs, "workers": Workers(threads=1)})
        keys = {"TEST_KEY": SecretStr(key)} if key else {}
        return RewardWorker(config, [], str(tiny_model), keys, str(folder))

    return make
