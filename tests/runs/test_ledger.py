"""The ledger after crashes has no duplicate and no torn entries, whatever characters ids and reasons contain."""

from __future__ import annotations

import pytest

from rlhf_ray.runs.ledger import Ledger, LedgerEntry, read_ledger

ENTRIES = [
    LedgerEntry(1, ("0/a/0", "0/b/0"), (("0/c", "returned nan"),)),
    LedgerEntry(2, ("0/d/0",)),
    LedgerEntry(3, ("0/e/0",)),
]


def write(path, entries=ENTRIES, resume_step=None) -> Ledger:
    ledger = Ledger(path, resume_step)
    for entry in entries:
        for prompt, reason in entry.dropped:
            ledger.drop(prompt, reason)
        ledger.train(entry.step, entry.trained)
    return ledger


def test_entries_come_back(tmp_path):
    write(tmp_path / "ledger.jsonl")
    assert list(read_ledger(tmp_path / "ledger.jsonl")) == ENTRIES
    assert list(read_ledger(tmp_path / "absent.jsonl")) == []


def test_a_resumed_run_forgets_what_its_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path)
    write(path, [LedgerEntry(2, ("0/d/0",)), LedgerEntry(3, ("0/f/0",))], resume_step=1)
    entries = list(read_ledger(path))
    assert [entry.step for entry in entries] == [1, 2, 3]
    trained = [rollout for entry in entries for rollout in entry.trained]
    assert len(trained) == len(set(trained)) and "0/e/0" not in trained


@pytest.mark.parametrize("resume_step", [None, 0])
def test_a_run_that_starts_over_forgets_everything(tmp_path, resume_step):
    write(tmp_path / "ledger.jsonl")
    Ledger(tmp_path / "ledger.jsonl", resume_step)
    assert list(read_ledger(tmp_path / "ledger.jsonl")) == []


def test_a_torn_line_counts_as_never_written(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_bytes(whole[:-cut])
        assert list(read_ledger(path)) == ENTRIES[:2]
    write(path, [ENTRIES[2]], resume_step=2)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["two\nlines", "next\x85line", "separator\u2028", "umlaut ü", "lone \ud800", '"{}\\'])
def test_any_character_in_ids_and_reasons(tmp_path, text):
    entry = LedgerEntry(1, (f"0/{text}/0",), ((text, text),))
    write(tmp_path / "ledger.jsonl", [entry])
    assert list(read_ledger(tmp_path / "ledger.jsonl")) == [entry]
