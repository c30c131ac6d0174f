"""A reward that a service computes: `POST` of prompts, responses and metadata, back come scores.

Invariant: what is no number is no score. `null` says that there is none; anything else that does not fit is asked for again, a
bounded number of times, and then costs the rollouts of its request.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.reward import HttpSource
from rlhf_ray.rewards.answers import RewardError, ServiceError, Unreadable, response_texts
from rlhf_ray.rewards.http import Background, Endpoint, Keys, Meter
from rlhf_ray.types import Rollout


class HttpReward:
    """A source of reward behind a URL."""

    remote = True

    def __init__(
        self, config: HttpSource, tokenizer: PreTrainedTokenizerBase, keys: Keys, workers: int, background: Background
    ) -> None:
        self.name, self.weight, self.config = config.name, config.weight, config
        self.tokenizer, self.background = tokenizer, background
        self.meter = Meter()
        self.endpoint = Endpoint(config, keys, workers, self.meter)

    def score(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        """A number for each, or why there is none."""
        return self.background.run(self._score(rollouts))

    async def _score(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        size = self.config.batch_size
        parts = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        answers = await asyncio.gather(*(self._part(part) for part in parts))
        return [answer for part in answers for answer in part]

    async def _part(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        self.meter.add(questions=1)
        ids = [rollout.id for rollout in rollouts]
        try:
            scores = await self._ask(self._body(rollouts))
        except ServiceError as error:
            self.meter.add(failures=1)
            return [RewardError(self.name, str(error), ids)] * len(ids)
        nothing = "the service answered null: no score"
        return [
            RewardError(self.name, nothing, [id_]) if score is None else score
            for id_, score in zip(ids, scores, strict=True)
        ]

    async def _ask(self, body: dict[str, Any]) -> list[float | None]:
        for _ in range(self.config.readings):
            try:
                return scores_of(await self.endpoint.post("", body), len(body["responses"]))
            except Unreadable as error:
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


def scores_of(answer: dict[str, Any], count: int) -> list[float | None]:
    """The `count` scores of an answer.

    Raises:
        Unreadable: it has none, or not as many, or one is no finite number and not null.
    """
    scores = answer.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        shown = f"{len(scores)} scores" if isinstance(scores, list) else f"{answer!r:.200}"
        raise Unreadable(f'expected {{"scores": […]}} with {count} numbers, got {shown}')
    for score in scores:
        if score is not None and not _is_number(score):
            raise Unreadable(f"{score!r:.80} is no finite number (null says that there is no score)")
    return [None if score is None else float(score) for score in scores]


def _is_number(value: Any) -> bool:
    # JSON's numbers may be integers that no float holds, and Python's reader lets NaN through.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
