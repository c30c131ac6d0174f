from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algorithms.diagnostics import measure_policy, measure_value
from rlhf_ray.algorithms.losses import ppo_policy_loss, ppo_value_loss
from rlhf_ray.algorithms.statistics import Summary, summarise

MASK = torch.arange(5) < torch.tensor([5, 1, 3, 0]).unsqueeze(1)


def tensors(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 4, 5, generator=generator, dtype=torch.float64).masked_fill(~MASK, math.nan))


def policy_diagnostics(rows: slice):
    old, change, advantages, entropy = (x[rows] for x in tensors(4))
    logprobs, mask = old + 0.3 * change, MASK[rows]
    result = ppo_policy_loss(logprobs, old, advantages, mask)
    return measure_policy(result, logprobs, old, entropy, mask)


def value_diagnostics(rows: slice):
    values, old, returns = (x[rows] for x in tensors(3))
    result = ppo_value_loss(values, old, returns, MASK[rows])
    return measure_value(result, values, returns, MASK[rows])


def test_policy_metrics_by_definition() -> None:
    old, change, advantages, entropy = (x[MASK] for x in tensors(4))
    ratio = (0.3 * change).exp()
    clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert 0 < clipped.sum() < len(clipped)
    assert policy_diagnostics(slice(None)).metrics() == pytest.approx(
        {
            "policy/ratio_mean": ratio.mean().item(),
            "policy/ratio_variance": ratio.var(unbiased=False).item(),
            "policy/ratio_max": ratio.max().item(),
            "policy/clip_fraction": clipped.double().mean().item(),
            "policy/approx_kl": (ratio - 1 - ratio.log()).mean().item(),
            "policy/entropy": entropy.mean().item(),
        },
        abs=1e-9,
    )


def test_value_metrics_by_definition() -> None:
    values, old, returns = (x[MASK] for x in tensors(3))
    clipped = ((torch.clamp(values, old - 0.2, old + 0.2) - returns).abs() > (values - returns).abs()).double()
    assert value_diagnostics(slice(None)).metrics() == pytest.approx(
        {
            "value/mean": values.mean().item(),
            "value/variance": values.var(unbiased=False).item(),
            "return/mean": returns.mean().item(),
            "return/variance": returns.var(unbiased=False).item(),
            "value/explained_variance": 1 - ((returns - values).var() / returns.var()).item(),
            "value/clip_fraction": clipped.mean().item(),
        },
        abs=1e-9,
    )


@pytest.mark.parametrize("measure", [policy_diagnostics, value_diagnostics])
def test_parts_add_up_to_the_whole_even_where_one_is_empty(measure) -> None:
    parts = measure(slice(0, 1)) + measure(slice(1, 3)).cpu() + measure(slice(3, 4))
    assert parts.metrics() == pytest.approx(measure(slice(None)).metrics(), abs=1e-12)


def test_explained_variance_of_perfect_constant_and_useless_critics() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0])

    def explained(values: torch.Tensor, targets: torch.Tensor) -> float:
        result = ppo_value_loss(values, values, targets, torch.ones(3))
        return measure_value(result, values, targets, torch.ones(3)).metrics()["value/explained_variance"]

    assert explained(returns, returns) == 1.0
    assert explained(torch.zeros(3), returns) == pytest.approx(0.0)
    assert explained(returns, torch.ones(3)) == 0.0


def test_corrections_and_demonstrations_have_metrics_if_the_batch_has_them() -> None:
    logprobs, weights = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([2.0, 1.0, math.nan])
    sampled, demonstrated = torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1])
    loss = ppo_policy_loss(logprobs, logprobs, logprobs, sampled)
    metrics = measure_policy(loss, logprobs, logprobs, -logprobs, sampled, weights, demonstrated).metrics()
    assert (metrics["policy/correction_mean"], metrics["policy/ptx_loss"], metrics["policy/entropy"]) == (1.5, 4.0, 1.5)
    plain = measure_policy(loss, logprobs, logprobs, -logprobs, sampled).metrics()
    assert not {"policy/correction_mean", "policy/ptx_loss"} & set(plain)


def test_the_variance_of_float32_values_far_from_zero_is_not_rounded_away() -> None:
    values = 1000.0 + 0.01 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    expected = values.double().var(unbiased=False).item()
    assert summarise(values, torch.ones(4096)).variance == pytest.approx(expected, rel=1e-4)


def test_a_summary_of_no_values_has_no_mean() -> None:
    nothing = summarise(torch.ones(3), torch.zeros(3))
    for read in (lambda: nothing.mean, lambda: nothing.variance, lambda: nothing.maximum):
        with pytest.raises(ValueError, match="mask is empty"):
            read()
    assert (Summary.empty() + summarise(torch.tensor([3.0]), torch.ones(1))).mean == 3.0
    assert (nothing + summarise(torch.tensor([-2.0]), torch.ones(1))).maximum == -2.0
