"""The reference worker's log-probabilities equal those of transformers for every batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config.reward import ScorerConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.rewards.workers import ReferenceWorker
from rlhf_ray.types import Rollout


def worker(model, budget: int = 8192, temperature: float = 1.0) -> ReferenceWorker:
    return ReferenceWorker(ScorerConfig(micro_batch_tokens=budget, workers=Workers(threads=1)), str(model), temperature)


@torch.no_grad()
def by_transformers(model: torch.nn.Module, rollout: Rollout, temperature: float) -> np.ndarray:
    tokens = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.token_ids])).long()
    logprobs = (model(tokens[None]).logits[0] / temperature).log_softmax(-1)
    start = len(rollout.prompt.token_ids)
    return np.asarray([logprobs[t - 1, tokens[t]] for t in range(start, len(tokens))])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_a_plain_forward_pass(tiny_model, rollouts, temperature):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for rollout, found in zip(rollouts, worker(tiny_model, temperature=temperature).logprobs(rollouts), strict=True):
        assert found.dtype == np.float32 and found.shape == (len(rollout),)
        np.testing.assert_allclose(found, by_transformers(model, rollout, temperature), atol=1e-5)


@pytest.mark.parametrize("budget", [1, 150])
def test_batching_and_padding_change_nothing(tiny_model, rollouts, budget):
    together = worker(tiny_model).logprobs(rollouts)
    for one, other in zip(together, worker(tiny_model, budget).logprobs(rollouts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for one, other in zip(together[::-1], worker(tiny_model).logprobs(rollouts[::-1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
