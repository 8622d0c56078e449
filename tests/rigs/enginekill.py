"""Kills the engine under a load, again and again, and looks at what clients, worker and ledger say of it.

Owns one round of it (streams and a plain request in flight, kill -9, what each client was told and when, how long until
the worker serves again, what it holds then) and what must be true of it, for the tests and the bench alike.
"""

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumeter_usage.record import Kind, Status
from rigs.worker import Ledger, WorkerProcess, hop_token, session_id, until

TOLD_S_MAX = 1.0
OVER_LOAD_S_MAX = 2.0

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


def kill_under_load(
    process: WorkerProcess,
    streams: int = 3,
    number: signal.Signals = signal.SIGKILL,
    whom: Callable[[int], int] = lambda engine: engine,
) -> Round:
    """One round over a worker that is ready. `whom`: the process that is killed, where it is not the engine's own."""
    clients = [Client(process, stream=True) for _ in range(streams)] + [Client(process, stream=False)]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    until(lambda: all(client.chunks > 3 for client in clients if client.stream), "the streams run")
    (engine,) = process.children()
    killed_s = time.monotonic()
    os.kill(whom(engine), number)
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


def problems(one: Round, said: str) -> list[str]:
    """What is wrong with a round, in sentences. `said`: what each client must have been told of the engine process."""
    found = []
    if one.told_s > TOLD_S_MAX:
        found.append(f"the last client knew after {one.told_s:.2f} s")
    if one.back_s > one.load_s + OVER_LOAD_S_MAX:
        found.append(f"it served after {one.back_s:.2f} s, of which the engine loaded for {one.load_s:.2f} s")
    if one.zombies:
        found.append(f"{one.zombies} zombies are left")
    for client in one.clients:
        kind = "stream" if client.stream else "request"
        if client.status != (200 if client.stream else 500) or client.error.get("code") != "engine_failed":
            found.append(f"a {kind} got {client.status} {client.error}")
        elif not client.error["message"].startswith(f"the engine process {said} while it served this request"):
            found.append(f"a {kind} was told: {client.error['message']}")
        if client.stream and not client.done:
            found.append("a stream had no last event")
    return found


def leaks(rounds: list[Round]) -> list[str]:
    """Threads and files of the worker that each round left behind. A pool may fill, by less than one a round."""
    found = []
    for what, counts in (("threads", [r.threads for r in rounds]), ("files", [r.files for r in rounds])):
        if counts[-1] - counts[0] >= len(rounds):
            found.append(f"its {what} grew: {counts}")
    return found


def bill_problems(rounds: list[Round], ledger: Ledger, devices: int = 1) -> list[str]:
    """Whether each session is billed for what its answer said; `ledger` holds all, and its identity is asserted."""
    ledger.check(unmeasured_s=sum(one.told_s for one in rounds) + 0.5 * len(rounds), devices=devices)
    found = []
    for client in (client for one in rounds for client in one.clients):
        slices = ledger.of_session(client.session)
        billed_ns, tokens = sum(one.gpu_ns for one in slices), sum(one.completion_tokens for one in slices)
        if slices[-1].status is not Status.FAILED:
            found.append(f"a session ended as {slices[-1].status}")
        if billed_ns != client.gpu_ns or tokens != client.usage.get("completion_tokens"):
            found.append(f"{billed_ns} ns and {tokens} tokens are billed, and the client was told {client.usage}")
        if client.stream and not billed_ns:
            found.append("a stream that got tokens used no time")
    return found


def seal(process: WorkerProcess, ledger: Ledger) -> None:
    """Stop the worker in order, with everything that it recorded in the ledger."""
    process.send(signal.SIGTERM)
    until(lambda: (process.collect(ledger), ledger.all()[-1].kind is Kind.SEAL)[1], "it is sealed", 120)
    assert process.process.wait(60) == 0


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
