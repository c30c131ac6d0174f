"""From experiences to advantages and weights, compared with loops over tokens without rows, masks or columns."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.batch import Batch
from rlhf_ray.config.algorithm import AlgorithmConfig, KLConfig, OverlongConfig
from rlhf_ray.driver import training_batch
from rlhf_ray.driver.training_batch import TrainingBatch, collate, minibatches, shaped_scores
from rlhf_ray.types import Experience

LENGTHS, SCORES = (3, 1, 5, 2), (1.0, -0.5, 2.0, 0.25)
LIMIT = 5
prepare = partial(training_batch.prepare, max_new_tokens=LIMIT)
GAE = AlgorithmConfig(whiten_advantages=False, gamma=0.97, lam=0.9)


@pytest.fixture
def experiences(experience) -> list[Experience]:
    """Two prompts, two samples each; the third response hit the token limit."""
    return [
        experience(f"p{i // 2}", i % 2, length, score, "length" if i == 2 else "stop")
        for i, (length, score) in enumerate(zip(LENGTHS, SCORES, strict=True))
    ]


@pytest.fixture
def batch(experiences) -> Batch:
    """The batch with the columns of the learners: old log-probabilities close to the rollouts', and values."""
    generator = np.random.default_rng(0)
    collated = collate(experiences)
    noise, values = (generator.normal(0, 0.1, sum(LENGTHS)).astype(np.float32) for _ in range(2))
    return collated.with_columns(old_logprobs=collated.rollout_logprobs + noise, old_values=values)


def everything(batch: Batch) -> TrainingBatch:
    """A training batch in which every sequence is trained."""
    return TrainingBatch(batch, None, 0.0, np.ones(len(batch), dtype=bool))


def per_sequence(column: np.ndarray) -> list[list[float]]:
    return [part.tolist() for part in np.split(column, np.cumsum(LENGTHS)[:-1])]


def slow_rewards(
    logprobs: np.ndarray, reference: np.ndarray, beta: float, scores: tuple[float, ...]
) -> list[list[float]]:
    rows = [
        [-beta * (ours - theirs) for ours, theirs in zip(row, other, strict=True)]
        for row, other in zip(per_sequence(logprobs), per_sequence(reference), strict=True)
    ]
    for row, score in zip(rows, scores, strict=True):
        row[-1] += score
    return rows


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 of arXiv 1506.02438 as a sum, not as a recursion."""
    values = [*values, 0.0]
    deltas = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def test_collate_lays_prompt_and_response_end_to_end(experiences):
    collated = collate(experiences)
    assert collated.lengths.tolist() == [4 + length for length in LENGTHS]
    assert collated.target_counts.tolist() == list(LENGTHS)
    responses = [token for e in experiences for token in e.rollout.token_ids.tolist()]
    assert collated.token_ids[collated.target_mask].tolist() == responses
    assert collated.rollout_logprobs.tolist() == [x for e in experiences for x in e.rollout.logprobs.tolist()]
    assert collate([replace(e, reference_logprobs=None) for e in experiences]).reference_logprobs is None


def test_gae_with_the_kl_in_the_reward(experiences, batch):
    prepared = prepare(experiences, batch, GAE, beta=0.3)
    rewards = slow_rewards(batch.old_logprobs, batch.reference_logprobs, 0.3, SCORES)
    expected = [slow_gae(r, v, 0.97, 0.9) for r, v in zip(rewards, per_sequence(batch.old_values), strict=True)]
    flat = np.asarray([x for row in expected for x in row])
    np.testing.assert_allclose(prepared.batch.advantages, flat, atol=1e-5)
    np.testing.assert_allclose(prepared.batch.returns, flat + batch.old_values, atol=1e-5)
    log_ratios = per_sequence(batch.old_logprobs - batch.reference_logprobs)
    assert prepared.kl == pytest.approx(np.mean([sum(row) for row in log_ratios]), abs=1e-5)
    assert prepared.shaped_reward == pytest.approx(np.mean(SCORES) - 0.3 * prepared.kl, abs=1e-5)


@pytest.mark.parametrize("placement", ["loss", "none"])
def test_without_kl_in_the_reward_only_the_score_counts(experiences, batch, placement):
    algorithm = GAE.model_copy(update={"kl": KLConfig(placement=placement)})
    prepared = prepare(experiences, batch, algorithm, beta=0.3)
    rewards = [[0.0] * (length - 1) + [score] for length, score in zip(LENGTHS, SCORES, strict=True)]
    expected = [slow_gae(r, v, 0.97, 0.9) for r, v in zip(rewards, per_sequence(batch.old_values), strict=True)]
    np.testing.assert_allclose(prepared.batch.advantages, [x for row in expected for x in row], atol=1e-5)
    assert prepared.shaped_reward == pytest.approx(np.mean(SCORES))
    assert prepared.kl is not None, "it is reported all the same"


def test_without_a_reference_there_is_no_kl_to_report(experiences, batch):
    alone = [replace(e, reference_logprobs=None) for e in experiences]
    algorithm = GAE.model_copy(update={"kl": KLConfig(placement="none")})
    assert prepare(alone, replace(batch, reference_logprobs=None), algorithm, beta=0.3).kl is None


def test_whitening_is_over_the_tokens_of_the_global_batch(experiences, batch):
    plain = prepare(experiences, batch, GAE, beta=0.1).batch
    white = prepare(experiences, batch, GAE.model_copy(update={"whiten_advantages": True}), beta=0.1).batch
    expected = (plain.advantages - plain.advantages.mean()) / plain.advantages.std()
    np.testing.assert_allclose(white.advantages, expected, atol=1e-5)
    np.testing.assert_allclose(white.returns, plain.returns, atol=1e-6, err_msg="returns are not whitened")


def test_whitened_rewards_keep_their_mean(experiences, batch):
    """With γ = λ = 1 and no values an advantage is the sum of the rewards from there on."""
    algorithm = AlgorithmConfig(whiten_advantages=False, whiten_rewards=True, gamma=1.0, lam=1.0)
    zero = replace(batch, old_values=np.zeros_like(batch.old_values))
    prepared = prepare(experiences, zero, algorithm, beta=0.3)
    rewards = np.concatenate(slow_rewards(batch.old_logprobs, batch.reference_logprobs, 0.3, SCORES))
    white = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    expected = [sum(row[t:]) for row in per_sequence(white) for t in range(len(row))]
    np.testing.assert_allclose(prepared.batch.advantages, expected, atol=1e-4)


def test_missing_eos_penalty_lowers_the_score_of_the_truncated_response_only(experiences, batch):
    prepared = prepare(experiences, batch, GAE.model_copy(update={"missing_eos_penalty": 5.0}), beta=0.0)
    plain = prepare(experiences, batch, GAE, beta=0.0)
    difference = per_sequence(plain.batch.advantages - prepared.batch.advantages)
    assert [bool(np.any(row)) for row in difference] == [False, False, True, False]
    assert difference[2][-1] == pytest.approx(5.0, abs=1e-5)
    assert prepared.shaped_reward == pytest.approx(plain.shaped_reward - 5.0 / 4)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_another_estimator_in_the_reward(experiences, batch, estimator):
    """With γ = λ = 1 and no values an advantage is the sum of the rewards from there on."""
    algorithm = AlgorithmConfig(whiten_advantages=False, lam=1.0, kl=KLConfig(estimator=estimator))
    zero = replace(batch, old_values=np.zeros_like(batch.old_values))
    prepared = prepare(experiences, zero, algorithm, beta=0.3)
    log_r = (batch.reference_logprobs - batch.old_logprobs).astype(np.float64)
    penalties = per_sequence(0.3 * (log_r**2 / 2 if estimator == "k2" else np.exp(log_r) - 1 - log_r))
    expected = [score - sum(row[t:]) for row, score in zip(penalties, SCORES, strict=True) for t in range(len(row))]
    np.testing.assert_allclose(prepared.batch.advantages, expected, rtol=1e-5, atol=1e-5)
    assert prepared.kl == pytest.approx(-sum(log_r) / 4, abs=1e-5), "what is reported is k1 all the same"


def test_rloo_with_the_kl_in_the_reward_compares_penalised_scores(experiences, batch):
    algorithm = AlgorithmConfig(advantage="rloo")
    prepared = prepare(experiences, replace(batch, old_values=None), algorithm, beta=0.3)
    totals = [sum(row) for row in slow_rewards(batch.old_logprobs, batch.reference_logprobs, 0.3, SCORES)]
    scores = [*GROUP_ADVANTAGES["rloo"](totals[:2]), *GROUP_ADVANTAGES["rloo"](totals[2:])]
    np.testing.assert_allclose(prepared.batch.advantages, np.repeat(scores, LENGTHS), atol=1e-5)


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_reinforce_plus_plus(experiences, batch, name):
    """Discounted rewards-to-go including the KL, whitened over all tokens; the baseline uses the scores only."""
    algorithm = AlgorithmConfig(advantage=name, gamma=0.9)
    prepared = prepare(experiences, replace(batch, old_values=None), algorithm, beta=0.3)
    baselines = [np.mean(SCORES[:2])] * 2 + [np.mean(SCORES[2:])] * 2 if name.endswith("baseline") else [0.0] * 4
    centred = tuple(score - baseline for score, baseline in zip(SCORES, baselines, strict=True))
    rewards = slow_rewards(batch.old_logprobs, batch.reference_logprobs, 0.3, centred)
    returns = [sum(0.9 ** (k - t) * row[k] for k in range(t, len(row))) for row in rewards for t in range(len(row))]
    expected = (np.asarray(returns) - np.mean(returns)) / np.std(returns)
    np.testing.assert_allclose(prepared.batch.advantages, expected, atol=1e-5)
    assert prepared.batch.returns is None


def test_soft_overlong_punishment_is_part_of_the_score(experiences, batch):
    """Lengths 3, 1, 5 and 2; the limit is 5 tokens, and the last 4 are penalised."""
    algorithm = GAE.model_copy(update={"overlong": OverlongConfig(buffer_tokens=4, penalty=2.0)})
    expected = [1.0 - 2.0 * 2 / 4, -0.5, 2.0 - 2.0, 0.25 - 2.0 / 4]
    assert shaped_scores(experiences, algorithm, LIMIT).tolist() == pytest.approx(expected)
    assert prepare(experiences, batch, algorithm, beta=0.0).shaped_reward == pytest.approx(np.mean(expected))


def test_truncated_responses_are_left_out_of_the_loss_and_stay_in_the_baseline(experiences, batch):
    settings = {"advantage": "rloo", "kl": KLConfig(placement="none")}
    filtered, plain = (
        prepare(experiences, replace(batch, old_values=None), AlgorithmConfig(**settings, filter_truncated=on), 0.0)
        for on in (True, False)
    )
    assert filtered.trained.tolist() == [True, True, False, True] and plain.trained.all()
    assert filtered.batch.advantages.tolist() == plain.batch.advantages.tolist()
    (part,) = minibatches(filtered, AlgorithmConfig(**settings), 1, 1, LIMIT, (0, 0))
    expected = np.repeat([1 / 6, 1 / 6, 0, 1 / 6], LENGTHS)
    np.testing.assert_allclose(part.weights, expected, rtol=1e-6)


def test_a_minibatch_without_a_trained_sequence_is_none(batch):
    prepared = replace(everything(batch), trained=np.asarray([False, False, False, True]))
    parts = minibatches(prepared, GAE, 4, 1, LIMIT, (0, 0))
    assert [part is None for part in parts].count(True) == 3
    (kept,) = [part for part in parts if part is not None]
    np.testing.assert_allclose(kept.weights, [0.5, 0.5])


GROUP_ADVANTAGES = {
    "rloo": lambda r: [x - np.mean([y for k, y in enumerate(r) if k != i]) for i, x in enumerate(r)],
    "grpo": lambda r: [(x - np.mean(r)) / (np.std(r, ddof=1) + 1e-4) for x in r],
    "dr_grpo": lambda r: [x - np.mean(r) for x in r],
}


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_group_advantages(experiences, batch, name):
    algorithm = AlgorithmConfig(advantage=name, kl=KLConfig(placement="loss"))
    prepared = prepare(experiences, replace(batch, old_values=None), algorithm, beta=0.3)
    scores = [*GROUP_ADVANTAGES[name](SCORES[:2]), *GROUP_ADVANTAGES[name](SCORES[2:])]
    np.testing.assert_allclose(prepared.batch.advantages, np.repeat(scores, LENGTHS), atol=1e-5)
    assert prepared.batch.returns is None


def test_groups_are_found_by_prompt_and_not_by_position(experiences):
    algorithm = AlgorithmConfig(advantage="rloo", kl=KLConfig(placement="none"))
    order = [2, 0, 3, 1]
    straight = prepare(experiences, collate(experiences), algorithm, 0.0).batch
    mixed = prepare([experiences[i] for i in order], collate([experiences[i] for i in order]), algorithm, 0.0).batch
    np.testing.assert_allclose(mixed.advantages, straight.select(order).advantages, atol=1e-6)


def test_without_old_logprobs_the_reported_kl_uses_the_rollouts(experiences, batch):
    algorithm = AlgorithmConfig(advantage="grpo", kl=KLConfig(placement="loss"))
    prepared = prepare(experiences, replace(batch, old_logprobs=None, old_values=None), algorithm, beta=0.3)
    rows = per_sequence(batch.rollout_logprobs - batch.reference_logprobs)
    assert prepared.kl == pytest.approx(np.mean([sum(row) for row in rows]), abs=1e-5)
    assert prepared.batch.old_logprobs is None


def test_gae_without_values_is_refused(experiences):
    with pytest.raises(ValueError, match="needs the values of a critic"):
        prepare(experiences, collate(experiences), GAE, 0.1)


@given(counts=st.sampled_from([1, 2, 4]), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_minibatches_are_whole_sequences_each_once_per_epoch(experience, counts, epochs, seed):
    experiences = [experience(f"p{i}", 0, length) for i, length in enumerate(LENGTHS)]
    whole = collate(experiences)
    parts = minibatches(everything(whole), GAE, counts, epochs, 8, (seed, 3))
    assert len(parts) == counts * epochs
    sequences = [tuple(row.tolist()) for row in np.split(whole.token_ids, np.cumsum(whole.lengths)[:-1])]
    for epoch in range(epochs):
        mine = parts[epoch * counts : (epoch + 1) * counts]
        found = [tuple(r.tolist()) for p in mine for r in np.split(p.token_ids, np.cumsum(p.lengths)[:-1])]
        assert sorted(found) == sorted(sequences)
    again = minibatches(everything(whole), GAE, counts, epochs, 8, (seed, 3))
    assert [part.token_ids.tolist() for part in parts] == [part.token_ids.tolist() for part in again]


@pytest.mark.parametrize("count", [1, 2])
def test_weights_are_those_of_each_minibatch(batch, count):
    for part in minibatches(everything(batch), GAE, count, 1, 8, (0, 0)):
        np.testing.assert_allclose(part.weights, 1 / part.target_counts.sum(), rtol=1e-6)
    for part in minibatches(
        everything(batch), GAE.model_copy(update={"aggregation": "sequence_mean"}), count, 1, 8, (0, 0)
    ):
        expected = np.repeat(1 / (len(part) * part.target_counts), part.target_counts)
        np.testing.assert_allclose(part.weights, expected, rtol=1e-6)
    for part in minibatches(everything(batch), GAE.model_copy(update={"aggregation": "constant"}), count, 1, 8, (0, 0)):
        np.testing.assert_allclose(part.weights, 1 / (len(part) * 8), rtol=1e-6)


def test_steps_and_epochs_shuffle_differently(experience):
    whole = collate([experience(f"p{i}", 0, 2) for i in range(16)])
    orders = [
        tuple(part.token_ids[:4].tolist() for part in minibatches(everything(whole), GAE, 4, 2, 8, seed))
        for seed in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({str(order) for order in orders}) == 3
    assert orders[0][:4] != orders[0][4:], "the second epoch has an order of its own"


def test_nothing_is_nan_for_scores_without_variance(experience):
    experiences = [experience("p", sample, 2, 1.0) for sample in range(4)]
    algorithm = AlgorithmConfig(advantage="grpo", kl=KLConfig(placement="none"))
    assert prepare(experiences, collate(experiences), algorithm, 0.0).batch.advantages.tolist() == [0.0] * 8
    assert not math.isnan(prepare(experiences, collate(experiences), algorithm, 0.0).kl)


def taught(experiences: list[Experience], logprobs: np.ndarray) -> list[Experience]:
    parts = np.split(logprobs, np.cumsum(LENGTHS)[:-1])
    return [replace(e, teacher_logprobs=part) for e, part in zip(experiences, parts, strict=True)]


def test_a_teachers_advantages_are_added_to_the_rewards(experiences, batch):
    """c·(log π_T − log π_old) at each token, after the whitening of the reward's advantages."""
    teacher = batch.rollout_logprobs + np.random.default_rng(3).normal(0, 0.5, sum(LENGTHS)).astype(np.float32)
    algorithm = AlgorithmConfig()
    plain = prepare(experiences, batch, algorithm, 0.1)
    both = prepare(taught(experiences, teacher), batch, algorithm, 0.1, teaching=0.7)
    difference = teacher - batch.old_logprobs
    np.testing.assert_allclose(both.batch.advantages, plain.batch.advantages + 0.7 * difference, atol=1e-6)
    np.testing.assert_array_equal(both.batch.returns, plain.batch.returns)
    assert both.teacher_kl == pytest.approx(-difference.mean(), abs=1e-6) and plain.teacher_kl is None


def test_a_teacher_alone_and_oracle_23(experiences, batch):
    """Without a reward the advantages are the teacher's only; they are 0 if teacher and student are the same."""
    alone = AlgorithmConfig(advantage="none", kl=KLConfig(placement="none"))
    teacher = batch.rollout_logprobs
    prepared = prepare(taught(experiences, teacher), batch, alone, 0.0, teaching=2.0)
    np.testing.assert_allclose(prepared.batch.advantages, 2 * (teacher - batch.old_logprobs), atol=1e-6)
    assert prepared.batch.returns is None
    itself = prepare(taught(experiences, batch.old_logprobs), batch, alone, 0.0, teaching=2.0)
    assert (itself.batch.advantages == 0).all() and itself.teacher_kl == 0
