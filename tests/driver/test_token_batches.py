"""Batches for scoring: every rollout in one of them, in order, as soon as the budget is reached."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.driver.token_batches import TokenBatches


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 100))
def test_nothing_lost_and_no_batch_kept_back(experience, lengths, budget):
    rollouts = [experience(f"p{i}", 0, length).rollout for i, length in enumerate(lengths)]
    collector, batches = TokenBatches(budget), []
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
