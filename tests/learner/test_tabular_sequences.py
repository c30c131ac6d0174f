"""Oracle 2: on enumerated sequences the real learner finds π* ∝ π_ref·exp(r/β): token KL, EOS and masks end to end."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.rewards import token_rewards
from rlhf_ray.batch import pack_sequences, to_rows
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.learner import LearnerConfig, OptimizerConfig
from rlhf_ray.learner.actor import LearnerSpec
from rlhf_ray.learner.group import LearnerGroup

EOS, BETA, STEPS, RATE = 0, 0.5, 150, 5e-3
RESPONSES = [(EOS,), *((a, b) for a, b in itertools.product((1, 2), (EOS, 1, 2)))]
"""All responses of at most two tokens from a vocabulary of three, ended by EOS or by the limit."""
REWARDS = np.asarray([0.2, 1.0, -0.5, 0.3, -1.0, 0.6, 0.1], dtype=np.float32)


@pytest.fixture(scope="module")
def three_word_model(tmp_path_factory):
    """A transformer over three words: small, and able to represent every distribution over these sequences."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("three_words")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=8, tie_word_embeddings=False, eos_token_id=EOS,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return folder


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


async def train(model: str) -> tuple[np.ndarray, np.ndarray]:
    """(π after training, π_ref), over `RESPONSES`. Each step is exact: every sequence, weighted by its probability."""
    # Two words, because attention over one repeated word could not distinguish prompt and response.
    prompt = np.asarray([1, 2], dtype=np.int32)
    batch = pack_sequences(
        [np.concatenate([prompt, response]) for response in RESPONSES],
        [np.arange(2 + len(response)) >= 2 for response in RESPONSES],
    )
    config = LearnerConfig(optimizer=OptimizerConfig(learning_rate=RATE))
    spec = LearnerSpec("policy", model, config, AlgorithmConfig())
    group = await LearnerGroup.start(
        spec, lambda index: {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    )
    counts = batch.target_counts
    reference = await group.evaluate(batch)
    try:
        for step in range(STEPS):
            old = await group.evaluate(batch)
            rows, mask = (torch.from_numpy(part) for part in to_rows(old, counts))
            reference_rows = torch.from_numpy(to_rows(reference, counts)[0])
            rewards = token_rewards(torch.from_numpy(REWARDS), rows, reference_rows, mask, BETA)
            advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
            weights = torch.exp(rows.sum(dim=1, keepdim=True)).expand_as(rows)
            step_batch = batch.with_columns(
                old_logprobs=old, advantages=advantages[mask].numpy(), weights=weights[mask].numpy()
            )
            result = await group.update(step_batch, RATE * (1 - step / STEPS))
            assert result.diagnostics.metrics()["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
        final = await group.evaluate(batch)
    finally:
        group.close()
    return _probabilities(final, counts), _probabilities(reference, counts)


def _probabilities(logprobs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    rows, _ = to_rows(logprobs.astype(np.float64), counts)
    return np.exp(rows.sum(axis=1))


def test_oracle_02_learner_finds_the_optimum(ray_cluster, three_word_model):
    policy, reference = asyncio.run(train(str(three_word_model)))
    assert policy.sum() == pytest.approx(1.0, abs=1e-5) and reference.sum() == pytest.approx(1.0, abs=1e-5)
    optimum = reference * np.exp(REWARDS / BETA)
    optimum /= optimum.sum()
    assert total_variation(reference, optimum) > 0.2, "the reference is the optimum already: nothing would be tested"
    assert total_variation(policy, optimum) < 1e-3
