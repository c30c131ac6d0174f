"""The discriminator's output: its figures, its part of every score, and when it counts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_ray.batch import pack_sequences
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.driver.extras.discriminator import Discriminator, DiscriminatorOutput
from rlhf_ray.driver.extras.ptx import DemonstrationSource
from rlhf_ray.types import Experience, Prompt, Rollout, RolloutRequest, Score

LIKE, UNLIKE = np.asarray([2.0, 1.0, 9.0], dtype=np.float32), np.asarray([-1.0, 0.5, -9.0], dtype=np.float32)


def discriminator(**ppo) -> Discriminator:
    fields = {
        "batch_size": 3,
        "reward": {"model": None},
        "discriminator": {"minibatches": 1, "clip": 4.0, "weight": 2.0},
    }
    batch = pack_sequences([np.asarray([5, 6])], [np.asarray([False, True])])
    return Discriminator(PpoConfig.model_validate(fields | ppo), None, DemonstrationSource(batch, 0), 0)


def experiences(total: float, parts: dict[str, float]) -> list[Experience]:
    prompt = Prompt("p", np.asarray([3], dtype=np.int32), ())
    ids, logprobs = np.asarray([4], dtype=np.int32), np.zeros(1, dtype=np.float32)
    rollouts = [
        Rollout(RolloutRequest(prompt, i, i), ids, logprobs, np.zeros(1, dtype=np.int32), "stop") for i in range(3)
    ]
    return [Experience(rollout, Score(total, parts), None) for rollout in rollouts]


def test_figures():
    output = DiscriminatorOutput.of(UNLIKE, LIKE, smoothing=0.0)
    assert output.accuracy_demonstrations == 1 and output.accuracy_samples == pytest.approx(2 / 3)
    assert output.accuracy == pytest.approx(5 / 6)
    assert output.score_gap == pytest.approx(4 + 9.5 / 3)
    expected = sum(math.log1p(math.exp(-f)) for f in LIKE) / 6 + sum(math.log1p(math.exp(f)) for f in UNLIKE) / 6
    assert output.loss == pytest.approx(expected, rel=1e-5)
    assert DiscriminatorOutput.of(np.zeros(3, np.float32), np.zeros(5, np.float32), 0.1).loss == pytest.approx(
        math.log(2)
    )


def test_its_part_is_clipped_weighed_and_added():
    hook, output = discriminator(), DiscriminatorOutput.of(UNLIKE, LIKE, 0.0)
    scored = hook.add_reward(experiences(1.0, {"rule": 1.0}), output)
    assert [e.score.parts for e in scored] == [{"rule": 1.0, "discriminator": f} for f in (-1.0, 0.5, -4.0)]
    assert [e.score.total for e in scored] == [-1.0, 2.0, -7.0]
    assert hook.trusts(output) and not hook.leaves_unrewarded(output)


FUNCTIONS = {"reward": {"model": None, "functions": [{"name": "rule", "function": "a:b"}]}}


@pytest.mark.parametrize(("ppo", "waits"), [({}, True), (FUNCTIONS, False)], ids=["alone", "with a rule"])
def test_a_discriminator_that_is_not_accurate_gives_no_reward(ppo, waits):
    """Half of the samples and half of the demonstrations are misclassified."""
    hook, output = (
        discriminator(**ppo),
        DiscriminatorOutput.of(np.asarray([-1.0, 1.0, 0.0], np.float32), LIKE - LIKE, 0.0),
    )
    assert output.accuracy == 0.5
    scored = hook.add_reward(experiences(1.0, {"rule": 1.0}), output)
    assert [e.score.total for e in scored] == [1.0] * 3 and [e.score.parts["discriminator"] for e in scored] == [
        -1,
        1,
        0,
    ]
    assert hook.leaves_unrewarded(output) == waits


def test_every_step_shows_other_demonstrations():
    source = DemonstrationSource(
        pack_sequences([np.asarray([i, i]) for i in range(40)], [np.asarray([False, True])] * 40), 0
    )
    hook = discriminator()
    hook.demonstrations = source
    seen = [number for step in range(6) for shown in hook._shown(step) for number in shown.token_ids[::2]]
    assert len(seen) == len(set(seen)) == 36, (
        "as many as there are samples, 3 new and 3 old, and none twice in an epoch"
    )
