"""Chat templates of real models: the learned tokens, one by one; a prompt is a prefix of every dialogue that continues it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.tokenize import TemplateError, encode_dialogue, encode_prompt
from rlhf_ray.errors import InputError
from rlhf_ray.models.tiny import CHAT_TEMPLATE, train_tokenizer

END = "<|im_end|>"
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Where is order 42?"}
ANSWER = {"role": "assistant", "content": "Who asks?"}
AGAIN = {"role": "user", "content": "Me."}
LAST = {"role": "assistant", "content": "On its way."}
DIALOGUE = (SYSTEM, ASK, ANSWER, AGAIN, LAST)

HEADERS = (
    "{{ '<|endoftext|>' }}{% for m in messages %}"
    "{{ '## ' + m['role'] + '\n\n' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '## assistant\n\n' }}{% endif %}"
)
"""A token at the beginning of the text, and two line breaks before each content, like Llama 3."""
INSTRUCTIONS = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""The system's turn within the first user's turn, and no text that begins the assistant's, like Llama 2 and Mistral."""
DEFAULT_SYSTEM = (
    "{% if messages and messages[0]['role'] != 'system' %}{{ 'system: You help.\n' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""A default system turn where the dialogue has none, like Qwen 2.5."""
ONLY_CONTENT_MARKED = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""Generation marks without the token that ends the turn; the marks decide."""
NO_END = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""No token ends a turn; it lasts until the next one begins."""

# What is read, and, marked by a star, what is learned.
WRITTEN = {
    "headers": (HEADERS, DIALOGUE, ["<|endoftext|>## system\n\nBe brief.", END, "## user\n\nWhere is order 42?", END,
        "## assistant\n\n", "*Who asks?", f"*{END}", "## user\n\nMe.", END, "## assistant\n\n", "*On its way.", f"*{END}"]),
    "instructions": (INSTRUCTIONS, DIALOGUE, ["[INST] Be brief.\n\nWhere is order 42? [/INST]", "* Who asks?", f"*{END}",
        "[INST] Me. [/INST]", "* On its way.", f"*{END}"]),
    "default system": (DEFAULT_SYSTEM, DIALOGUE[1:], ["system: You help.\nuser: Where is order 42?\nassistant: ", "*Who asks?",
        f"*{END}", "\nuser: Me.\nassistant: ", "*On its way.", f"*{END}", "\n"]),
    "own system": (DEFAULT_SYSTEM, DIALOGUE[:3], ["system: Be brief.\nuser: Where is order 42?\nassistant: ", "*Who asks?",
        f"*{END}", "\n"]),
    "only content marked": (ONLY_CONTENT_MARKED, DIALOGUE, ["system:Be brief.user:Where is order 42?assistant:", "*Who asks?",
        END, "user:Me.assistant:", "*On its way.", END]),
    "no end": (NO_END, DIALOGUE[1:], ["<user>Where is order 42?<assistant>", "*Who asks?", "<user>Me.<assistant>",
        "*On its way."]),
    "two answers": (HEADERS, (ASK, ANSWER, LAST), ["<|endoftext|>## user\n\nWhere is order 42?", END, "## assistant\n\n",
        "*Who asks?", f"*{END}", "## assistant\n\n", "*On its way.", f"*{END}"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"## {turn['role']}\n\n{turn['content']}\n\n\n" for turn in DIALOGUE] + ["\n\n\n\n. \n \n\n  "] * 3
    return train_tokenizer(texts * 30, 400, 256)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_learned_tokens_one_by_one(tokenizer, monkeypatch, name):
    template, messages, pieces = WRITTEN[name]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    expected = [
        (token, piece.startswith("*"))
        for piece in pieces
        for token in tokenizer.encode(piece.removeprefix("*"), add_special_tokens=False)
    ]
    dialogue = encode_dialogue(tokenizer, messages)
    assert list(zip(dialogue.token_ids.tolist(), dialogue.loss_mask.tolist(), strict=True)) == expected
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            prompt = encode_prompt(tokenizer, messages[:index]).tolist()
            assert prompt == dialogue.token_ids[: len(prompt)].tolist() and dialogue.loss_mask[len(prompt)]


UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
content = st.text(alphabet="\n \t.aé Ω42", min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED, HEADERS, INSTRUCTIONS, DEFAULT_SYSTEM])
@given(st.lists(st.tuples(content, content), min_size=1, max_size=3))
def test_a_prompt_is_a_prefix_whatever_is_said(tokenizer, template, exchanges):
    """Also if an answer begins with a line break that would be one token together with the line break before it."""
    tokenizer.chat_template = template
    roles = ("user", "assistant")
    messages = [{"role": roles[i], "content": exchange[i]} for exchange in exchanges for i in (0, 1)]
    dialogue = encode_dialogue(tokenizer, messages)
    for turns in range(1, len(messages), 2):
        prompt = encode_prompt(tokenizer, messages[:turns]).tolist()
        assert dialogue.token_ids[: len(prompt)].tolist() == prompt
    space = " " if template == INSTRUCTIONS else ""
    assert tokenizer.decode(dialogue.token_ids[dialogue.loss_mask]) == "".join(f"{space}{a}{END}" for _, a in exchanges)


def test_a_tokenizer_that_puts_a_space_before_every_text_does_so_once():
    """As SentencePiece does for Llama 2: an answer tokenised alone would begin with two spaces."""
    spaced = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    words = [turn["content"] for turn in DIALOGUE] + ["[INST] [/INST] system user assistant"]
    spaced.train_from_iterator(
        words * 9, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", END], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spaced, eos_token=END, unk_token="<unk>", chat_template=INSTRUCTIONS
    )
    dialogue = encode_dialogue(tokenizer, DIALOGUE[1:])
    text = f"[INST] Where is order 42? [/INST] Who asks?{END}[INST] Me. [/INST] On its way.{END}"
    assert dialogue.token_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    learned = tokenizer.convert_ids_to_tokens(dialogue.token_ids[dialogue.loss_mask].tolist())
    assert "".join(learned) == f"▁Who▁asks?{END}▁On▁its▁way.{END}"
    prompt = encode_prompt(tokenizer, DIALOGUE[1:4])
    assert dialogue.token_ids[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}",
            DIALOGUE,
            "refuses a dialogue with the turns system, user, assistant, user, assistant: no system here",
        ),
        ({"tool_use": "x", "rag": "y"}, DIALOGUE, "no default chat template"),
        (
            "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}",
            DIALOGUE,
            "earlier turns",
        ),
    ],
)
def test_templates_that_refuse_a_dialogue_are_input_errors(tokenizer, monkeypatch, template, messages, reason):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(TemplateError, match=reason) as error:
        encode_dialogue(tokenizer, messages)
    assert isinstance(error.value, InputError)
