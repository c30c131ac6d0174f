"""Admission and group collection as state machines, driven at random and compared with a model that remembers everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlhf_ray.driver.buffer import Admission, GroupCollector, TooManyDrops


class AdmissionMachine(RuleBasedStateMachine):
    """Groups that are admitted, end or are dropped, and are trained, in any order."""

    @initialize(
        groups=st.integers(1, 5), staleness=st.integers(0, 3), version=st.integers(0, 4), attempts=st.integers(1, 3),
        data=st.data(),
    )  # fmt: skip
    def start(self, groups: int, staleness: int, version: int, attempts: int, data: st.DataObject) -> None:
        """Start as a new run, or as one resumed after `version` steps with some groups that were never trained."""
        done = version * groups
        lost = sorted(data.draw(st.sets(st.integers(0, max(0, done - 1)), max_size=done)))
        self.admission = Admission(
            groups, staleness, version, next_group=done, accepted=done, attempts=attempts, again=tuple(lost)
        )
        self.first, self.again = done, lost
        self.admitted: list[int] = []
        self.running = 0
        self.ready = 0
        self.trained = version * groups
        self.dropped = 0

    @rule()
    def admit(self) -> None:
        indices = self.admission.admit()
        self.admitted += indices
        self.running += len(indices)
        assert not self.admission.admit(), "nothing more is admitted until something changes"

    @precondition(lambda self: self.running)
    @rule()
    def accept(self) -> None:
        self.admission.accept()
        self.running -= 1
        self.ready += 1

    @precondition(lambda self: self.running)
    @rule()
    def drop(self) -> None:
        self.dropped += 1
        self.running -= 1
        if self.dropped > self.admission.groups_per_batch:
            with pytest.raises(TooManyDrops, match=f"{self.dropped} groups were dropped"):
                self.admission.drop()
        else:
            self.admission.drop()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def resample(self, data: st.DataObject) -> None:
        """A group without signal makes room for another, or is accepted, by its index alone."""
        index = data.draw(st.sampled_from(self.admitted))
        admission = self.admission
        end = admission.first_of_batch + (admission.attempts - 1) * admission.groups_per_batch
        droppable = admission.attempts > 1 and index < end
        assert self.admission.resample(index) == droppable
        self.running -= droppable

    @precondition(lambda self: self.ready >= self.admission.groups_per_batch)
    @rule()
    def train(self) -> None:
        """Take the oldest groups that are ready; they are at most `staleness` versions old."""
        groups = self.admission.groups_per_batch
        self.ready -= groups
        self.trained += groups
        self.admission.advance_version(self.admission.version + 1)
        self.dropped = 0

    @invariant()
    def never_further_ahead_than_staleness_allows(self) -> None:
        admission = self.admission
        limit = (admission.staleness + admission.version + 1) * admission.groups_per_batch
        assert self.trained + self.ready + self.running <= limit
        assert (admission.accepted, admission.running) == (self.trained + self.ready, self.running)

    @invariant()
    def groups_are_admitted_once_and_in_order(self) -> None:
        again = self.again[: len(self.admitted)]
        fresh = len(self.admitted) - len(again)
        assert self.admitted == [*again, *range(self.first, self.first + fresh)]
        assert self.admission.next_group == self.first + fresh

    @invariant()
    def a_batch_can_always_be_filled(self) -> None:
        """After the next admission there are enough groups for a batch: neither drops nor weight syncs starve training."""
        admission = self.admission
        limit = (admission.staleness + admission.version + 1) * admission.groups_per_batch
        assert limit - self.trained >= admission.groups_per_batch


TestAdmission = AdmissionMachine.TestCase


def test_a_dropped_group_makes_room_for_another():
    admission = Admission(groups_per_batch=3)
    assert list(admission.admit()) == [0, 1, 2]
    admission.drop()
    assert list(admission.admit()) == [3]


def test_drops_are_counted_for_each_batch_anew():
    admission = Admission(groups_per_batch=2)
    for version in (1, 2):
        admission.admit()
        for _ in range(2):
            admission.drop()
            admission.admit()
        for _ in range(2):
            admission.accept()
        admission.advance_version(version)
    admission.admit()
    admission.drop()
    admission.drop()
    admission.admit()
    with pytest.raises(TooManyDrops, match="3 groups were dropped while collecting one batch of 2"):
        admission.drop()


def test_groups_without_signal_are_replaced_until_the_attempts_are_used_up():
    """Two groups for a batch, three attempts: the first four may be replaced, the last two are taken as they are."""
    admission = Admission(groups_per_batch=2, attempts=3)
    assert admission.admit() == [0, 1]
    assert admission.resample(0) and admission.resample(1)
    assert admission.admit() == [2, 3]
    assert admission.resample(3) and admission.admit() == [4]
    assert not admission.resample(4)
    admission.accept()
    assert admission.resample(2) and admission.admit() == [5]
    assert not admission.resample(5)
    admission.accept()
    assert not admission.admit() and admission.dropped_since_batch == 0
    admission.advance_version(1)
    assert admission.admit() == [6, 7] and admission.resample(6), "the next batch has attempts of its own"


def test_without_dynamic_sampling_no_group_is_replaced_however_old():
    """With staleness, and after an interruption, groups are older than the batch that is being collected."""
    admission = Admission(groups_per_batch=2, staleness=1, version=1, next_group=5, accepted=2, again=(3,))
    assert admission.admit() == [3, 5, 6, 7] and not any(admission.resample(index) for index in (3, 5, 6, 7))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_every_group_ends_once_whatever_the_order(groups, size, data):
    arrivals = [(group, sample) for group in range(groups) for sample in range(size)]
    failed = data.draw(st.sets(st.sampled_from(arrivals)))
    assembler, ends = GroupCollector(size), []
    for group, sample in data.draw(st.permutations(arrivals)):
        if (group, sample) in failed:
            if assembler.drop(f"p{group}"):
                ends.append((group, None))
        elif (complete := assembler.add(f"p{group}", sample, (group, sample))) is not None:
            ends.append((group, complete))
    assert sorted(group for group, _ in ends) == list(range(groups))
    for group, complete in ends:
        if any((group, sample) in failed for sample in range(size)):
            assert complete is None
        else:
            assert complete == [(group, sample) for sample in range(size)], "in the order of samples, not of arrival"
    # Nothing is left behind: the same ids may come again.
    assert [assembler.add("p0", sample, sample) for sample in range(size)][-1] == list(range(size))
