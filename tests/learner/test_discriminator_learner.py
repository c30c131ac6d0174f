"""The discriminator on the real learner: what it scores, what it converges to, and when it stops learning."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.config.teacher import DiscriminatorConfig
from rlhf_ray.driver.extras.discriminator import Discriminator, labeled_batch, scored_at_end
from rlhf_ray.driver.extras.ptx import DemonstrationSource
from rlhf_ray.learner.actor import LearnerSpec
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.models.loading import load_reward_model
from rlhf_ray.models.reward_heads import RewardHeads
from rlhf_ray.types import Experience, Prompt, Rollout, RolloutRequest, Score

OPTIMIZER = {"learning_rate": 2e-3, "schedule": "constant"}
OPTIONS = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}


async def start(model: Path, ranks: int, smoothing: float = 0.0) -> LearnerGroup:
    config = DiscriminatorConfig.model_validate({"workers": {"count": ranks}, "optimizer": OPTIMIZER})
    spec = LearnerSpec("discriminator", str(model), config, AlgorithmConfig(), smoothing=smoothing)
    return await LearnerGroup.start(spec, lambda index: OPTIONS)


@pytest.fixture(scope="module")
def group(ray_cluster, tiny_model) -> Iterator[LearnerGroup]:
    group = asyncio.run(start(tiny_model, ranks=2))
    yield group
    group.close()


def sequences(*counts: tuple[int, int]):
    """For each `(token, times)`: the prompt 7 8 and the answer `token token`, repeated `times` times."""
    ids = [token for token, times in counts for _ in range(times) for token in (7, 8, token, token)]
    return scored_at_end(np.asarray(ids, dtype=np.int32), np.full(len(ids) // 4, 4, dtype=np.int64))


def test_it_scores_the_last_token(group, tiny_model):
    """Scores over two ranks are in the order of the batch."""
    rng = np.random.default_rng(0)
    lengths = np.asarray([9, 3, 30, 4, 17])
    batch = scored_at_end(rng.integers(3, 300, size=lengths.sum()).astype(np.int32), lengths)
    model = load_reward_model(tiny_model, RewardHeads({"reward": 1.0}))
    with torch.no_grad():
        expected = [
            float(
                model(torch.from_numpy(ids.astype(np.int64))[None], attention_mask=torch.ones(1, len(ids))).logits[0, 0]
            )
            for ids in np.split(batch.token_ids, np.cumsum(lengths)[:-1])
        ]
    ours = asyncio.run(group.evaluate(batch))
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.abs(ours).max() < 0.1, "a fresh one says nothing of anybody"


def test_oracle_22_it_converges_to_the_log_ratio(group):
    """Three answers whose frequencies are 6 : 3 : 1 in demonstrations and 1 : 3 : 6 in samples."""

    async def learn() -> np.ndarray:
        batch = labeled_batch(sequences((20, 6), (30, 3), (40, 1)), sequences((20, 1), (30, 3), (40, 6)))
        for number in range(120):
            await group.update(batch, 2e-3 * (1 - number / 120))
        return await group.evaluate(sequences((20, 1), (30, 1), (40, 1)))

    np.testing.assert_allclose(asyncio.run(learn()), np.log([6.0, 1.0, 1 / 6]), atol=0.01)


def experiences(token: int, count: int) -> list[Experience]:
    prompt = Prompt("p", np.asarray([7, 8], dtype=np.int32), ())
    ids, column = np.asarray([token, token], dtype=np.int32), np.zeros(2, dtype=np.float32)
    rollouts = [
        Rollout(RolloutRequest(prompt, i, i), ids, column, column.astype(np.int32), "stop") for i in range(count)
    ]
    return [Experience(rollout, Score(0.0, {}), None) for rollout in rollouts]


def test_it_learns_until_it_is_accurate_enough_and_resumes_from_a_checkpoint(ray_cluster, tiny_model, tmp_path):
    """Samples that differ clearly from the demonstrations: accuracy rises from one half to 1, and then no more updates follow."""
    ppo = PpoConfig.model_validate(
        {
            "steps": 50, "batch_size": 8, "reward": {"model": None},
            "discriminator": {"minibatches": 2, "epochs": 2, "smoothing": 0.0, "optimizer": OPTIMIZER},
        }
    )  # fmt: skip

    async def steps(hook: Discriminator, first: int, count: int) -> list[dict[str, float]]:
        records = []
        for step in range(first, first + count):
            batch = experiences(40, 8)
            await hook.reward(batch, step)
            records.append(await hook.during_update(batch, step))
        return records

    async def train() -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        groups = await asyncio.gather(*(start(tiny_model, ranks=1) for _ in range(2)))
        first, second = (Discriminator(ppo, group, DemonstrationSource(sequences((20, 9)), 0), 0) for group in groups)
        records = await steps(first, 0, 2)
        await groups[0].save_checkpoint(tmp_path / "discriminator_learner")
        await first.save(tmp_path)
        records += await steps(first, 2, 4)
        await groups[1].load_checkpoint(tmp_path / "discriminator_learner")
        await second.restore(tmp_path)
        again = await steps(second, 2, 4)
        assert len(first.replay) == len(second.replay) == 4 * 8
        for group in groups:
            group.close()
        return records, again

    records, again = asyncio.run(train())
    assert again == records[2:], "bit for bit"
    assert records[0]["discriminator/loss"] == pytest.approx(np.log(2), abs=0.01)
    assert records[0]["discriminator/skipped"] == 0, "even one that happens to be right, by scores near 0, learns"
    last = records[-1]
    assert last["discriminator/accuracy"] == 1 and last["discriminator/accuracy_demonstrations"] == 1
    assert last["discriminator/skipped"] == 1 and "discriminator/grad_norm" not in last
    assert last["discriminator/loss"] == records[-2]["discriminator/loss"], "it stayed as it was"
