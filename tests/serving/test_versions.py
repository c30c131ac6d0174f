"""How publishing, promoting and rolling back change the versions and their traffic."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.serving.versions import Version, VersionError, Versions, draw_of

A, B, C = (Version(name, f"/models/{name}") for name in "abc")


def test_a_canary_is_promoted():
    canary = Versions(A).published(B, 0.1)
    assert canary == Versions(A, B, 0.1)
    assert canary.promoted() == Versions(B, previous=A)
    assert canary.promoted().rolled_back() == Versions(A, previous=B), "and a rollback can itself be rolled back"


def test_a_canary_is_rolled_back():
    assert Versions(A).published(B, 0.1).rolled_back() == Versions(A)


def test_a_full_publication_keeps_the_previous_version():
    assert Versions(A).published(B) == Versions(B, previous=A)
    assert Versions(A, B, 0.5).published(C) == Versions(C, previous=A), "the candidate is retired"
    assert Versions(B, previous=A).published(C, 0.5) == Versions(B, C, 0.5), "the previous one is retired"


def test_impossible_changes_are_refused():
    for share in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(VersionError, match="share"):
            Versions(A).published(B, share)
    with pytest.raises(VersionError, match="'a' is being served; give this one another name with --label"):
        Versions(A).published(A)
    with pytest.raises(VersionError, match="no candidate to promote; 'a' has all the traffic"):
        Versions(A).promoted()
    with pytest.raises(VersionError, match="no version to roll back to"):
        Versions(A).rolled_back()


def do(versions: Versions, step: str, version: Version) -> Versions:
    match step:
        case "publish":
            return versions.published(version)
        case "canary":
            return versions.published(version, 0.3)
        case "promote":
            return versions.promoted()
        case _:
            return versions.rolled_back()


STEPS = st.lists(st.sampled_from(["publish", "canary", "promote", "rollback"]), max_size=12)


@given(STEPS, st.floats(0, 1, exclude_max=True))
def test_invariants_hold_for_every_sequence_of_changes(steps, draw):
    """At most two versions are alive, each once; the chosen one is alive; JSON keeps everything."""
    versions = Versions(A)
    for number, step in enumerate(steps):
        before = versions
        try:
            versions = do(versions, step, Version(f"v{number}", "/models/v"))
        except VersionError:
            assert versions == before
        names = [alive.name for alive in versions.alive]
        assert 1 <= len(names) == len(set(names)) <= 2
        assert before.stable in versions.alive or step == "publish" and before.stable == versions.previous
        assert versions.choose(draw) in versions.alive
        assert Versions.from_dict(json.loads(json.dumps(versions.as_dict()))) == versions


def test_shares_are_kept_and_callers_stay_with_their_version():
    versions = Versions(A, B, 0.1)
    draws = {f"user {number}": draw_of(f"user {number}") for number in range(5000)}
    chosen = [versions.choose(draw).name for draw in draws.values()]
    assert 0.08 < chosen.count("b") / len(chosen) < 0.12
    assert all(draw_of(name) == draw and 0 <= draw < 1 for name, draw in draws.items())
    more = Versions(A, B, 0.5)
    assert all(more.choose(d) == B for d in draws.values() if versions.choose(d) == B), (
        "a growing share keeps its callers"
    )
