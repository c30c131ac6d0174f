"""The policy objective on a bigram model in double precision: the sum does not depend on how the batch is cut.

Oracles 16 to 18 on the pure level: ranks and micro-batches are parts of a batch, whatever they are called.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlhf_ray.algorithms.logprobs import token_logprobs_and_entropy
from rlhf_ray.algorithms.token_weights import token_weights
from rlhf_ray.batch import Batch, ModelInput, pack_sequences, pad, to_rows
from rlhf_ray.config.algorithm import AlgorithmConfig, KLConfig
from rlhf_ray.driver.extras.ptx import with_demonstrations
from rlhf_ray.learner.objectives import policy_objective

VOCABULARY, LIMIT, BETA = 6, 7, 0.1
LOSSES = ("ppo", "decoupled_ppo", "cispo", "gspo", "gspo_token")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


class Bigram(nn.Module):
    """The logits of a token depend on the token before it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64))

    def forward(self, batch: ModelInput, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.table[batch.input_ids.flatten()[batch.positions]]
        return token_logprobs_and_entropy(logits, batch.targets, 0.9, with_entropy=entropy)


def sequences(seed: int, counts: list[int]) -> Batch:
    """Two prompt tokens, then the given number of targets; longer sequences have a gap (a tool's answer)."""
    rng = np.random.default_rng(seed)
    masks = [np.asarray([False, False, True] + ([False] if n > 2 else []) + [True] * (n - 1)) for n in counts]
    return pack_sequences([rng.integers(0, VOCABULARY, len(mask)) for mask in masks], masks)


def minibatch(seed: int, counts: list[int], aggregation: str) -> Batch:
    batch, rng = sequences(seed, counts), np.random.default_rng([seed, 1])
    old, behaviour, reference = (-1.8 + rng.normal(0, 0.4, sum(counts)) for _ in range(3))
    mask = torch.from_numpy(to_rows(np.ones(sum(counts)), batch.target_counts)[1])
    weights = token_weights(aggregation, mask, LIMIT, torch.float64)[mask].numpy()
    return batch.with_columns(
        weights=weights, old_logprobs=old, rollout_logprobs=behaviour, reference_logprobs=reference,
        advantages=rng.normal(size=sum(counts)),
    )  # fmt: skip


def algorithm(**choices: Any) -> AlgorithmConfig:
    """Any combination, also one that a config would refuse, because the mathematics must hold for all."""
    kl = KLConfig(placement="loss", estimator="k3", importance_weighted=choices.pop("weighted_kl", False))
    return AlgorithmConfig().model_copy(update={"kl": kl, "clip_low": 0.2, "clip_high": 0.3, **choices})


def padded(part: Batch, pad_id: int) -> ModelInput:
    inputs = pad(part)
    inputs.input_ids[torch.arange(inputs.input_ids.shape[1]) >= torch.from_numpy(part.lengths)[:, None]] = pad_id
    return inputs


def loss_and_gradient(parts: list[Batch], config: AlgorithmConfig, pad_id: int = 0) -> tuple[float, np.ndarray, dict]:
    """Sum the results over the parts."""
    model, objective = Bigram(), policy_objective(config, BETA)
    total, diagnostics = 0.0, None
    for part in parts:
        loss, measured = objective(model, padded(part, pad_id), part)
        loss.backward()
        total += loss.item()
        diagnostics = measured if diagnostics is None else diagnostics + measured
    return total, model.table.grad.numpy(), diagnostics.metrics()


choices = st.fixed_dictionaries(
    {
        "policy_loss": st.sampled_from(LOSSES),
        "correction": st.sampled_from(["none", "truncate", "mask"]),
        "correction_level": st.sampled_from(["token", "sequence"]),
        "entropy_coefficient": st.sampled_from([0.0, 0.05]),
        "weighted_kl": st.booleans(),
    }
)
counts = st.lists(st.integers(1, LIMIT), min_size=2, max_size=6)


@settings(max_examples=150)
@given(
    st.integers(0, 999), counts, st.sampled_from(AGGREGATIONS), choices, st.booleans(),
    st.integers(0, VOCABULARY - 1), st.data(),
)  # fmt: skip
def test_oracles_16_to_18_any_partition_order_and_padding(seed, counts, aggregation, choices, ptx, pad_id, data):
    batch = minibatch(seed, counts, aggregation)
    if ptx:
        batch = with_demonstrations(batch, sequences(seed + 1, [3, 1]), 0.7)
    config = algorithm(**choices)
    order = data.draw(st.permutations(range(len(batch))))
    owners = np.asarray(data.draw(st.lists(st.integers(0, 2), min_size=len(batch), max_size=len(batch))))
    parts = [batch.select([i for i in order if owners[i] == owner]) for owner in np.unique(owners)]
    expected_loss, expected_gradient, expected_metrics = loss_and_gradient([batch], config)
    loss, gradient, metrics = loss_and_gradient(parts, config, pad_id)
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-9)
    assert metrics == pytest.approx(expected_metrics, abs=1e-9)


def test_a_step_with_demonstrations_is_the_sum_of_both_losses():
    """InstructGPT's objective: the policy's gradient plus γ times that of the mean cross-entropy."""
    batch, demonstrations = minibatch(1, [3, 5], "token_mean"), sequences(2, [4, 2])
    mixed = with_demonstrations(batch, demonstrations, 2.5)
    model = Bigram()
    logprobs, _ = model(pad(demonstrations))
    (-2.5 * logprobs.mean()).backward()
    alone, both = (loss_and_gradient([part], algorithm()) for part in (batch, mixed))
    np.testing.assert_allclose(both[1], alone[1] + model.table.grad.numpy(), atol=1e-9)
    assert both[0] == pytest.approx(alone[0] - 2.5 * logprobs.mean().item(), abs=1e-6)
    assert both[2]["policy/ptx_loss"] == pytest.approx(-logprobs.mean().item(), abs=1e-9)
    assert {name: both[2][name] for name in alone[2]} == pytest.approx(alone[2], abs=1e-9), "no part in its statistics"


def test_the_entropy_bonus_raises_the_exact_entropy():
    batch = minibatch(1, [3, 5], "token_mean")
    plain, bonus = (loss_and_gradient([batch], algorithm(entropy_coefficient=c))[1] for c in (0.0, 0.5))
    model = Bigram()
    _, entropy = model(pad(batch), entropy=True)
    entropy.mean().backward()
    np.testing.assert_allclose(bonus - plain, -0.5 * model.table.grad.numpy(), atol=1e-9)


CORRECTIONS = [
    ("none", "token", None),
    ("truncate", "token", lambda ratio: ratio.clamp(max=1.3)),
    ("mask", "token", lambda ratio: ratio * ((ratio >= 0.7) & (ratio <= 1.3))),
    ("truncate", "sequence", lambda ratio: ratio.clamp(max=1.3)),
    ("mask", "sequence", lambda ratio: ratio * ((ratio >= 0.7) & (ratio <= 1.3))),
]


@pytest.mark.parametrize(("bound", "level", "expected"), CORRECTIONS)
def test_the_configured_correction_weights_only_the_policy_loss(bound, level, expected):
    """One sequence after another with explicit weights: Σ weights·(w·loss + β·k3)."""
    batch = minibatch(4, [5, 1, 4, 2, 6], "token_mean")
    config = algorithm(correction=bound, correction_level=level, correction_bounds=(0.7, 1.3), weighted_kl=True)
    model, total = Bigram(), 0.0
    for index in range(len(batch)):
        one = batch.select([index])
        columns = {name: torch.from_numpy(getattr(one, name)) for name in ("weights", "old_logprobs", "advantages")}
        engine, reference = torch.from_numpy(one.rollout_logprobs), torch.from_numpy(one.reference_logprobs)
        logprobs = model(pad(one))[0]
        ratio, a = torch.exp(logprobs - columns["old_logprobs"]), columns["advantages"]
        surrogate = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a)
        if expected is not None:
            difference = columns["old_logprobs"] - engine
            surrogate = surrogate * expected(torch.exp(difference.sum() if level == "sequence" else difference))
        log_r = reference - logprobs
        total = total + (columns["weights"] * (surrogate + BETA * ratio * (torch.exp(log_r) - 1 - log_r))).sum()
    total.backward()
    loss, gradient, _ = loss_and_gradient([batch], config)
    assert loss == pytest.approx(total.item(), abs=1e-9)
    np.testing.assert_allclose(gradient, model.table.grad.numpy(), atol=1e-9)


def test_without_old_logprobs_the_first_pass_is_the_old_policy():
    batch = minibatch(1, [3, 5], "sequence_mean")
    model = Bigram()
    old = model(pad(batch))[0].detach().numpy()
    for name in LOSSES:
        config = algorithm(policy_loss=name, weighted_kl=True)
        first_pass = loss_and_gradient([Batch(**vars(batch) | {"old_logprobs": None})], config)
        told = loss_and_gradient([batch.with_columns(old_logprobs=old)], config)
        np.testing.assert_allclose(first_pass[1], told[1], atol=1e-9)
        assert first_pass[2]["policy/ratio_max"] == 1.0


@pytest.mark.parametrize("choices", [{"policy_loss": "decoupled_ppo"}, {"correction": "truncate"}])
def test_a_correction_without_the_engines_logprobs_is_an_error(choices):
    batch = Batch(**vars(minibatch(1, [3], "token_mean")) | {"rollout_logprobs": None})
    with pytest.raises(ValueError, match="no column 'rollout_logprobs'"):
        loss_and_gradient([batch], algorithm(**choices))
