"""From records to the batch of a reward model: the columns of labels, and the records that are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.config.supervised import GroupsConfig, ReliabilityConfig, RewardModelConfig
from rlhf_ray.data.datasets import Datasets, Split
from rlhf_ray.data.labels import build_label_encoder, pack_examples, pair_of_edit
from rlhf_ray.data.limits import LengthLimit
from rlhf_ray.data.records import Edit, Message, Pair, Ranking, Scored
from rlhf_ray.data.rows import DataError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.reward_heads import RewardHeads
from rlhf_ray.stages.reward_model import feedback

PROMPT = ({"role": "user", "content": "Where is my order 1234?"},)


def says(text: str) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": text},)


PAIR = Pair(PROMPT, says("On Monday."), says("I am sorry, who knows."), group="cooks", annotator="ann")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def batch_of(tokenizer, config: RewardModelConfig, *records):
    encoder = build_label_encoder(config, records)
    return encoder, pack_examples(encoder.encode(tokenizer, records, LengthLimit(200)).items)


def test_pairs(tokenizer):
    config = RewardModelConfig(groups=GroupsConfig(minimum_labels=2), reliability=ReliabilityConfig())
    tie = replace(PAIR, preference=0.5, margin=2.0, weight=3.0, group="guests", annotator="bob")
    encoder, batch = batch_of(tokenizer, config, PAIR, replace(PAIR, annotator=None), tie)
    assert encoder.heads == RewardHeads({"reward": 1.0}, ("cooks",)), "one label is not enough for the guests"
    assert encoder.annotators == ("ann", "bob")
    assert batch.labels[0::2].tolist() == [[1, 1, 1, 0], [1, 0, 1, 0], [0, 2, 0.5, 2]]
    assert (batch.labels[0::2] == batch.labels[1::2]).all()
    assert batch.weights.tolist() == [1, 0, 1, 0, 3, 0] and batch.element_sizes.tolist() == [2, 2, 2]


def test_sequences_end_where_rollouts_do(tokenizer):
    _, batch = batch_of(tokenizer, RewardModelConfig(), PAIR)
    ends = np.cumsum(batch.lengths) - 1
    assert (batch.token_ids[ends] == tokenizer.eos_token_id).all()
    assert np.flatnonzero(batch.target_mask).tolist() == ends.tolist()
    text = tokenizer.decode(batch.token_ids[: batch.lengths[0]])
    assert PROMPT[0]["content"] in text and "On Monday." in text and "who knows" not in text


def test_rankings(tokenizer):
    three = Ranking(PROMPT, (says("one"), says("two"), says("three")), (2, 1, 2), group="cooks")
    two = Ranking(PROMPT, (says("one"), says("two")), (1, 2), weight=0.5)
    _, batch = batch_of(tokenizer, RewardModelConfig(kind="rankings"), three, two)
    assert batch.element_sizes.tolist() == [3, 2] and batch.labels[:, 2].tolist() == [2, 1, 2, 1, 2]
    assert batch.weights.tolist() == [1, 0, 0, 0.5, 0] and (batch.labels[:, :2] == 0).all()
    crowd = Ranking(PROMPT, tuple(says(str(i)) for i in range(13)), (1,) * 13)
    data = Datasets(None, None, None, rankings=Split((two,), (crowd,)))
    assert feedback(RewardModelConfig(kind="rankings"), data) == data.rankings
    with pytest.raises(DataError, match="ranking 2 has more than 12 of its 13 responses on one rank"):
        feedback(RewardModelConfig(kind="rankings", ranking_loss="plackett_luce"), data)


def test_scores_are_standardised_by_the_training_ratings(tokenizer):
    config = RewardModelConfig(kind="scores", aspects={"helpful": 0.5, "polite": 2.0})
    ratings = [{"helpful": 1.0, "polite": 5.0}, {"helpful": 3.0}, {"helpful": 2.0, "polite": 1.0}, {"other": 3.0}]
    records = [Scored(PROMPT, says(str(i)), scores) for i, scores in enumerate(ratings)]
    encoder, batch = batch_of(tokenizer, config, *records)
    assert encoder.heads.weights == config.aspects and encoder.scales[1] == (3.0, 2.0)
    assert len(batch) == 3, "the last has no rating that is learned"
    helpful, polite = batch.labels[:, 2], batch.labels[:, 3]
    assert helpful.mean() == pytest.approx(0, abs=1e-6) and helpful.std() == pytest.approx(1.0)
    assert polite[0] == 1.0 and np.isnan(polite[1]) and polite[2] == -1.0


def test_what_does_not_fit_is_left_out_whole_and_counted(tokenizer):
    long = replace(PAIR, rejected=says("I am sorry. " * 40))
    encoded = build_label_encoder(RewardModelConfig(), [PAIR, long]).encode(
        tokenizer, [PAIR, long, replace(PAIR, weight=0.0)], LengthLimit(60)
    )
    assert (len(encoded.items), encoded.too_long) == (1, 1)


def test_edits_are_pairs():
    edit = Edit(PROMPT, says("dunno"), says("On Monday."), annotator="ann", group="cooks", weight=2.0)
    pair = pair_of_edit(edit)
    assert (pair.chosen, pair.rejected, pair.preference) == (edit.edited, edit.original, 1.0)
    assert (pair.annotator, pair.group, pair.weight) == ("ann", "cooks", 2.0)
    data = Datasets(None, Split((PAIR,), (PAIR,)), None, edits=Split((edit,), ()))
    assert feedback(RewardModelConfig(), data) == Split((PAIR, pair), (PAIR,))
    alone = Datasets(None, None, None, edits=Split((edit,), (edit,)))
    assert feedback(RewardModelConfig(), alone) == Split((pair,), (pair,))
    with pytest.raises(DataError, match="reward_model.kind scores needs data.scores; the run has none"):
        feedback(RewardModelConfig(kind="scores"), alone)


def test_records_that_cannot_be_learned_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"no annotator group has 200 training labels \(cooks 1\); lower"):
        build_label_encoder(RewardModelConfig(groups=GroupsConfig()), [PAIR])
    with pytest.raises(DataError, match="group is called 'mean'"):
        build_label_encoder(RewardModelConfig(groups=GroupsConfig(minimum_labels=1)), [replace(PAIR, group="mean")])
    scored = Scored(PROMPT, says("yes"), {"clear": 2.0})
    with pytest.raises(DataError, match="'overall' has no rating in all training records, which have clear"):
        build_label_encoder(RewardModelConfig(kind="scores"), [scored])
    with pytest.raises(DataError, match="'clear' has equal ratings"):
        build_label_encoder(RewardModelConfig(kind="scores", aspects={"clear": 1.0}), [scored, scored])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "rankings", "reliability": {}}, "reliability needs kind pairs, and kind is rankings"),
        ({"aspects": {"helpful": 1.0}}, "aspects is used by kind scores only, and kind is pairs"),
        ({"kind": "scores", "aspects": {"helpful": 0.0}}, "at least one aspect must have a factor other than 0"),
        ({"kind": "scores", "ranking_loss": "choice"}, "ranking_loss is used by kind rankings only"),
        ({"kind": "rankings", "margin": 0.5}, "margin is used by kind pairs only"),
    ],
)
def test_meaningless_combinations_of_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardModelConfig.model_validate(settings)
