from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algorithms import logprobs as module
from rlhf_ray.algorithms.logprobs import token_logprobs_and_entropy


def example(rows: int = 13, vocabulary: int = 11, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(vocabulary, (rows,), generator=generator)


@pytest.fixture(params=[1, 40, 2**18], ids=["a-row-at-a-time", "ragged-chunks", "one-chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradient_are_those_of_log_softmax(chunk, temperature: float, precision) -> None:
    logits, targets = example(dtype=precision.dtype)
    upstream = torch.linspace(-1, 1, 13, dtype=precision.dtype)
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, temperature)
    (gradient,) = torch.autograd.grad((logprobs * upstream).sum(), logits)
    table = torch.log_softmax(logits / temperature, dim=-1)
    expected = table[torch.arange(13), targets]
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), logits)
    torch.testing.assert_close(logprobs, expected, atol=precision.tolerance, rtol=0)
    torch.testing.assert_close(gradient, expected_gradient, atol=precision.tolerance, rtol=0)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(dim=-1), atol=precision.tolerance, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("of", [(True, True), (False, True)], ids=["both", "entropy-alone"])
def test_the_gradient_of_the_entropy_is_exact(chunk, temperature: float, of: tuple[bool, bool], precision) -> None:
    logits, targets = example(dtype=precision.dtype)
    first, second = (factor * torch.linspace(-1, 2, 13, dtype=precision.dtype) for factor in (of[0], of[1]))
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, temperature)
    loss = (entropy * second).sum() + ((logprobs * first).sum() if of[0] else 0.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    table = torch.log_softmax(logits / temperature, dim=-1)
    plain = (table[torch.arange(13), targets] * first).sum() - ((table.exp() * table).sum(dim=-1) * second).sum()
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(gradient, expected, atol=precision.tolerance, rtol=0)


def test_gradients_by_finite_differences() -> None:
    logits, targets = example(rows=3, vocabulary=4)
    assert torch.autograd.gradcheck(lambda x: token_logprobs_and_entropy(x, targets, 0.8), logits)


def test_half_precision_logits_are_worked_on_in_float32() -> None:
    logits, targets = example(rows=64, vocabulary=500, dtype=torch.bfloat16)
    logprobs, entropy = token_logprobs_and_entropy(logits, targets)
    wide, wide_entropy = token_logprobs_and_entropy(logits.detach().double(), targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), wide, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), wide_entropy, atol=1e-5, rtol=0)
    logprobs.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_only_the_logits_are_kept_for_the_backward_pass() -> None:
    logits, targets = example()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logprobs, _ = token_logprobs_and_entropy(logits, targets, 0.5)
    assert {t.data_ptr() for t in kept} == {logits.data_ptr(), targets.data_ptr()}
    assert logprobs.shape == (13,)


def test_a_token_that_cannot_be_sampled_makes_no_nan() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [800.0, -800.0, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0, 1]))
    (of_entropy,) = torch.autograd.grad(entropy.sum(), logits, retain_graph=True)
    assert torch.isfinite(of_entropy).all()
    logprobs.sum().backward()
    assert logprobs.tolist() == pytest.approx([-math.log(2), -1600.0])
    assert entropy.tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0], [-1.0, 1.0, 0.0]]))


def test_entropy_can_be_left_out_and_no_rows_are_fine() -> None:
    logits, targets = example()
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, with_entropy=False)
    assert entropy is None and logprobs.shape == (13,)
    nothing, _ = token_logprobs_and_entropy(logits[:0], targets[:0])
    assert nothing.shape == (0,)


def test_bad_input_is_named() -> None:
    logits, targets = example()
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs_and_entropy(logits, targets, 0.0)
    with pytest.raises(ValueError, match=r"\(13, 11\) and \(12,\)"):
        token_logprobs_and_entropy(logits, targets[:12])
