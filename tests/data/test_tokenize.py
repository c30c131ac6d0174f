"""Tokenisation: prompts are prefixes, the loss falls on the assistant's tokens, nothing is truncated."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_ray.data.limits import LengthLimit
from rlhf_ray.data.records import Demonstration, PromptRecord
from rlhf_ray.data.tokenize import encode_demonstrations, encode_dialogue, encode_prompt, encode_prompts
from rlhf_ray.models.tiny import CHAT_TEMPLATE, train_tokenizer

DIALOGUE = (
    {"role": "user", "content": "Where is order 42?"},
    {"role": "assistant", "content": "Who asks?"},
    {"role": "user", "content": "Me. Where is it?"},
    {"role": "assistant", "content": "On its way."},
)
UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([turn["content"] for turn in DIALOGUE] * 50, 300, 256)


@pytest.fixture(params=["marked", "unmarked"])
def either(request, tokenizer, monkeypatch):
    if request.param == "unmarked":
        monkeypatch.setattr(tokenizer, "chat_template", UNMARKED)
    return tokenizer


def test_loss_falls_on_the_assistants_tokens_one_by_one(either):
    dialogue = encode_dialogue(either, DIALOGUE)
    expected: list[tuple[int, bool]] = []
    for turn in DIALOGUE:
        is_loss = turn["role"] == "assistant"
        opening = either.encode(f"<|im_start|>{turn['role']}\n", add_special_tokens=False)
        content = either.encode(f"{turn['content']}<|im_end|>", add_special_tokens=False)
        newline = either.encode("\n", add_special_tokens=False)
        expected += [(token, False) for token in opening]
        expected += [(token, is_loss) for token in content]
        expected += [(token, False) for token in newline]
    assert list(zip(dialogue.token_ids.tolist(), dialogue.loss_mask.tolist(), strict=True)) == expected
    assert either.decode(dialogue.token_ids[dialogue.loss_mask]) == "Who asks?<|im_end|>On its way.<|im_end|>"
    assert (dialogue.token_ids.dtype, dialogue.loss_mask.dtype) == (np.int32, bool)


def test_a_prompt_is_a_prefix_of_every_dialogue_that_continues_it(either):
    for turns in (1, 3):
        prompt = encode_prompt(either, DIALOGUE[:turns])
        dialogue = encode_dialogue(either, DIALOGUE[: turns + 1])
        assert dialogue.token_ids[: len(prompt)].tolist() == prompt.tolist()
        assert dialogue.loss_mask[len(prompt)] and not dialogue.loss_mask[len(prompt) - 1]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, monkeypatch):
    rewriting = "{% for message in messages %}{% if loop.last %}{{ message['content'] }}{% endif %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", rewriting)
    with pytest.raises(ValueError, match="writes earlier turns differently"):
        encode_dialogue(tokenizer, DIALOGUE)


def test_what_is_too_long_is_counted_and_left_out_whole(tokenizer):
    short, long = Demonstration(DIALOGUE[:2]), Demonstration(DIALOGUE)
    limit = len(encode_dialogue(tokenizer, DIALOGUE)) - 1
    encoded = encode_demonstrations(tokenizer, [long, short, long], LengthLimit(limit))
    assert encoded.too_long == 2
    assert [item.token_ids.tolist() for item in encoded.items] == [
        encode_dialogue(tokenizer, short.messages).token_ids.tolist()
    ]
    assert encode_demonstrations(tokenizer, [long], LengthLimit(limit + 1)).too_long == 0


def test_prompts_keep_their_identity_and_metadata(tokenizer):
    record = PromptRecord("p1", DIALOGUE[:1], {"answer": 42})
    [prompt] = encode_prompts(tokenizer, [record], LengthLimit(100)).items
    assert (prompt.id, prompt.messages, prompt.metadata) == ("p1", DIALOGUE[:1], {"answer": 42})
    assert prompt.token_ids.tolist() == encode_prompt(tokenizer, DIALOGUE[:1]).tolist()
    assert encode_prompts(tokenizer, [record], LengthLimit(3)).too_long == 1
