"""The prefix property: an observation after sampled tokens has the tokens that the template gives it at this place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.tokenize import encode_dialogue, encode_prompt
from rlhf_ray.environments.template import TemplateRefused, TurnRenderer
from rlhf_ray.errors import InputError
from rlhf_ray.models.tiny import CHAT_TEMPLATE, TURN_END, train_tokenizer

HEADERS = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '## ' + m['role'] + '\n\n' + m['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '## assistant\n\n' }}{% endif %}"
)
"""Like Llama 3, which trims messages."""
INSTRUCTIONS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Like Mistral: nothing marks the beginning of the assistant's turn, and a space stands before its text."""
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ 'system: You help.\n' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Like Qwen 2.5."""
KEEPS = {"chatml": CHAT_TEMPLATE, "headers": HEADERS, "instructions": INSTRUCTIONS, "default system": DEFAULT_SYSTEM}

WITHOUT_THOUGHTS = CHAT_TEMPLATE.replace(
    "{{ message['content'] + '<|im_", "{{ message['content'].split('</think>')[-1] + '<|im_"
)
LAST_QUESTION_ONLY = CHAT_TEMPLATE.replace("in messages", "in messages[-1:]")
COUNTING = CHAT_TEMPLATE.replace("+ message['role'] +", "+ loop.revindex | string + message['role'] +")
NO_END = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
THINKS_FIRST = CHAT_TEMPLATE.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["Where is order 42?\n\n\n Me. On its way. system user assistant ## [INST] [/INST]"] * 20
    return train_tokenizer(texts, 400, 256)


TEXTS = st.text(alphabet="\n .aé Ω42", min_size=1, max_size=12).map(str.strip).filter(bool)


@pytest.mark.parametrize("name", KEEPS)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_an_episode_has_the_tokens_of_the_whole_conversation(tokenizer, name, exchanges):
    """Tested with the tokens of the tokenizer; if the policy sampled others, nothing else changes."""
    tokenizer.chat_template = KEEPS[name]
    renderer = TurnRenderer(tokenizer)
    messages = [{"role": "user", "content": "Where is order 42?"}]
    text, ids = renderer.opening(messages), encode_prompt(tokenizer, messages).tolist()
    for response, answer in exchanges:
        spoken = encode_dialogue(tokenizer, [*messages, {"role": "assistant", "content": response}])
        ids += spoken.token_ids[len(ids) :].tolist()[
            : 1 + spoken.token_ids[len(ids) :].tolist().index(tokenizer.eos_token_id)
        ]
        turn = {"role": "user", "content": answer}
        text, more = renderer.continuation(text, messages, response, [turn], tokenizer.eos_token_id)
        ids += more.tolist()
        messages += [{"role": "assistant", "content": response}, turn]
    assert ids == encode_prompt(tokenizer, messages).tolist()
    assert text == renderer.opening(messages)
    renderer.check()


def test_the_policy_may_end_a_turn_by_another_of_its_end_tokens(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    renderer, messages = TurnRenderer(tokenizer), [{"role": "user", "content": "Me."}]
    answer = [{"role": "user", "content": "On its way."}]
    text = renderer.opening(messages)
    _, usual = renderer.continuation(text, messages, "a", answer, tokenizer.eos_token_id)
    _, other = renderer.continuation(text, messages, "a", answer, tokenizer.pad_token_id)
    assert other.tolist() == [tokenizer.eos_token_id, *usual.tolist()] and other.dtype == np.int32


@pytest.mark.parametrize(
    ("template", "response", "reason"),
    [
        (WITHOUT_THOUGHTS, "<think>Order 42.</think>On its way.", "changes the assistant's text"),
        (LAST_QUESTION_ONLY, "On its way.", "differently after an observation"),
        (COUNTING, "On its way.", "differently after an observation"),
        (THINKS_FIRST, "On its way.", "differently after an observation"),
        (NO_END, "On its way.", "does not end the assistant's turns"),
    ],
)  # fmt: skip
def test_a_template_that_changes_earlier_messages_is_refused(tokenizer, template, response, reason):
    tokenizer.chat_template = template
    renderer, messages = TurnRenderer(tokenizer), [{"role": "user", "content": "Where is order 42?"}]
    with pytest.raises(TemplateRefused, match=reason) as caught:
        renderer.continuation(
            renderer.opening(messages), messages, response, [{"role": "user", "content": "Me."}], tokenizer.eos_token_id
        )
    assert isinstance(caught.value, InputError) and "max_turns to 1" in str(caught.value) and TURN_END


def test_the_check_before_a_run_finds_such_templates(tokenizer):
    for template in (LAST_QUESTION_ONLY, COUNTING, THINKS_FIRST, NO_END):
        tokenizer.chat_template = template
        with pytest.raises(TemplateRefused):
            TurnRenderer(tokenizer).check()
    tokenizer.chat_template = WITHOUT_THOUGHTS
    TurnRenderer(tokenizer).check()  # it only matters if the policy thinks
