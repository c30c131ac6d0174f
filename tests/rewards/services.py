"""A real HTTP server on this machine with scripted answers: a judge, a scorer, and their failures."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """The server's answer to one request."""

    body: Any
    """Sent as JSON; bytes are sent unchanged."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] = lambda: None
    """Called before the answer is sent."""


@dataclass
class Request:
    """A request that the server received."""

    path: str
    authorization: str | None
    body: dict[str, Any]


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # the default of 5 refuses connections when a whole batch is asked for at once
    daemon_threads = True


class Service:
    """A running server. `requests`: all received so far; `busiest`: the most at the same time."""

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self.requests: list[Request] = []
        self.busiest = self._busy = 0
        self._lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = Request(self.path, self.headers.get("Authorization"), body)
                with service._lock:
                    service.requests.append(request)
                    service._busy += 1
                    service.busiest = max(service.busiest, service._busy)
                reply = answer(request)
                reply.before()
                with service._lock:
                    service._busy -= 1
                content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def questions(self) -> list[str]:
        """The first message of each chat completion."""
        return [request.body["messages"][0]["content"] for request in self.requests]


@contextmanager
def serve(answer: Callable[[Request], Answer]) -> Iterator[Service]:
    """Run the server until the block ends."""
    service = Service(answer)
    thread = threading.Thread(target=service.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield service
    finally:
        service.server.shutdown()
        service.server.server_close()
        thread.join()


def completion(text: str | None, finish: str = "stop") -> dict[str, Any]:
    """The JSON of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


def verdict(which: str) -> dict[str, Any]:
    return completion(json.dumps({"reasoning": "as I see it", "verdict": which}))


def mark(value: float) -> dict[str, Any]:
    return completion(json.dumps({"reasoning": "as I see it", "mark": value}))


def quoted(question: str, name: str) -> str:
    """One text of the default question, from between its heading and the next one."""
    return question.split(f"=== {name} ", 1)[1].split("\n", 1)[1].split("\n=== ", 1)[0]
