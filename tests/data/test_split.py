"""The split by hash: stable, disjoint, and of about the size asked for."""

from __future__ import annotations

import pytest

from rlhf_ray.data.datasets import is_held_out, split_held_out

PROMPTS = [({"role": "user", "content": f"question {number}"},) for number in range(2000)]


def test_the_side_depends_on_the_prompt_alone():
    train, held_out = split_held_out(PROMPTS, lambda prompt: prompt, 0.1)
    again = split_held_out(PROMPTS[::-1] + PROMPTS[:10], lambda prompt: prompt, 0.1)
    assert {str(prompt) for prompt in held_out} == {str(prompt) for prompt in again[1]}
    assert not {str(prompt) for prompt in train} & {str(prompt) for prompt in again[1]}


def test_the_share_is_about_the_fraction_and_the_salt_changes_who():
    sides = [sum(is_held_out(prompt, 0.1, salt) for prompt in PROMPTS) for salt in ("", "other")]
    assert all(150 < count < 250 for count in sides)
    both = sum(is_held_out(prompt, 0.1) and is_held_out(prompt, 0.1, "other") for prompt in PROMPTS)
    assert both < 50


def test_the_bounds_hold_out_nothing_and_everything():
    assert split_held_out(PROMPTS, lambda prompt: prompt, 0)[1] == []
    assert split_held_out(PROMPTS, lambda prompt: prompt, 1)[0] == []
    with pytest.raises(ValueError, match=r"fraction 1.5"):
        split_held_out(PROMPTS, lambda prompt: prompt, 1.5)


def test_known_sides_stay_as_they_are():
    # A changed hash would move prompts from training to held-out between releases.
    assert [number for number in range(30) if is_held_out(PROMPTS[number], 0.2)] == [0, 6, 14, 19, 27, 28]
