"""Kills the engine under a load, again and again, and looks at what clients, worker and ledger say of it.

Owns one round of it: streams and a plain request in flight, kill -9, what each client was told and when, how long until
the worker serves again, and what the worker holds then. Judges nothing: tests and the bench do.
"""

import http.client
import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rigs.worker import WorkerProcess, hop_token, session_id, until

ASK = {"model": "smollm2", "prompt": [5, 6, 7, 8], "ignore_eos": True, "temperature": 1.0}


@dataclass
class Client:
    """One request from its start to whatever ended it. Times are of time.monotonic()."""

    process: WorkerProcess
    stream: bool
    max_tokens: int = 4000
    session: str = field(default_factory=session_id)
    chunks: int = 0
    status: int = 0
    ended_s: float = 0.0
    error: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    """Whether a stream ended with its last event, [DONE]."""

    def run(self) -> None:
        """Ask, and read until the end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.process.http, timeout=120)
        try:
            headers = {"Authorization": f"Bearer {hop_token(session=self.session)}", "Content-Type": "application/json"}
            body = json.dumps(ASK | {"stream": self.stream, "max_tokens": self.max_tokens})
            connection.request("POST", "/v1/completions", body, headers)
            answer = connection.getresponse()
            self.status = answer.status
            if self.stream:
                for line in answer:
                    if line.startswith(b"data: "):
                        self._take(line[6:].strip())
            else:
                self._take(answer.read())
        finally:
            self.ended_s = self.ended_s or time.monotonic()
            connection.close()

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        document = json.loads(data, parse_float=str)
        self.chunks += 1
        if "error" in document:
            self.ended_s = time.monotonic()
            self.error, self.usage = document["error"], document.get("usage") or {}

    @property
    def gpu_ns(self) -> int:
        """What the error said that the request had used."""
        whole, _, part = str(self.usage.get("gpu_seconds", "0.0")).partition(".")
        return int(whole) * 10**9 + int(part.ljust(9, "0")[:9])


@dataclass(frozen=True)
class Round:
    """What one kill did."""

    clients: list[Client]
    told_s: float
    """From the kill until the last client knew."""
    back_s: float
    """From the kill until the worker was ready."""
    load_s: float
    """What of that the new engine took from its start to its readiness."""
    threads: int
    files: int
    zombies: int


def kill_under_load(process: WorkerProcess, streams: int = 3, number: signal.Signals = signal.SIGKILL) -> Round:
    """One round over a worker that is ready."""
    clients = [Client(process, stream=True) for _ in range(streams)] + [Client(process, stream=False)]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    until(lambda: all(client.chunks > 3 for client in clients if client.stream), "the streams run")
    (engine,) = process.children()
    killed_s = time.monotonic()
    os.kill(engine, number)
    for thread in threads:
        thread.join(120)
    process.ready()
    back_s = time.monotonic() - killed_s
    (engine,) = process.children()  # a former one would be a zombie among them
    return Round(
        clients,
        max(client.ended_s for client in clients) - killed_s,
        back_s,
        process.metrics()["gpumeter_engine_load_seconds"],
        len(list(Path(f"/proc/{process.process.pid}/task").iterdir())),
        len(list(Path(f"/proc/{process.process.pid}/fd").iterdir())),
        sum(_state(pid) == "Z" for pid in process.children()),
    )


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
