"""Answers of judges, on the disk.

Invariants: an answer is stored under a hash of everything that determines it, so it never has to be invalidated; the first answer
to a question stays, whoever else asks at the same time; processes may share the file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_ray.rewards.errors import ServiceError

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
