"""A reward that a service computes: prompts, responses and metadata are sent by `POST`, and scores come back.

Invariant: only a finite number is a score. `null` means that the service has no score for a response. Any other answer is
requested again, a limited number of times; after that the rollouts of the request have an error.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.reward import HttpSource
from rlhf_ray.rewards.answers import RewardError, ServiceError, UnreadableAnswer, response_texts
from rlhf_ray.rewards.http import ApiKeys, EventLoopThread, ServiceClient, UsageMeter
from rlhf_ray.types import Rollout


class HttpReward:
    """A source of reward behind a URL."""

    def __init__(
        self,
        config: HttpSource,
        tokenizer: PreTrainedTokenizerBase,
        keys: ApiKeys,
        workers: int,
        event_loop: EventLoopThread,
    ) -> None:
        self.name, self.weight, self.config = config.name, config.weight, config
        self.tokenizer, self.event_loop = tokenizer, event_loop
        self.meter = UsageMeter()
        self.client = ServiceClient(config, keys, workers, self.meter)

    def score(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        """A score or an error for each rollout."""
        return self.event_loop.run(self._score(rollouts))

    async def _score(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        size = self.config.batch_size
        parts = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        answers = await asyncio.gather(*(self._score_part(part) for part in parts))
        return [answer for part in answers for answer in part]

    async def _score_part(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        self.meter.add(questions=1)
        ids = [rollout.id for rollout in rollouts]
        try:
            scores = await self._ask(self._body(rollouts))
        except ServiceError as error:
            self.meter.add(failures=1)
            return [RewardError(self.name, str(error), ids)] * len(ids)
        no_score = "the service answered null: no score"
        return [
            RewardError(self.name, no_score, [id_]) if score is None else score
            for id_, score in zip(ids, scores, strict=True)
        ]

    async def _ask(self, body: dict[str, Any]) -> list[float | None]:
        for _ in range(self.config.readings):
            try:
                return parse_scores(await self.client.post("", body), len(body["responses"]))
            except UnreadableAnswer as error:
                self.meter.add(unreadable=1)
                reason = str(error)
        raise ServiceError(f"no readable answer in {self.config.readings} attempts: {reason}")

    def _body(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompts": [list(rollout.prompt.messages) for rollout in rollouts],
            "responses": response_texts(self.tokenizer, rollouts),
            "metadata": [rollout.prompt.metadata for rollout in rollouts],
        }
        return body if self.config.model is None else {"model": self.config.model} | body


def parse_scores(answer: dict[str, Any], count: int) -> list[float | None]:
    """The `count` scores of an answer.

    Raises:
        UnreadableAnswer: the scores are missing, their number is wrong, or one is neither a finite number nor null.
    """
    scores = answer.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        shown = f"{len(scores)} scores" if isinstance(scores, list) else f"{answer!r:.200}"
        raise UnreadableAnswer(f'expected {{"scores": […]}} with {count} numbers, got {shown}')
    for score in scores:
        if score is not None and not _is_finite_number(score):
            raise UnreadableAnswer(f"{score!r:.80} is not a finite number (use null where there is no score)")
    return [None if score is None else float(score) for score in scores]


def _is_finite_number(value: Any) -> bool:
    # JSON integers may exceed the range of a float, and Python's JSON reader accepts NaN.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
