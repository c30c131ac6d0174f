"""Records that are too long: left out or shortened from the oldest turn, and always counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.limits import LengthLimit, fit, with_fewer_turns
from rlhf_ray.data.records import Demonstration, Pair, PromptRecord


def turns(roles: str):
    names = {"s": "system", "u": "user", "a": "assistant"}
    return tuple({"role": names[role], "content": f"{role}{number}"} for number, role in enumerate(roles))


def test_the_oldest_exchange_goes_first_and_the_system_stays():
    prompt = PromptRecord("p", turns("suauau"))
    kept = ["".join(turn["content"] for turn in shorter.messages) for shorter in with_fewer_turns(prompt)]
    assert kept == ["s0u3a4u5", "s0u5"]


def test_answers_are_never_cut():
    demonstration = Demonstration(turns("uauaa"))
    assert [d.messages for d in with_fewer_turns(demonstration)] == [turns("uauaa")[2:]]


def test_feedback_is_left_out_whole():
    pair = Pair(turns("uau"), turns("a"), turns("aua"))
    encoded = fit([pair], lambda record: record, lambda record: len(record.prompt), LengthLimit(2, "truncate"))
    assert (encoded.items, encoded.too_long, encoded.shortened) == ((), 1, 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 10), st.sampled_from(["drop", "truncate"]))
def test_every_record_is_kept_shortened_or_counted(exchanges, tokens, too_long):
    """A record of n exchanges has 2n − 1 turns; one turn counts as one token."""
    records = [PromptRecord(str(n), turns("ua" * (n - 1) + "u")) for n in exchanges]
    encoded = fit(records, lambda record: record, lambda record: len(record.messages), LengthLimit(tokens, too_long))
    whole = [record for record in records if len(record.messages) <= tokens]
    assert len(encoded.items) + encoded.too_long == len(records)
    assert all(len(item.messages) <= tokens for item in encoded.items)
    assert encoded.shortened == (len(records) - len(whole) if too_long == "truncate" else 0)
    assert (
        all(item.messages[-1] == record.messages[-1] for item, record in zip(encoded.items, records, strict=False))
        or too_long == "drop"
    )
    if too_long == "drop":
        assert list(encoded.items) == whole
