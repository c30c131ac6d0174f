"""A language model as a source of reward: it compares responses, or marks them.

Invariants: every comparison is made in both orders and counts `½(p_AB + 1 − p_BA)`, so a judge that prefers a position prefers no
response; a response whose judgement failed has an error and no score; an answered question is never asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.reward import JudgeSource
from rlhf_ray.rewards.answers import RewardError, ServiceError, Unreadable, response_texts
from rlhf_ray.rewards.http import Background, Endpoint, Keys, Meter
from rlhf_ray.rewards.judge_prompts import Questions
from rlhf_ray.types import Prompt, Rollout

BUSY_S = 60.0
"""How long to wait for another process that is writing."""


def question_key(url: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of where, whom and what is asked; a request holds its model and its sampling."""
    text = json.dumps([url, body], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """An SQLite file with one text per question. Its calls run in a thread of its own, because a disk may be slow."""

    def __init__(self, path: Path) -> None:
        """Raises ServiceError where the file cannot be used."""
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge-cache")
        self._thread.submit(self._open).result()

    async def get(self, key: str) -> str | None:
        """The answer, if there is one."""
        return await self._run(self._get, key)

    async def put(self, key: str, text: str) -> str:
        """Store an answer; the one that is stored, which may be that of somebody who was first."""
        return await self._run(self._put, key, text)

    def close(self) -> None:
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()

    async def _run(self, call: Any, *arguments: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Not a write-ahead log: it needs shared memory, which workers on several machines do not have.
            self._connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL) STRICT"
            )
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def _get(self, key: str) -> str | None:
        row = self._connection.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _put(self, key: str, text: str) -> str:
        self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, text))
        return self._get(key)

    def _unusable(self, error: Exception) -> ServiceError:
        return ServiceError(
            f"the judge's cache {self.path} cannot be used: {error}; move it away if it is damaged, or set cache to another file"
        )


Judged = float | ServiceError


class JudgeReward:
    """A source of reward behind an OpenAI-compatible endpoint."""

    remote = True

    def __init__(
        self,
        config: JudgeSource,
        tokenizer: PreTrainedTokenizerBase,
        keys: Keys,
        workers: int,
        background: Background,
        folder: Path,
    ) -> None:
        """`folder`: of the run, for the cache."""
        self.name, self.weight, self.config = config.name, config.weight, config
        self.tokenizer, self.background = tokenizer, background
        self.meter = Meter()
        self.endpoint = Endpoint(config, keys, workers, self.meter)
        self.questions = Questions(config)
        self.cache = AnswerCache(folder / config.cache) if config.cache is not None else None
        self._asking: dict[str, asyncio.Task[str]] = {}

    def score(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        """A number between 0 and 1 for each, or why there is none.

        Comparing within groups, all responses to a prompt are needed: they are what a score is relative to.
        """
        judge = self._marks if self.config.mode == "pointwise" else self._win_rates
        judged = self.background.run(judge(rollouts, response_texts(self.tokenizer, rollouts)))
        return [
            RewardError(self.name, str(score), [rollout.id]) if isinstance(score, ServiceError) else score
            for rollout, score in zip(rollouts, judged, strict=True)
        ]

    async def _marks(self, rollouts: Sequence[Rollout], texts: Sequence[str]) -> list[Judged]:
        return await asyncio.gather(*(self._mark(r.prompt, text) for r, text in zip(rollouts, texts, strict=True)))

    async def _mark(self, prompt: Prompt, text: str) -> Judged:
        try:
            return await self._ask(prompt, response=text, reference=self._reference(prompt))
        except ServiceError as error:
            return error

    async def _win_rates(self, rollouts: Sequence[Rollout], texts: Sequence[str]) -> list[Judged]:
        """Mean over a response's comparisons; the first failure among them, if there is one."""
        if self.config.reference is not None:
            alone = (self._against_reference(r.prompt, text) for r, text in zip(rollouts, texts, strict=True))
            return await asyncio.gather(*alone)
        pairs = meetings([rollout.prompt.id for rollout in rollouts], self.config.opponents)
        shares = await asyncio.gather(*(self._compare(rollouts[i].prompt, texts[i], texts[j]) for i, j in pairs))
        results: dict[int, list[Judged]] = defaultdict(list)
        for (i, j), share in zip(pairs, shares, strict=True):
            results[i].append(share)
            results[j].append(share if isinstance(share, ServiceError) else 1.0 - share)
        lonely = ServiceError("it compares the responses to one prompt, and there is only one")
        return [_mean(results[i]) if results[i] else lonely for i in range(len(rollouts))]

    async def _against_reference(self, prompt: Prompt, text: str) -> Judged:
        try:
            return await self._compare(prompt, text, self._reference(prompt))
        except ServiceError as error:
            return error

    async def _compare(self, prompt: Prompt, ours: str, theirs: str) -> Judged:
        """`½(p_AB + 1 − p_BA)`, how much better `ours` is; ½ without asking where they are the same."""
        if ours == theirs:
            return 0.5
        answers = await asyncio.gather(
            self._ask(prompt, response_a=ours, response_b=theirs),
            self._ask(prompt, response_a=theirs, response_b=ours),
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, ServiceError):
                return answer
            if isinstance(answer, BaseException):
                raise answer
        first, second = answers
        self.meter.add(comparisons=1, flipped=int(first != 1.0 - second), first=first + second)
        return 0.5 * (first + 1.0 - second)

    def _reference(self, prompt: Prompt) -> str | None:
        key = self.config.reference
        if key is None:
            return None
        answer = prompt.metadata.get(key)
        if not isinstance(answer, str):
            raise ServiceError(
                f"the metadata of prompt {prompt.id!r} has no text {key!r} to compare with: {answer!r:.80}"
            )
        return answer

    async def _ask(self, prompt: Prompt, **texts: Any) -> float:
        """The judge's answer as a number, from the cache if it is known.

        Raises:
            ServiceError: there is none.
        """
        texts.setdefault("reference", None)
        body = self.questions.request(messages=prompt.messages, metadata=prompt.metadata, **texts)
        key = question_key(self.config.url, body)
        self.meter.add(questions=1)
        if key not in self._asking:
            self._asking[key] = asyncio.create_task(self._answer(key, body))
            self._asking[key].add_done_callback(lambda _: self._asking.pop(key))
        try:
            return self.questions.read(await self._asking[key])
        except ServiceError:
            self.meter.add(failures=1)
            raise

    async def _answer(self, key: str, body: dict[str, Any]) -> str:
        if self.cache is not None and (known := await self.cache.get(key)) is not None:
            self.meter.add(cached=1)
            return known
        text = await self._readable(body)
        return text if self.cache is None else await self.cache.put(key, text)

    async def _readable(self, body: dict[str, Any]) -> str:
        """An answer that can be read; one that cannot be is shown to the judge with what is wrong with it."""
        messages = body["messages"]
        for _ in range(self.config.readings):
            try:
                text = self._content(await self.endpoint.post("/chat/completions", body | {"messages": messages}))
                self.questions.read(text)
                return text
            except Unreadable as error:
                self.meter.add(unreadable=1)
                reason = str(error)
                if error.text is not None:
                    remark = f"That cannot be read ({reason}). {self.questions.form}"
                    said = {"role": "assistant", "content": error.text}
                    messages = [*body["messages"], said, {"role": "user", "content": remark}]
        raise ServiceError(f"no readable answer in {self.config.readings} attempts: {reason}")

    def _content(self, answer: dict[str, Any]) -> str:
        """The text of a chat completion."""
        self._count_tokens(answer.get("usage"))
        try:
            (choice,) = answer["choices"]
            text, finish = choice["message"]["content"], choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise Unreadable(f"the answer is no chat completion: {answer!r:.200}") from error
        if not isinstance(text, str):
            raise Unreadable("the judge said nothing")
        if finish != "stop":
            raise Unreadable(f"the judge's answer was cut short ({finish}); request.max_tokens may be too few")
        return text

    def _count_tokens(self, usage: Any) -> None:
        counts = [usage.get(f"{kind}_tokens") if isinstance(usage, dict) else 0 for kind in ("prompt", "completion")]
        prompt, completion = (count if isinstance(count, int) else 0 for count in counts)
        price = self.config.price
        cost = 1e-6 * (prompt * price.prompt + completion * price.completion) if price else 0.0
        self.meter.add(prompt_tokens=prompt, completion_tokens=completion, cost=cost)


def meetings(prompts: Sequence[str], opponents: int | None) -> list[tuple[int, int]]:
    """Which responses are compared, by their positions: those to the same prompt.

    All of a group, or each with the next ⌈opponents/2⌉ in a ring, so that everybody meets as many others.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[prompt].append(index)
    pairs = []
    for members in groups.values():
        size = len(members)
        furthest = size // 2 if opponents is None else min(size // 2, (opponents + 1) // 2)
        for distance in range(1, furthest + 1):
            # Half-way around a ring of even size, i meets i + size/2 once, not twice.
            starts = size // 2 if 2 * distance == size else size
            pairs += [(members[i], members[(i + distance) % size]) for i in range(starts)]
    return pairs


def _mean(results: Sequence[Judged]) -> Judged:
    failed = next((result for result in results if isinstance(result, ServiceError)), None)
    return failed if failed is not None else float(np.mean(results))
