"""Every row format, as it occurs in people's files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.formats import PARSERS, detect_format
from rlhf_ray.data.records import Edit, Pair, Ranking, Scored

ASK = {"role": "user", "content": "When does it come?"}
GOOD, BAD = {"role": "assistant", "content": "On Monday."}, {"role": "assistant", "content": "Who knows."}
LABEL = {"annotator": "ann", "group": "cooks", "weight": 2.0}


def read(kind, row):
    return PARSERS[kind][detect_format(row)](row)


PAIR_ROWS = {
    "conversational": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "plain": {"prompt": ASK["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
    "implicit prompt": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "hh": {"chosen": "\n\nHuman: When does it come?\n\nAssistant: On Monday.",
           "rejected": "\n\nHuman: When does it come?\n\nAssistant: Who knows."},
    "openai": {"input": {"messages": [ASK], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "edit": {"prompt": [ASK], "original": BAD["content"], "edited": GOOD["content"]},
    "whole dialogues with the prompt": {"prompt": ASK["content"], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "with messages too": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "messages": [ASK, GOOD]},
}  # fmt: skip


@pytest.mark.parametrize("row", PAIR_ROWS.values(), ids=PAIR_ROWS)
def test_a_pair_is_read_equally_from_every_format(row):
    assert read("pairs", row | LABEL) == Pair((ASK,), (GOOD,), (BAD,), {}, "ann", "cooks", weight=2.0)
    assert read("demonstrations", row).messages == (ASK, GOOD)
    assert read("prompts", row).messages == (ASK,)


@pytest.mark.parametrize(
    ("label", "preference", "margin"),
    [({}, 1.0, None), ({"preference": 0.7, "margin": 2}, 0.7, 2.0), ({"tie": True}, 0.5, None), ({"preference": 0}, 0.0, None)],
)  # fmt: skip
def test_soft_labels_ties_and_margins(label, preference, margin):
    pair = read("pairs", PAIR_ROWS["plain"] | label)
    assert (pair.preference, pair.margin) == (preference, margin)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, GOOD]},
        {"prompt": ASK["content"], "completion": GOOD["content"]},
        {"prompt": [ASK], "completion": [GOOD]},
        {"question": ASK["content"], "answer": GOOD["content"]},
    ],
)
def test_demonstrations(row):
    assert read("demonstrations", row).messages == (ASK, GOOD)
    assert read("prompts", row).messages == (ASK,)


def test_the_reference_answer_and_other_columns_are_there_for_reward_functions():
    assert read("prompts", {"question": "1 + 1?", "answer": "#### 2"}).metadata == {"answer": "#### 2"}
    prompt = read("prompts", {"prompt": "1 + 1?", "solution": 2, "metadata": {"level": 1}, "group": "x"})
    assert prompt.metadata == {"level": 1, "solution": 2}


@pytest.mark.parametrize(
    ("order", "ranks"),
    [({"order": [1, 0, 2]}, (2, 1, 3)), ({"order": [[1], [0, 2]]}, (2, 1, 2)),
     ({"order": [[0, 1], 2]}, (1, 1, 3)), ({"ranks": [2, 1, 2]}, (2, 1, 2))],
)  # fmt: skip
def test_rankings_with_ties(order, ranks):
    row = {"prompt": [ASK], "responses": ["On Monday.", [BAD], GOOD], **order} | LABEL
    assert read("rankings", row) == Ranking((ASK,), ((GOOD,), (BAD,), (GOOD,)), ranks, {}, "ann", "cooks", 2.0)


def test_a_ranking_is_pairs_that_share_its_weight():
    row = {"prompt": [ASK], "responses": ["worst", "best", "second", "also second"], "ranks": [4, 1, 2, 2]} | LABEL
    pairs = read("pairs", row)
    choices = [(p.chosen[0]["content"], p.rejected[0]["content"], p.preference) for p in pairs]
    assert sorted(choices) == [
        ("also second", "worst", 1.0), ("best", "also second", 1.0), ("best", "second", 1.0), ("best", "worst", 1.0),
        ("second", "also second", 0.5), ("second", "worst", 1.0),
    ]  # fmt: skip
    assert {(p.annotator, p.group, p.weight) for p in pairs} == {("ann", "cooks", 2.0 / 6)}


@pytest.mark.parametrize(("label", "rating"), [(True, 1.0), (False, 0.0), ("true", 1.0), ("0", 0.0)])
def test_a_boolean_label_is_a_rating_and_only_good_answers_are_demonstrations(label, rating):
    row = {"prompt": ASK["content"], "completion": GOOD["content"], "label": label}
    assert read("scores", row) == Scored((ASK,), (GOOD,), {"overall": rating})
    assert bool(read("demonstrations", row)) == bool(rating)


@pytest.mark.parametrize(("preference", "imitated"), [(1, True), (0.7, True), (0.5, False), (0.2, False)])
def test_only_preferred_answers_are_demonstrations(preference, imitated):
    assert bool(read("demonstrations", PAIR_ROWS["plain"] | {"preference": preference})) == imitated


@pytest.mark.parametrize(
    ("ratings", "scores"),
    [({"score": 3}, {"overall": 3.0}), ({"overall": 3, "aspects": {"tone": 1}}, {"overall": 3.0, "tone": 1.0}),
     ({"scores": {"tone": 1, "truth": "2"}}, {"tone": 1.0, "truth": 2.0})],
)  # fmt: skip
def test_ratings(ratings, scores):
    assert read("scores", {"prompt": [ASK], "response": "On Monday."} | ratings) == Scored((ASK,), (GOOD,), scores)


def test_edits():
    assert read("edits", PAIR_ROWS["edit"]) == Edit((ASK,), (BAD,), (GOOD,))


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("pairs", PAIR_ROWS["plain"] | {"preference": 1.2}, "preference must be a finite number from 0 to 1, not 1.2"),
        ("pairs", PAIR_ROWS["plain"] | {"weight": "much"}, "weight must be a number, not 'much'"),
        ("pairs", PAIR_ROWS["plain"] | {"chosen": ""}, r"chosen\[0\]\.content must be text"),
        ("pairs", PAIR_ROWS["openai"] | {"input": {}}, "no key 'messages'; input has"),
        ("pairs", {"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "same dialogue"),
        ("rankings", {"prompt": [ASK], "responses": ["a"], "order": [0]}, "at least two answers"),
        ("rankings", {"prompt": [ASK], "responses": ["a", "b"], "order": [0, 0]}, "each response 0 to 1 exactly once"),
        ("rankings", {"prompt": [ASK], "responses": ["a", "b"], "ranks": [1]}, "a rank from 1 for each of the 2"),
        ("scores", {"prompt": [ASK], "response": "a"}, "no rating"),
        ("scores", {"prompt": [ASK], "response": "a", "score": float("nan")}, "score must be a finite number"),
        ("edits", {"prompt": [ASK], "original": "a", "edited": "a"}, "the same answer"),
        ("prompts", {"prompt": [ASK, GOOD]}, "must end with a turn to answer"),
        ("pairs", PAIR_ROWS["plain"] | {"rejected": GOOD["content"]}, "answer are the same"),
        (
            "pairs",
            PAIR_ROWS["plain"] | {"rejected": [{"role": "user", "content": "Else?"}, BAD]},
            "rejected must begin with",
        ),
        ("pairs", PAIR_ROWS["plain"] | {"tie": "perhaps"}, "tie must be true or false"),
        ("pairs", PAIR_ROWS["plain"] | {"annotator": ["ann"]}, "annotator must be a name"),
        ("rankings", {"prompt": [ASK], "responses": ["a", "b"], "order": 1}, "each response 0 to 1 exactly once"),
        (
            "rankings",
            {"prompt": [ASK], "responses": ["a", "b"], "order": [["a"], ["b"]]},
            "response 0 to 1 exactly once",
        ),
        ("rankings", {"prompt": [ASK], "responses": ["a", "b"], "ranks": [True, 2]}, "a rank from 1"),
        ("scores", {"prompt": [ASK], "response": "a", "score": 10**400}, "score must be a number"),
        ("scores", {"prompt": [ASK], "completion": "a", "label": 3}, "label must be true or false"),
        ("demonstrations", {"messages": [ASK, GOOD | {"weight": 0}, ASK, GOOD]}, r"messages\[1\].weight is 0"),
    ],
)
def test_errors_name_the_invalid_key(kind, row, reason):
    with pytest.raises(ValueError, match=reason):
        read(kind, row)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "messages", "tone"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=6,
)
GOOD_ROWS = [
    *PAIR_ROWS.values(),
    {"messages": [ASK, GOOD]},
    {"prompt": "Why?", "completion": "So.", "label": True},
    {"prompt": "Why?", "responses": ["a", "b"], "order": [[0], [1]]},
    {"prompt": "Why?", "response": "a", "scores": {"tone": 1}, "score": 1},
    {"question": "Why?", "answer": "So."},
]


@given(st.sampled_from(GOOD_ROWS), st.data())
def test_any_row_is_read_or_refused_with_a_reason(row, data):
    """No other exception is raised: it would end a run that quarantines malformed lines."""
    changed = data.draw(
        st.dictionaries(st.sampled_from([*row, "weight", "margin", "tie", "group", "metadata"]), anything, max_size=2)
    )
    for kind, parsers in PARSERS.items():
        if detect_format(row) in parsers:
            try:
                found = parsers[detect_format(row)](row | changed)
            except ValueError as error:
                assert str(error), kind
            else:
                assert found == () or all(
                    getattr(r, "weight", 1.0) >= 0 for r in (found if isinstance(found, tuple) else (found,))
                )


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"keys \['text'\]; known are .*chosen, rejected"):
        detect_format({"text": "x"})
