"""A language model as a source of reward: it compares responses, or rates each one.

Invariants: every comparison is made in both orders and counts `½(p_AB + 1 − p_BA)`, so a judge that prefers a position favours no
response; a response whose judgement failed has an error and no score; a question that was answered is never asked again.
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
from rlhf_ray.rewards.answers import RewardError, ServiceError, UnreadableAnswer, response_texts
from rlhf_ray.rewards.http import ApiKeys, EventLoopThread, ServiceClient, UsageMeter
from rlhf_ray.rewards.judge_prompts import Questions
from rlhf_ray.types import Prompt, Rollout

LOCK_TIMEOUT_S = 60.0
"""How long to wait while another process writes to the cache."""
Judgement = float | ServiceError


class JudgeReward:
    """A source of reward behind an OpenAI-compatible endpoint."""

    def __init__(
        self,
        config: JudgeSource,
        tokenizer: PreTrainedTokenizerBase,
        keys: ApiKeys,
        workers: int,
        event_loop: EventLoopThread,
        folder: Path,
    ) -> None:
        """`folder`: the run folder, where the cache is."""
        self.name, self.weight, self.config = config.name, config.weight, config
        self.tokenizer, self.event_loop = tokenizer, event_loop
        self.meter = UsageMeter()
        self.client = ServiceClient(config, keys, workers, self.meter)
        self.questions = Questions(config)
        self.cache = AnswerCache(folder / config.cache) if config.cache is not None else None
        self._pending: dict[str, asyncio.Task[str]] = {}

    def score(self, rollouts: Sequence[Rollout]) -> list[float | RewardError]:
        """A number between 0 and 1, or an error, for each rollout.

        Comparison within groups needs all responses to a prompt in one call, because a score is relative to the others.
        """
        judge = self._ratings if self.config.mode == "pointwise" else self._win_rates
        judgements = self.event_loop.run(judge(rollouts, response_texts(self.tokenizer, rollouts)))
        return [
            RewardError(self.name, str(judgement), [rollout.id]) if isinstance(judgement, ServiceError) else judgement
            for rollout, judgement in zip(rollouts, judgements, strict=True)
        ]

    async def _ratings(self, rollouts: Sequence[Rollout], texts: Sequence[str]) -> list[Judgement]:
        return await asyncio.gather(*(self._rate(r.prompt, text) for r, text in zip(rollouts, texts, strict=True)))

    async def _rate(self, prompt: Prompt, text: str) -> Judgement:
        try:
            reference = None if self.config.reference is None else _reference(prompt, self.config.reference)
            return await self._ask(prompt, response=text, reference=reference)
        except ServiceError as error:
            return error

    async def _win_rates(self, rollouts: Sequence[Rollout], texts: Sequence[str]) -> list[Judgement]:
        """The mean of each response's comparisons, or the first failure among them."""
        if (key := self.config.reference) is not None:
            return await asyncio.gather(
                *(self._against_reference(r.prompt, text, key) for r, text in zip(rollouts, texts, strict=True))
            )
        pairs = comparison_pairs([rollout.prompt.id for rollout in rollouts], self.config.opponents)
        shares = await asyncio.gather(*(self._compare(rollouts[i].prompt, texts[i], texts[j]) for i, j in pairs))
        results: dict[int, list[Judgement]] = defaultdict(list)
        for (i, j), share in zip(pairs, shares, strict=True):
            results[i].append(share)
            results[j].append(share if isinstance(share, ServiceError) else 1.0 - share)
        alone = ServiceError("it compares the responses to one prompt, and there is only one")
        return [_mean(results[i]) if results[i] else alone for i in range(len(rollouts))]

    async def _against_reference(self, prompt: Prompt, text: str, key: str) -> Judgement:
        try:
            return await self._compare(prompt, text, _reference(prompt, key))
        except ServiceError as error:
            return error

    async def _compare(self, prompt: Prompt, ours: str, theirs: str) -> Judgement:
        """`½(p_AB + 1 − p_BA)`: how much better `ours` is. Equal texts get ½ without a question."""
        if ours == theirs:
            return 0.5
        answers = await asyncio.gather(
            self._ask(prompt, response_a=ours, response_b=theirs),
            self._ask(prompt, response_a=theirs, response_b=ours),
            return_exceptions=True,
        )
        votes: list[float] = []
        for answer in answers:
            if isinstance(answer, ServiceError):
                return answer
            if isinstance(answer, BaseException):
                raise answer
            votes.append(answer)
        first, second = votes
        self.meter.add(comparisons=1, flipped=int(first != 1.0 - second), first=first + second)
        return 0.5 * (first + 1.0 - second)

    async def _ask(self, prompt: Prompt, **texts: Any) -> float:
        """The judge's answer as a number, from the cache if it is there.

        Raises:
            ServiceError: the judge gave no usable answer.
        """
        texts.setdefault("reference", None)
        body = self.questions.request(messages=prompt.messages, metadata=prompt.metadata, **texts)
        key = question_key(self.config.url, body)
        self.meter.add(questions=1)
        if key not in self._pending:
            self._pending[key] = asyncio.create_task(self._answer(key, body))
            self._pending[key].add_done_callback(lambda _: self._pending.pop(key))
        try:
            return self.questions.read(await self._pending[key])
        except ServiceError:
            self.meter.add(failures=1)
            raise

    async def _answer(self, key: str, body: dict[str, Any]) -> str:
        if self.cache is not None and (known := await self.cache.get(key)) is not None:
            self.meter.add(cached=1)
            return known
        text = await self._ask_until_readable(body)
        return text if self.cache is None else await self.cache.put(key, text)

    async def _ask_until_readable(self, body: dict[str, Any]) -> str:
        """An answer that can be read. After an unreadable one the judge is told what is wrong with it and asked again."""
        messages = body["messages"]
        for _ in range(self.config.readings):
            try:
                text = self._content(await self.client.post("/chat/completions", body | {"messages": messages}))
                self.questions.read(text)
                return text
            except UnreadableAnswer as error:
                self.meter.add(unreadable=1)
                reason = str(error)
                if error.text is not None:
                    # The judge reads this remark: changing its words changes the judge's answers.
                    remark = f"That cannot be read ({reason}). {self.questions.form}"
                    unreadable = {"role": "assistant", "content": error.text}
                    messages = [*body["messages"], unreadable, {"role": "user", "content": remark}]
        raise ServiceError(f"no readable answer in {self.config.readings} attempts: {reason}")

    def _content(self, answer: dict[str, Any]) -> str:
        """The text of a chat completion."""
        self._count_tokens(answer.get("usage"))
        try:
            (choice,) = answer["choices"]
            text, finish = choice["message"]["content"], choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise UnreadableAnswer(f"the answer is not a chat completion: {answer!r:.200}") from error
        if not isinstance(text, str):
            raise UnreadableAnswer("the judge's answer has no text")
        if finish != "stop":
            raise UnreadableAnswer(f"the judge's answer was cut short ({finish}); request.max_tokens may be too small")
        return text

    def _count_tokens(self, usage: Any) -> None:
        counts = [usage.get(f"{kind}_tokens") if isinstance(usage, dict) else 0 for kind in ("prompt", "completion")]
        prompt, completion = (count if isinstance(count, int) else 0 for count in counts)
        price = self.config.price
        cost = 1e-6 * (prompt * price.prompt + completion * price.completion) if price else 0.0
        self.meter.add(prompt_tokens=prompt, completion_tokens=completion, cost=cost)


def comparison_pairs(prompts: Sequence[str], opponents: int | None) -> list[tuple[int, int]]:
    """The pairs of responses to the same prompt that are compared, by their positions.

    All pairs of a group, or each response with the next ⌈opponents/2⌉ in a ring, so that all have equally many opponents.

    Args:
        prompts: the prompt id of each response.
        opponents: opponents of each response, at least; None: all.
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


def _reference(prompt: Prompt, key: str) -> str:
    """The reference answer in a prompt's metadata."""
    answer = prompt.metadata.get(key)
    if not isinstance(answer, str):
        raise ServiceError(f"the metadata of prompt {prompt.id!r} has no text {key!r} to compare with: {answer!r:.80}")
    return answer


def _mean(results: Sequence[Judgement]) -> Judgement:
    shares: list[float] = []
    for result in results:
        if isinstance(result, ServiceError):
            return result
        shares.append(result)
    return float(np.mean(shares))


def question_key(url: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of a question: the URL and the request body, which holds the model and its sampling settings."""
    text = json.dumps([url, body], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """An SQLite file with one answer per question. It is accessed from a separate thread, because a disk may be slow."""

    def __init__(self, path: Path) -> None:
        """Raises ServiceError if the file cannot be used."""
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge-cache")
        self._thread.submit(self._open).result()

    async def get(self, key: str) -> str | None:
        """The stored answer, if there is one."""
        return await self._run(self._get, key)

    async def put(self, key: str, text: str) -> str:
        """Store an answer. Returns the stored one, which may be from another worker that was first."""
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
            # No write-ahead log: it needs shared memory, which workers on several machines do not have.
            self._connection = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
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
        return self._get(key) or text

    def _unusable(self, error: Exception) -> ServiceError:
        return ServiceError(
            f"the judge's cache {self.path} cannot be used: {error}; move it away if it is damaged, or set the judge's cache "
            "to another file"
        )
