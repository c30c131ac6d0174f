"""Oracles 17 and 18 on the pure functions: cutting, ordering, padding or packing cannot change a gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from rlhf_ray.algorithms.advantages import gae, whiten
from rlhf_ray.algorithms.kl import kl_loss
from rlhf_ray.algorithms.logprobs import token_logprobs_and_entropy
from rlhf_ray.algorithms.losses import Clip, PolicyTokens, ppo_value_loss
from rlhf_ray.algorithms.registry import POLICY_LOSSES, policy_loss_named
from rlhf_ray.algorithms.rewards import token_rewards
from rlhf_ray.algorithms.statistics import Segments
from rlhf_ray.algorithms.token_weights import importance_weights, token_weights, weighted_sum

VOCABULARY, WIDTH, MAX_LENGTH = 5, 3, 9


@dataclass(frozen=True)
class Minibatch:
    """What a learner receives: [B, T] each, or [N] if packed. Hidden states have one more dimension."""

    hidden: Tensor
    targets: Tensor
    old: Tensor
    engine: Tensor
    reference: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor
    weights: Tensor
    sequence: Tensor
    """Number of each token's sequence in the whole minibatch."""

    @property
    def segments(self) -> Segments:
        """The segments of this part, numbered from 0."""
        numbers, index = torch.unique(self.sequence, return_inverse=True)
        return Segments(index, len(numbers))

    def select(self, index: Tensor | slice) -> Minibatch:
        return Minibatch(**{name: tensor[index] for name, tensor in vars(self).items()})


def minibatch(seed: int, holes: list[list[bool]], aggregation: str, padding: int = 0, junk: float = 0.0) -> Minibatch:
    """A minibatch as the driver makes it. `holes[i][t]`: token t of sequence i is valid. `junk` fills the padding."""
    length = max(map(len, holes))
    mask = torch.stack([pad(torch.tensor(row), (0, length - len(row))) for row in holes])
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*mask.shape, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, mask.shape, generator=generator)
    old, engine, reference = -2 * torch.rand(3, *mask.shape, generator=generator, dtype=torch.float64)
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    mask, targets, hidden = pad(mask, (0, padding)), pad(targets, (0, padding)), pad(hidden, (0, 0, 0, padding))
    old, engine, reference, values = (
        pad(x, (0, padding)).masked_fill(~mask, junk) for x in (old, engine, reference, values)
    )
    advantages, returns = gae(token_rewards(scores, old, reference, mask, 0.1), values, mask, 1.0, 0.95)
    return Minibatch(
        hidden=hidden,
        targets=targets,
        old=old,
        engine=engine,
        reference=reference,
        old_values=values,
        advantages=whiten(advantages, mask),
        returns=returns,
        mask=mask,
        weights=token_weights(aggregation, mask, MAX_LENGTH, torch.float64),
        sequence=torch.arange(len(mask)).unsqueeze(1).expand(mask.shape),
    )


def gradient(parts: list[Minibatch], name: str = "ppo", level: str = "token") -> Tensor:
    """The summed loss of all parts, and its accumulated gradient with respect to the weights of a linear policy and critic."""
    total = 0.0
    generator = torch.Generator().manual_seed(99)
    policy_head = torch.randn(WIDTH, VOCABULARY, generator=generator, dtype=torch.float64, requires_grad=True)
    value_head = torch.randn(WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    for part in parts:
        logits = part.hidden.flatten(0, -2) @ policy_head
        logprobs, entropy = (
            x.view_as(part.old) for x in token_logprobs_and_entropy(logits, part.targets.flatten(), 0.8)
        )
        tokens = PolicyTokens(logprobs, part.old, part.engine, part.advantages, part.mask, part.segments)
        policy = policy_loss_named(name).compute(tokens, Clip(0.2, 0.3))
        correction = importance_weights(part.old, part.engine, part.mask, level=level, segments=part.segments)
        policy = policy.weighted(correction).loss
        kl = kl_loss("k3", logprobs, part.reference, part.mask, part.old)
        value = ppo_value_loss(part.hidden @ value_head, part.old_values, part.returns, part.mask).loss
        loss = weighted_sum(policy + 0.05 * kl - 0.01 * entropy + 0.1 * value, part.weights)
        loss.backward()
        total += loss.item()
    return torch.cat([policy_head.grad.flatten(), value_head.grad, torch.tensor([total], dtype=torch.float64)])


sequences = st.lists(st.lists(st.booleans(), min_size=1, max_size=MAX_LENGTH), min_size=2, max_size=6).filter(
    lambda holes: any(any(row) for row in holes)
)
aggregations = st.sampled_from(["token_mean", "sequence_mean", "constant"])
losses, levels = st.sampled_from(sorted(POLICY_LOSSES)), st.sampled_from(["token", "sequence"])
seeds = st.integers(0, 10_000)
properties = settings(deadline=None, max_examples=40)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@properties
@given(seeds, sequences, aggregations, losses, levels, st.data())
def test_oracle_17_any_split_gives_the_same_loss_and_gradient(seed, holes, aggregation, loss, level, data) -> None:
    whole = minibatch(seed, holes, aggregation)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(holes) - 1))))
    parts = [whole.select(slice(a, b)) for a, b in zip([0, *cuts], [*cuts, len(holes)], strict=True)]
    assert_same(gradient(parts, loss, level), gradient([whole], loss, level))


@properties
@given(seeds, sequences, aggregations, losses, levels, st.randoms(use_true_random=False))
def test_oracle_17_the_order_of_sequences_does_not_matter(seed, holes, aggregation, loss, level, random) -> None:
    whole = minibatch(seed, holes, aggregation)
    order = list(range(len(holes)))
    random.shuffle(order)
    assert_same(gradient([whole.select(torch.tensor(order))], loss, level), gradient([whole], loss, level))


@properties
@given(
    seeds, sequences, aggregations, losses, levels, st.integers(1, 4),
    st.sampled_from([0.0, 1e30, float("nan"), -float("inf")]),
)  # fmt: skip
def test_oracle_18_padding_and_anything_in_it_changes_nothing(
    seed, holes, aggregation, loss, level, padding, junk
) -> None:
    expected = gradient([minibatch(seed, holes, aggregation)], loss, level)
    padded = minibatch(seed, holes, aggregation, padding=padding, junk=junk)
    assert_same(gradient([padded], loss, level), expected)


@properties
@given(seeds, sequences, aggregations, losses, levels)
def test_oracle_18_packing_is_padding(seed, holes, aggregation, loss, level) -> None:
    """Only the valid tokens, laid end to end without a batch dimension."""
    padded = minibatch(seed, holes, aggregation)
    assert_same(gradient([padded.select(padded.mask)], loss, level), gradient([padded], loss, level))


def test_oracle_18_a_sequences_gradient_does_not_depend_on_its_batch_mates() -> None:
    whole = minibatch(3, [[True] * 4, [True, False, True], [True]], "token_mean")
    alone, others = whole.select(slice(0, 1)), whole.select(slice(1, 3))
    assert_same(gradient([alone]) + gradient([others]), gradient([whole]))


def test_a_mean_of_microbatch_means_is_detected() -> None:
    """The control: with weights per micro-batch, a common mistake, the gradient is different."""
    whole = minibatch(3, [[True] * 4, [True]], "token_mean")
    parts = [whole.select(slice(row, row + 1)) for row in range(2)]
    careless = [replace(part, weights=0.5 * token_weights("token_mean", part.mask)) for part in parts]
    with pytest.raises(AssertionError):
        assert_same(gradient(careless), gradient([whole]))
