"""A reward worker's scores, and its errors when a source of reward fails: they name the source and give no number."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.config.reward import RewardConfig
from rlhf_ray.config.section import Workers
from rlhf_ray.models.loading import load_reward_model, load_scalar_model
from rlhf_ray.models.reward_heads import RewardHeads
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.rewards.sources import NARROWING_CALLS, resolve_function
from rlhf_ray.rewards.workers import RewardWorker
from rlhf_ray.types import Score


def test_functions_get_prompts_responses_and_metadata_in_order(reward_worker, rollouts):
    scores = reward_worker(wanted=1.0, echo=1.0).score(rollouts)
    assert [score.parts["wanted"] for score in scores] == [float(i - 2) for i in range(12)]
    assert all(score.parts["echo"] == 1.0 for score in scores), "responses are text, without special tokens, stripped"


def test_the_total_is_the_weighted_sum(reward_worker, rollouts, reward_model):
    scores = reward_worker(reward_model, wanted=0.5, length=-2.0).score(rollouts)
    for score in scores:
        parts = score.parts
        assert set(parts) == {"model", "wanted", "length"}
        assert score.total == pytest.approx(parts["model"] + 0.5 * parts["wanted"] - 2 * parts["length"])


MISBEHAVIOUR = {
    "raises": "raised KeyError: 'no such order'",
    "infinite": "returned inf for 12 of 12 responses; scores must be finite",
    "too_few": "returned shape (11,) for 12 responses; one number for each is needed",
    "one_number": "returned shape () for 12 responses",
    "matrix": "returned shape (12, 1) for 12 responses",
    "words": "could not convert string to float",
    "nothing": "returned shape () for 12 responses",
}


@pytest.mark.parametrize(("name", "reason"), MISBEHAVIOUR.items())
def test_a_function_that_fails_on_all(reward_worker, rollouts, name, reason):
    answers = reward_worker(wanted=1.0, **{name: 1.0}).score(rollouts)
    assert all(isinstance(answer, RewardError) and answer.source == name for answer in answers)
    text = str(answers[0])
    alone = "raised" in reason or "convert" in reason
    named = "(rollouts p0/0)" if alone else "(rollouts p0/0, p1/0, p2/0, …)"
    assert reason in text and f"reward source '{name}'" in text and text.endswith(named)


def test_only_the_failing_rollouts_are_lost(reward_worker, rollouts):
    answers = reward_worker(wanted=1.0, nan_where_marked=1.0).score(rollouts)
    assert [isinstance(answer, RewardError) for answer in answers] == [True] * 2 + [False] * 10
    assert answers[0].rollout_ids == ("p0/0", "p1/0") and "returned nan for 2 of 12" in str(answers[0])
    assert [answer.total for answer in answers[2:]] == [i - 2 + 1.0 for i in range(2, 12)]


def test_two_sources_that_fail_on_different_rollouts(reward_worker, rollouts):
    """1/score raises on a batch with a score of 0 (p2); only that rollout is lost."""
    answers = reward_worker(nan_where_marked=1.0, raises_on_marked=1.0).score(rollouts)
    assert [answer.source for answer in answers[:2]] == ["nan_where_marked"] * 2
    assert "ZeroDivisionError" in str(answers[2]) and answers[2].rollout_ids == ("p2/0",)
    assert [score.total for score in answers[3:]] == pytest.approx([1 + 1 / (i - 2) for i in range(3, 12)])


def test_the_search_for_failing_rollouts_is_bounded(reward_worker, rollouts):
    """Twenty of 240 raise, more than the allowed calls can isolate, so some are lost together with their neighbours."""
    many = [replace(r, request=replace(r.request, sample_index=i)) for i in range(20) for r in rollouts]
    worker = reward_worker(raises_on_marked=1.0)
    (source,), calls = worker.sources, []
    function = source.function
    source.function = lambda **texts: calls.append(len(texts["responses"])) or function(**texts)
    answers = worker.score(many)
    assert len(calls) <= 1 + NARROWING_CALLS and max(calls) == calls[0] == len(many) == len(answers)
    zeros = [r.prompt.metadata["score"] == 0 for r in many]
    assert all(isinstance(answer, RewardError) for answer, zero in zip(answers, zeros, strict=True) if zero)
    assert any(isinstance(answer, Score) for answer in answers)
    calls.clear()
    assert [isinstance(answer, RewardError) for answer in worker.score(rollouts)] == [i == 2 for i in range(12)]
    assert len(calls) <= 1 + 2 * 4, "one in twelve: two calls for each halving"


def test_a_model_that_answers_nan_is_an_error_too(reward_worker, rollouts, reward_model, tmp_path):
    model = load_scalar_model(reward_model)
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    answers = reward_worker(tmp_path / "broken").score(rollouts)
    assert all(isinstance(answer, RewardError) and "source 'model': returned nan" in str(answer) for answer in answers)


def test_no_rollouts_no_scores(reward_worker):
    assert reward_worker(length=1.0).score([]) == []


def test_errors_travel_between_processes():
    error = RewardError("model", "returned nan", ["p0/0", "p1/0"])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.source, again.rollout_ids) == (str(error), "model", ("p0/0", "p1/0"))


def test_the_reward_models_score_is_that_of_transformers_normalised(reward_worker, rollouts, reward_model):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32).eval()
    assert (model.config.reward_mean, model.config.reward_std) == (0.7, 2.5)
    for rollout, answer in zip(rollouts, reward_worker(reward_model).score(rollouts), strict=True):
        tokens = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.token_ids])).long()
        with torch.no_grad():
            raw = model.score(model.model(tokens[None]).last_hidden_state[0, -1]).item()
        assert isinstance(answer, Score)
        assert answer.total == pytest.approx((raw - 0.7) / 2.5, abs=1e-5)


@pytest.mark.parametrize("group", [None, "cooks", "mean"])
def test_a_group_is_read_with_its_own_normalisation(rollouts, tiny_model, tmp_path, group):
    heads = RewardHeads({"reward": 1.0}, ("cooks", "guests"))
    model = load_reward_model(tiny_model, heads).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.score.weight.normal_(generator=generator)
        tokens = [torch.from_numpy(np.concatenate([r.prompt.token_ids, r.token_ids])).long() for r in rollouts]
        outputs = torch.stack([model.score(model.model(t[None]).last_hidden_state[0, -1]) for t in tokens]).numpy()
    heads.write(model.config, outputs)
    model.save_pretrained(tmp_path / "groups")
    config = RewardConfig.model_validate({"model": {"group": group, "weight": 2.0}, "workers": Workers(threads=1)})
    totals = [
        score.total for score in RewardWorker(config, [str(tmp_path / "groups")], str(tiny_model)).score(rollouts)
    ]
    expected = outputs @ {None: [1, 0, 0], "cooks": [1, 1, 0], "mean": [1, 0.5, 0.5]}[group]
    assert totals == pytest.approx(2 * (expected - expected.mean()) / expected.std(), abs=1e-4)


@pytest.mark.parametrize("combine", ["mean", "min", "uncertainty"])
def test_an_ensemble_of_folders(reward_worker, rollouts, reward_model, tiny_model, tmp_path, combine):
    other = tmp_path / "other"
    model = load_scalar_model(tiny_model, seed=9)
    model.config.reward_mean, model.config.reward_std = -0.5, 0.25
    model.save_pretrained(other)
    alone = np.asarray([[s.total for s in reward_worker(path).score(rollouts)] for path in (reward_model, other)])
    source = {"combine": combine, "penalty": 0.5, "weight": 2.0}
    config = RewardConfig.model_validate({"model": source, "workers": Workers(threads=1)})
    worker = RewardWorker(config, [str(reward_model), str(other)], str(tiny_model))
    expected = {"mean": alone.mean(0), "min": alone.min(0), "uncertainty": alone.mean(0) - 0.5 * alone.std(0)}[combine]
    scores = worker.score(rollouts)
    assert [score.total for score in scores] == pytest.approx(2 * expected, abs=1e-5)
    assert [score.parts["model_disagreement"] for score in scores] == pytest.approx(alone.std(0), abs=1e-5)

    raw = np.asarray(worker.raw_rewards(rollouts)).T
    worker.normalise([(row.mean(), row.std()) for row in raw])
    again = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
    parts = [score.parts["model_disagreement"] for score in worker.score(rollouts)]
    assert parts == pytest.approx(again.std(0), abs=1e-5)


@pytest.mark.parametrize("budget", [1, 150, 8192])
def test_batching_and_padding_change_nothing(reward_worker, rollouts, reward_model, budget):
    worker = reward_worker(reward_model, budget)
    alone = [worker.score([rollout])[0].total for rollout in rollouts]
    assert np.ptp(alone) > 0.1, "the responses differ"
    assert [score.total for score in worker.score(rollouts)] == pytest.approx(alone, abs=1e-5)
    assert [score.total for score in worker.score(rollouts[::-1])] == pytest.approx(alone[::-1], abs=1e-5)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("misbehaving_on_import:f", "cannot import 'misbehaving_on_import': ZeroDivisionError"),
        ("misbehaving", "expected the form package.module:name"),
        ("misbehaving:f", "has no 'f'"),
        ("misbehaving:NOT_A_FUNCTION", "is not a function but int"),
        ("misbehaving:two_parameters", r"parameters \(prompts, responses\).*unexpected keyword argument 'metadata'"),
        ("misbehaving:other_names", "missing a required argument: 'about'"),
        ("misbehaving:asynchronous", "is async; expected a plain function"),
    ],
)
def test_unusable_functions_are_refused_before_work_starts(functions, path, message):
    with pytest.raises(ValueError, match=f"reward function '{path}'.*{message}"):
        resolve_function(path)


def test_functions_with_other_signatures_that_accept_the_call(functions):
    assert resolve_function("misbehaving:keywords")(prompts=[], responses=["a"], metadata=[]) == [1.0]
