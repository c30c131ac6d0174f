"""`TurnRenderer`: turns an observation into the tokens that continue an episode.

Invariants (the *prefix property*): the policy's tokens are never tokenised again, and an observation has the tokens that the
chat template gives it at this place. A template that changes what it rendered before (removes a thought, rewrites an older
turn, does not mark the end of the assistant's turn) is refused: the policy would be trained on conversations that never occur.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.tokenize import TemplateError, rendered
from rlhf_ray.environments.base import Message


class TemplateRefused(TemplateError):
    """A chat template changes what it rendered before instead of continuing it."""


class TurnRenderer:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._specials = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)

    def opening(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to the beginning of the assistant's next turn."""
        return rendered(self.tokenizer, messages, prompt=True)

    def token_ids(self, text: str) -> np.ndarray:
        """int32 [L]: tokens of a text that already has the special tokens it needs."""
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def text(self, token_ids: np.ndarray) -> str:
        """The text of a turn, without special tokens and surrounding white space."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()

    def continuation(
        self, before: str, messages: Sequence[Message], response: str, observation: Sequence[Message], end: int
    ) -> tuple[str, np.ndarray]:
        """Render what follows a turn of the assistant, up to its next turn.

        Args:
            before: the conversation as text, up to the turn.
            messages: the messages in `before`.
            response: the turn's text.
            observation: the messages that follow the turn.
            end: the token that ended the turn; it was sampled, so it is not part of the result.

        Returns:
            The whole conversation as text, and the ids of the new tokens, int32 [O].

        Raises:
            TemplateRefused: the template changes the conversation; the message says what.
        """
        after = self.opening([*messages, {"role": "assistant", "content": response}, *observation])
        if not after.startswith(before):
            raise self._refusal("renders what came before a turn differently after an observation is added")
        turn = after[len(before) :].lstrip()
        if not turn.startswith(response):
            raise self._refusal(f"changes the assistant's text: {response!r:.60} became {turn!r:.60}")
        rest, end_text = turn[len(response) :].lstrip(), self.tokenizer.convert_ids_to_tokens(int(end))
        if not rest.startswith(end_text):
            if not rest.startswith(self._specials):
                raise self._refusal(
                    f"does not end the assistant's turns with a special token: they are followed by {rest!r:.60}"
                )
            # The policy may end a turn with another of its end tokens; then the template's own end token follows.
            rest = end_text + rest
        # Tokenised together with the end token, because some tokens take the space after them.
        return after, self.token_ids(rest)[1:]

    def check(self) -> None:
        """Try the template on two turns.

        Raises:
            TemplateRefused: the tokens of a continuation differ from those of the whole conversation.
        """
        messages: list[Message] = [{"role": "user", "content": "First."}]
        text = self.opening(messages)
        for response, answer in (("Second.", "Third."), ("Fourth.", "Fifth.")):
            turn = {"role": "user", "content": answer}
            text, ids = self.continuation(text, messages, response, [turn], self.tokenizer.eos_token_id)
            messages += [{"role": "assistant", "content": response}, turn]
            if self.token_ids(text)[-len(ids) :].tolist() != ids.tolist():
                raise self._refusal("gives a turn other tokens on its own than in the whole conversation")

    def _refusal(self, what: str) -> TemplateRefused:
        return TemplateRefused(
            f"the chat template of {self.tokenizer.name_or_path!r} {what}; an episode of several turns cannot be one sequence. "
            "Use a template that does not change earlier turns, or set environment.max_turns to 1"
        )
