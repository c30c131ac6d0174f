"""Transcripts of hh-rlhf: turns, shared prompts, and the errors in real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.data.fields import parse_transcript, split_pair
from rlhf_ray.data.readers import Source, load

HARMLESS = Path(__file__).parents[2].parent / "shared" / "data" / "hh-rlhf-harmless" / "pairs.jsonl"


def turns(*contents: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents))


def test_turns_are_split_at_markers_only():
    text = "\n\nHuman: one\n\ntwo: Human: x\n\nAssistant: three\n\nHuman: four\n\nAssistant: five\n"
    assert parse_transcript(text) == turns("one\n\ntwo: Human: x", "three", "four", "five")


def test_neighbouring_turns_of_one_speaker_are_joined():
    assert parse_transcript("\n\nHuman: a\n\nHuman: b\n\nAssistant: c") == turns("a\n\nb", "c")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (None, "is empty"),
        ("hello", "must begin with the marker"),
        ("\n\nHuman: a\n\nAssistant: ", r"turn 2 \(Assistant\) is empty"),
        ("\n\nHuman: a", "end with Assistant"),
        ("\n\nAssistant: a", "begin with Human"),
    ],
)
def test_texts_that_are_not_transcripts_are_refused(text, reason):
    with pytest.raises(ValueError, match=f"chosen.* {reason}"):
        parse_transcript(text, "chosen")


def test_a_pair_shares_its_dialogue_up_to_the_last_turn():
    chosen, rejected = turns("a", "b", "c", "yes"), turns("a", "b", "c", "no")
    assert split_pair(chosen, rejected) == (turns("a", "b", "c"), chosen[3:], rejected[3:])


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        (turns("a", "b", "c", "d"), turns("a", "x", "y", "z"), 1),
        (turns("a", "b", "c", "d"), turns("a", "b", "y", "z"), 1),
        (turns("a", "b"), turns("a", "b", "c", "d"), 1),
        (turns("a", "b", "c", "d", "e", "f"), turns("a", "b", "c", "x"), 3),
    ],
)
def test_dialogues_that_differ_early_keep_the_rest_on_each_side(chosen, rejected, shared):
    prompt, one, other = split_pair(chosen, rejected)
    assert prompt == chosen[:shared] and prompt[-1]["role"] == "user"
    assert (prompt + one, prompt + other) == (chosen, rejected)
    assert one[0]["role"] == other[0]["role"] == "assistant"


def test_pairs_without_a_shared_turn_or_a_difference_are_refused():
    with pytest.raises(ValueError, match="share no turn"):
        split_pair(turns("a", "b"), turns("x", "b"))
    with pytest.raises(ValueError, match="the same dialogue"):
        split_pair(turns("a", "b"), turns("a", "b"))


@pytest.mark.skipif(not HARMLESS.exists(), reason="the hh-rlhf sample is not here")
def test_real_transcripts(tmp_path):
    source = Source(HARMLESS, on_malformed="quarantine", quarantine=tmp_path / "bad.jsonl")
    pairs, prompts = load("pairs", source), load("prompts", source)
    lines = sum(1 for line in HARMLESS.open(encoding="utf-8") if line.strip())
    assert len(pairs.records) + pairs.quarantined == lines
    assert pairs.quarantined < 0.02 * lines
    assert len(prompts.records) == len(pairs.records) <= len(load("demonstrations", source).records)
    assert max(len(pair.prompt) for pair in pairs.records) > 2
    for pair in pairs.records:
        assert pair.prompt[-1]["role"] == "user" and pair.chosen[-1]["role"] == pair.rejected[-1]["role"] == "assistant"
        assert pair.chosen != pair.rejected
