"""Both forms of on-policy distillation against enumeration over the vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algorithms import logprobs as chunked
from rlhf_ray.algorithms.distillation import per_token_advantages, reverse_kl
from rlhf_ray.algorithms.logprobs import token_logprobs_and_entropy

ROWS, VOCABULARY = 13, 11


def tables(teacher_width: int = VOCABULARY, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(ROWS, teacher_width, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def enumerated(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """The definition, a token at a time."""
    p, q = (torch.softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return torch.stack([sum(p[i, v] * (p[i, v] / q[i, v]).log() for v in range(p.shape[1])) for i in range(len(p))])


@pytest.fixture(params=[1, 40, 2**18], ids=["a-row-at-a-time", "ragged-chunks", "one-chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradient_are_those_of_the_sum_over_the_vocabulary(chunk, temperature: float, precision) -> None:
    student, teacher = tables(dtype=precision.dtype)
    upstream = torch.linspace(-1, 2, ROWS, dtype=precision.dtype)
    divergence, expected = reverse_kl(student, teacher, temperature), enumerated(student, teacher, temperature)
    torch.testing.assert_close(divergence, expected, atol=precision.tolerance, rtol=0)
    found, wanted = (torch.autograd.grad((kl * upstream).sum(), student)[0] for kl in (divergence, expected))
    torch.testing.assert_close(found, wanted, atol=precision.tolerance, rtol=0)


def test_gradient_by_finite_differences() -> None:
    student, teacher = tables()
    assert torch.autograd.gradcheck(lambda x: reverse_kl(x, teacher, 0.8), student)


def test_the_sampled_form_has_the_exact_gradient_in_expectation() -> None:
    """Every token weighed by its probability: the policy gradient of log pi_T - log pi_old is minus that of the KL."""
    student, teacher = tables()
    expectation = torch.zeros((), dtype=torch.float64)
    for token in range(VOCABULARY):
        targets = torch.full((ROWS,), token)
        ours, _ = token_logprobs_and_entropy(student, targets, 0.9)
        theirs, _ = token_logprobs_and_entropy(teacher, targets, 0.9)
        advantages = per_token_advantages(theirs, ours, torch.ones(ROWS))
        assert not advantages.requires_grad
        expectation = expectation + (ours.detach().exp() * advantages * ours).sum()
    (policy_gradient,) = torch.autograd.grad(expectation, student)
    (exact,) = torch.autograd.grad(reverse_kl(student, teacher, 0.9).sum(), student)
    torch.testing.assert_close(policy_gradient, -exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_oracle_23_student_is_teacher(temperature: float, precision) -> None:
    student, _ = tables(dtype=precision.dtype)
    divergence = reverse_kl(student, student.detach().clone(), temperature)
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    assert (divergence == 0).all() and (gradient == 0).all()
    logprobs, _ = token_logprobs_and_entropy(student, torch.zeros(ROWS, dtype=torch.long), temperature)
    assert (per_token_advantages(logprobs, logprobs.detach().clone(), torch.ones(ROWS)) == 0).all()


def test_a_shift_of_all_logits_is_the_same_distribution() -> None:
    student, teacher = tables()
    torch.testing.assert_close(reverse_kl(student, teacher + 7.0), reverse_kl(student, teacher))
    assert reverse_kl(student, student.detach() - 3.0).abs().max() < 1e-12


@pytest.mark.parametrize("width", [VOCABULARY - 3, VOCABULARY + 3])
def test_vocabularies_padded_to_different_widths(width: int) -> None:
    """Both are taken over the shared tokens; the others have no gradient."""
    student, teacher = tables(width)
    shared = min(width, VOCABULARY)
    divergence = reverse_kl(student, teacher)
    torch.testing.assert_close(divergence, enumerated(student[:, :shared], teacher[:, :shared], 1.0))
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    assert gradient.shape == student.shape and (gradient[:, shared:] == 0).all() and (gradient[:, :shared] != 0).all()


def test_tokens_of_probability_zero() -> None:
    """Probability 0 under both contributes nothing; probability 0 under the teacher only makes the KL infinite."""
    student, teacher = tables()
    cut = student.detach().clone()
    cut[:, 4] = -math.inf
    cut.requires_grad_()
    silent = teacher.clone()
    silent[:, 4] = -math.inf
    keep = [v for v in range(VOCABULARY) if v != 4]
    divergence = reverse_kl(cut, silent)
    torch.testing.assert_close(divergence, enumerated(cut[:, keep], silent[:, keep], 1.0))
    assert torch.autograd.grad(divergence.sum(), cut)[0].isfinite().all()
    assert reverse_kl(student, silent).isinf().all()


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = (2 * torch.randn(64, 500, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    half = student.bfloat16().requires_grad_()
    divergence = reverse_kl(half, teacher.bfloat16())
    wide = half.detach().double().requires_grad_()
    expected = reverse_kl(wide, teacher.bfloat16().double())
    assert divergence.dtype == torch.float32
    torch.testing.assert_close(divergence.double(), expected, atol=1e-5, rtol=0)
    (found,), (wanted,) = (torch.autograd.grad(kl.sum(), x) for kl, x in ((divergence, half), (expected, wide)))
    torch.testing.assert_close(found.double(), wanted, atol=4e-3 * float(wanted.abs().max()), rtol=0)


def test_masked_tokens_have_no_advantage() -> None:
    teacher, ours = torch.tensor([-1.0, math.nan, -2.0]), torch.tensor([-1.5, -1.0, -0.5])
    assert per_token_advantages(teacher, ours, torch.tensor([1, 0, 1])).tolist() == [0.5, 0.0, -1.5]


@pytest.mark.parametrize(("rows", "temperature"), [(ROWS - 1, 1.0), (ROWS, 0.0)])
def test_what_does_not_fit(rows: int, temperature: float) -> None:
    student, teacher = tables()
    with pytest.raises(ValueError, match="need logits" if rows < ROWS else "must be > 0"):
        reverse_kl(student, teacher[:rows], temperature)
