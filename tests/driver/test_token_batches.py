"""Batches for scoring: every rollout in one of them, in order, as soon as the budget is reached."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.driver.buffer import TokenBatcher, spread, tokens_of


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 100))
def test_nothing_lost_and_no_batch_kept_back(experience, lengths, budget):
    rollouts = [experience(f"p{i}", 0, length).rollout for i, length in enumerate(lengths)]
    collector, batches = TokenBatcher(budget), []
    for rollout in rollouts:
        if batch := collector.add(rollout):
            batches.append(batch)
    full = len(batches)
    if rest := collector.take():
        batches.append(rest)
    assert [rollout.id for batch in batches for rollout in batch] == [rollout.id for rollout in rollouts]
    for number, batch in enumerate(batches):
        tokens = [len(rollout.prompt.token_ids) + len(rollout) for rollout in batch]
        assert sum(tokens[:-1]) < budget, "it should have been handed on before its last rollout"
        assert sum(tokens) >= budget or number == full
    assert collector.take() == []


@given(st.permutations([(p, i) for p in range(5) for i in range(3)]), st.integers(1, 120), st.integers(0, 2))
def test_groups_stay_whole(experience, arrivals, budget, lost):
    """Whatever the order of arrival; what is left of groups that lost members comes last."""
    arrivals = [arrival for arrival in arrivals if arrival not in [(0, k) for k in range(lost)]]
    collector, batches = TokenBatcher(budget, group=3), []
    for prompt, sample in arrivals:
        if batch := collector.add(experience(f"p{prompt}", sample, 1 + prompt).rollout):
            batches.append(batch)
    assert all(len(batch) % 3 == 0 for batch in batches) and all(sum(map(tokens_of, b)) >= budget for b in batches)
    batches.append(collector.take())
    assert sorted(rollout.id for batch in batches for rollout in batch) == sorted(f"p{p}/{i}" for p, i in arrivals)
    homes = {rollout.prompt.id: number for number, batch in enumerate(batches) for rollout in batch}
    for number, batch in enumerate(batches):
        assert all(homes[rollout.prompt.id] == number for rollout in batch)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(10, 2000), st.integers(1, 4))
def test_spread_over_workers(experience, lengths, budget, workers):
    """In order, nothing lost; no batch is more than one response above its share."""
    rollouts = [experience(f"p{i}", 0, length).rollout for i, length in enumerate(lengths)]
    parts = spread(rollouts, budget, workers)
    assert [rollout.id for part in parts for rollout in part] == [rollout.id for rollout in rollouts]
    total, longest = sum(map(tokens_of, rollouts)), max(map(tokens_of, rollouts))
    assert all(sum(map(tokens_of, part)) < min(budget, -(-total // workers)) + longest for part in parts)
    assert spread([], budget, workers) == []
