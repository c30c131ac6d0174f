"""The order of prompts, their ids and seeds: a function of run, seed and position, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.driver.rollouts import PromptSource
from rlhf_ray.types import Prompt, rollout_seed


def source(count: int = 7, run: str = "run", seed: int = 0, samples: int = 2) -> PromptSource:
    prompts = [
        Prompt(f"q{i}", np.asarray([i], dtype=np.int32), ({"role": "user", "content": str(i)},)) for i in range(count)
    ]
    return PromptSource(prompts, run, seed, samples)


def identities(prompts: PromptSource, indices: range | list[int]) -> list[tuple[str, int]]:
    return [(request.id, request.seed) for index in indices for request in prompts.group(index)]


@given(st.integers(1, 20), st.integers(0, 3), st.integers(0, 9))
def test_every_prompt_once_per_epoch(count, epoch, seed):
    prompts = source(count, seed=seed)
    visited = [prompts.group(index)[0].prompt for index in range(epoch * count, (epoch + 1) * count)]
    assert sorted(int(prompt.token_ids[0]) for prompt in visited) == list(range(count))
    assert {prompt.id.split("/")[0] for prompt in visited} == {str(epoch)}


@given(st.lists(st.integers(0, 40), max_size=20))
def test_groups_are_the_same_in_every_attempt_and_order(indices):
    assert identities(source(), indices) == [pair for index in indices for pair in identities(source(), [index])]


def test_the_samples_of_a_group_share_the_prompt():
    group = source(samples=4).group(9)
    assert [request.sample_index for request in group] == [0, 1, 2, 3]
    assert len({id(request.prompt) for request in group}) == 1
    assert group[2].prompt.messages[0]["content"] == str(int(group[2].prompt.token_ids[0]))


def test_ids_and_seeds_are_unique_in_a_run():
    requests = [request for index in range(21) for request in source().group(index)]
    assert len({request.id for request in requests}) == len({request.seed for request in requests}) == 42
    assert all(0 <= request.seed < 2**63 for request in requests)


def test_runs_and_seeds_sample_differently():
    seeds = {request.seed for index in range(7) for request in source().group(index)}
    for other in (source(run="other"), source(seed=1)):
        assert not seeds & {request.seed for index in range(7) for request in other.group(index)}


def test_epochs_and_seeds_have_different_orders():
    def order(prompts: PromptSource, epoch: int) -> list[int]:
        return [int(prompts.group(epoch * 30 + position)[0].prompt.token_ids[0]) for position in range(30)]

    orders = [order(source(30, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_seed_never_changes_between_versions_of_the_code():
    """A resumed run must sample what the interrupted one would have."""
    assert rollout_seed("run:0", "0/q1", 1) == 6917913848881224088
    assert rollout_seed("run:0", "0/q1", 1) != rollout_seed("run:0", "0/q11", 1)


def test_no_prompts():
    with pytest.raises(ValueError, match="no prompts to sample; see data.prompts"):
        source(count=0)
