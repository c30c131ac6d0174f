"""TRL's GRPO loss (1.16) as the oracle, if TRL is installed."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import kl_loss
from rlhf_ray.algorithms.logprobs import token_logprobs_and_entropy
from rlhf_ray.algorithms.losses import Clip, PolicyTokens
from rlhf_ray.algorithms.registry import policy_loss_named
from rlhf_ray.algorithms.statistics import Segments
from rlhf_ray.algorithms.token_weights import importance_weights, token_weights, weighted_sum

pytest.importorskip("trl", reason="TRL is no dependency; these tests run where it is installed")

LENGTHS = torch.tensor([6, 2, 1, 4])
MASK = torch.arange(6) < LENGTHS.unsqueeze(1)
BETA, MAX_LENGTH = 0.04, 9


@pytest.fixture(scope="module")
def trainer() -> type:
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


def columns() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    old, change, engine, reference = torch.randn(4, 4, 6, generator=generator, dtype=torch.float64)
    return {
        "logprobs": (old + 0.5 * change).requires_grad_(),
        "entropy": torch.rand(4, 6, generator=generator, dtype=torch.float64).requires_grad_(),
        "old": old,
        "engine": old + 0.3 * engine,
        "reference": old + 0.3 * reference,
        "advantages": torch.randn(4, generator=generator, dtype=torch.float64),
    }


def theirs(trainer: type, c: dict[str, Tensor], correction: Tensor | None, **settings) -> list[Tensor]:
    """Loss and gradients by TRL, of one batch without accumulation on one process."""
    alone = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=False)
    arguments = SimpleNamespace(
        delta=settings.pop("delta", None), use_bias_correction_kl=settings.pop("weighted_kl", False),
        steps_per_generation=1,
    )  # fmt: skip
    entropy_coefficient = settings.pop("entropy_coef", 0.0)
    self = SimpleNamespace(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, use_adaptive_entropy=False,
        importance_sampling_level=settings.pop("level", "token"), epsilon_low=0.2, loss_type=settings.pop("loss_type"),
        epsilon_high=settings.pop("epsilon_high", 0.3), beta=settings.pop("beta", 0.0), args=arguments, accelerator=alone,
        use_vllm=correction is not None, vllm_importance_sampling_correction=True, max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)), _entropy_bonus_enabled=entropy_coefficient > 0,
        entropy_coef=entropy_coefficient,
        _get_per_token_logps_and_entropies=lambda *a, **k: (c["logprobs"], c["entropy"], None),
    )  # fmt: skip
    assert not settings, f"settings that this comparison does not pass on: {settings}"
    inputs = {
        "prompt_ids": torch.zeros(4, 2, dtype=torch.int64), "prompt_mask": torch.ones(4, 2),
        "completion_ids": torch.zeros(4, 6, dtype=torch.int64), "completion_mask": MASK.double(),
        "advantages": c["advantages"], "old_per_token_logps": c["old"], "ref_per_token_logps": c["reference"],
        "importance_sampling_ratio": correction, "num_items_in_batch": MASK.sum(),
    }  # fmt: skip
    loss = trainer._compute_loss(self, None, inputs)
    return [loss, *torch.autograd.grad(loss, [c["logprobs"], c["entropy"]], allow_unused=True)]


def ours(
    c: dict[str, Tensor], name: str, aggregation: str, clip: Clip, correction: Tensor | None = None, beta: float = 0.0,
    weighted_kl: bool = False, entropy_coefficient: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    advantages = c["advantages"].unsqueeze(1).expand(4, 6)
    tokens = PolicyTokens(c["logprobs"], c["old"], c["engine"], advantages, MASK, Segments.rows(MASK))
    result = policy_loss_named(name).compute(tokens, clip)
    per_token = (result if correction is None else result.weighted(correction)).loss
    if beta:
        per_token = per_token + beta * kl_loss(
            "k3", c["logprobs"], c["reference"], MASK, c["old"] if weighted_kl else None
        )
    per_token = per_token - entropy_coefficient * c["entropy"]
    loss = weighted_sum(per_token, token_weights(aggregation, MASK, MAX_LENGTH, torch.float64))
    return [loss, *torch.autograd.grad(loss, [c["logprobs"], c["entropy"]], allow_unused=True)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one * 1.0, other, atol=1e-9, rtol=1e-9)
    assert (expected[1] != 0).any()


AGGREGATIONS = {"grpo": "sequence_mean", "dapo": "token_mean", "dr_grpo": "constant"}


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("weighted_kl", [False, True])
@pytest.mark.parametrize("level", [None, "token", "sequence"])
def test_clipped_surrogate_with_kl_and_correction(
    trainer, loss_type: str, weighted_kl: bool, level: str | None
) -> None:
    c = columns()
    correction = None if level is None else importance_weights(c["old"], c["engine"], MASK, level=level, upper=1.4)
    expected = theirs(trainer, c, correction, loss_type=loss_type, beta=BETA, weighted_kl=weighted_kl)
    actual = ours(c, "ppo", AGGREGATIONS[loss_type], Clip(0.2, 0.3), correction, BETA, weighted_kl)
    assert_same(actual, expected)


def test_gspo(trainer) -> None:
    c = columns()
    expected = theirs(trainer, c, None, loss_type="grpo", level="sequence")
    assert_same(ours(c, "gspo", "sequence_mean", Clip(0.2, 0.3)), expected)


def test_cispo(trainer) -> None:
    """TRL's bound is the ratio itself, ours (and the paper's) 1 + clip_high."""
    c = columns()
    expected = theirs(trainer, c, None, loss_type="cispo", epsilon_high=1.5)
    assert_same(ours(c, "cispo", "token_mean", Clip(1.0, 0.5)), expected)


def test_entropy_bonus(trainer) -> None:
    c = columns()
    expected = theirs(trainer, c, None, loss_type="dapo", entropy_coef=0.02)
    assert_same(ours(c, "ppo", "token_mean", Clip(0.2, 0.3), entropy_coefficient=0.02), expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bound", ["truncate", "mask"])
def test_importance_weights_by_their_formula(level: str, bound: str) -> None:
    """As TRL's generation step computes them: exp of the (summed) difference, clamped or set to zero outside."""
    c = columns()
    difference = (c["old"] - c["engine"]) * MASK
    ratio = torch.exp(difference.sum(-1, keepdim=True) if level == "sequence" else difference)
    if bound == "truncate":
        expected = ratio.clamp(max=1.2)
    else:
        expected = ratio.masked_fill((ratio < 0.8) | (ratio > 1.2), 0.0)
    lower = 0.8 if bound == "mask" else 0.0
    actual = importance_weights(c["old"], c["engine"], MASK, level=level, bound=bound, upper=1.2, lower=lower)
    torch.testing.assert_close(actual, expected.expand(4, 6) * MASK, atol=1e-12, rtol=0)


def test_log_probabilities_and_entropy() -> None:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    generator = torch.Generator().manual_seed(0)
    logits, targets = 3 * torch.randn(7, 11, generator=generator), torch.randint(11, (7,), generator=generator)
    logprobs, entropy = token_logprobs_and_entropy(logits, targets)
    torch.testing.assert_close(logprobs, selective_log_softmax(logits, targets), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, entropy_from_logits(logits), atol=1e-5, rtol=0)
    assert entropy.max() < math.log(11)
