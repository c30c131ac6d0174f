"""Rendering what an environment says as the continuation of tokens that were sampled.

Invariants (the *prefix property*): what the policy said is never tokenised again, and the tokens of a turn are those that the
chat template puts behind it; a template that would change what stands before (drops a thought, rewrites an older turn, does
not mark the end of the assistant's turn) is refused, because the policy would be trained on conversations that it never meets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.tokenize import TemplateError, rendered
from rlhf_ray.environments.base import Message


class TemplateRefused(TemplateError):
    """A chat template does not continue what it has rendered."""


class TurnRenderer:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._specials = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)

    def opening(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant begins to speak."""
        return rendered(self.tokenizer, messages, prompt=True)

    def token_ids(self, text: str) -> np.ndarray:
        """int32 [L]; the text has the special tokens that it needs."""
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def text(self, token_ids: np.ndarray) -> str:
        """What somebody who reads it sees of a turn."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()

    def continuation(
        self, before: str, messages: Sequence[Message], said: str, answer: Sequence[Message], end: int
    ) -> tuple[str, np.ndarray]:
        """What follows the assistant's turn, up to its next one.

        Args:
            before: the conversation as it was rendered up to the turn.
            messages: those that `before` shows.
            said: the turn's text.
            answer: what came back.
            end: the token that ended the turn; it is sampled, and so no part of the result.

        Returns:
            The whole conversation as text, and the ids of the new tokens, int32 [O].

        Raises:
            TemplateRefused: saying what the template changed.
        """
        after = self.opening([*messages, {"role": "assistant", "content": said}, *answer])
        if not after.startswith(before):
            raise self._refusal("renders what came before a turn otherwise once there is an answer to it")
        turn = after[len(before) :].lstrip()
        if not turn.startswith(said):
            raise self._refusal(
                f"does not show what the assistant said as it was said: {said!r:.60} became {turn!r:.60}"
            )
        rest, end_text = turn[len(said) :].lstrip(), self.tokenizer.convert_ids_to_tokens(int(end))
        if not rest.startswith(end_text):
            if not rest.startswith(self._specials):
                raise self._refusal(f"does not end the assistant's turns by a special token: {rest!r:.60} follows one")
            # The policy may end a turn by another of its end tokens; the template's own then follows it.
            rest = end_text + rest
        # Together with the token before them, because some tokens take the space behind them.
        return after, self.token_ids(rest)[1:]

    def check(self) -> None:
        """Try two turns.

        Raises:
            TemplateRefused: the tokens of a continuation are not those of the whole conversation.
        """
        messages: list[Message] = [{"role": "user", "content": "First."}]
        text = self.opening(messages)
        for said, answer in (("Second.", "Third."), ("Fourth.", "Fifth.")):
            turn = {"role": "user", "content": answer}
            text, ids = self.continuation(text, messages, said, [turn], self.tokenizer.eos_token_id)
            messages += [{"role": "assistant", "content": said}, turn]
            if self.token_ids(text)[-len(ids) :].tolist() != ids.tolist():
                raise self._refusal("gives other tokens for a turn by itself than for the whole conversation")

    def _refusal(self, what: str) -> TemplateRefused:
        return TemplateRefused(
            f"the chat template of {self.tokenizer.name_or_path!r} {what}; an episode of several turns cannot be one sequence. "
            "Use a template that keeps earlier turns as they are, or set environment.max_turns to 1"
        )
