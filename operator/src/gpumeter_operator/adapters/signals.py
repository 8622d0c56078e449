"""Asks workers for their load over HTTP: the autoscaler's side of a worker's /metrics.

Owns when a worker is asked, how many at once, which of its metrics are a load, when a load is too old to mean
anything, and since when a worker is silent: one that does not answer is, and not one whose turn is still to come. Reads
the names that every engine has (vllm:num_requests_waiting and vllm:num_requests_running), and gpumeter's own for the
rest. Does not decide.
"""

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from gpumeter_operator.adapters.scraping import Scraper, Unanswered
from gpumeter_operator.decide.crew import Load
from gpumeter_operator.decide.names import HTTP_PORT

EVERY_MS = 2_000
TOO_OLD_MS = 3 * EVERY_MS  # two answers may be lost
TIMEOUT_S = 1.5  # below EVERY_MS, so that an answer is never older than the next question
PARALLEL = 64  # questions at a time: a thousand workers are asked in a second, and no burst fills the event loop
BODY_BYTES_MAX = 2**20
BACKOFF_MAX_MS = 16_000  # a worker that does not answer is asked ever less often, or dead ones would hold all slots
SILENT_AFTER = 2  # questions in a row: one may be lost here, where a start holds up the event loop for a second

# Begins with the end of the line before: that is searched for four times as fast as the begin of any line.
_WANTED = re.compile(
    rb"\n(vllm:num_requests_waiting|vllm:num_requests_running|gpumeter_gpu_utilization_ratio|gpumeter_sessions_total)"
    rb"(?:\{[^\n]*\})? ([0-9.eE+-]+)"
)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Round:
    """Those who are asked together: how many are still to be heard, and what is set when none is."""

    left: int
    over: asyncio.Future[None]


@dataclass(slots=True)
class _Missed:
    """Questions in a row that a worker left unanswered: when the first was asked, how many, when the next may be."""

    since_ms: int
    times: int = 0
    again_ms: int = 0


class Pages(Protocol):
    """Who brings a worker's page: adapters.scraping.Scraper."""

    async def get(self, address: str) -> bytes:
        """The page of the worker at this address; raises Unanswered or OSError."""
        ...

    def keep(self, addresses: Collection[str]) -> None:
        """No others are asked any more."""
        ...

    def close(self) -> None:
        """Nobody is."""
        ...


class Signals:
    """The last load of every worker. `clock_ms` never goes back."""

    def __init__(
        self,
        port: int = HTTP_PORT,
        clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
        pages: Pages | None = None,
    ) -> None:
        self._clock_ms = clock_ms
        self._pages = pages or Scraper(port, "/metrics", BODY_BYTES_MAX)
        self._loads: dict[str, Load] = {}
        self._asking: set[str] = set()  # uids, of `_questions` too
        self._questions: deque[tuple[str, str, _Round]] = deque()
        self._askers: set[asyncio.Task[None]] = set()
        self._missed: dict[str, _Missed] = {}

    async def ask(self, workers: Mapping[str, str], within_s: float) -> None:
        """Ask all `workers` (uid -> address) and return when they have answered, at the latest after `within_s`.

        Those that take longer go on; their answers count when they come. What is known of workers that are not named
        is forgotten.
        """
        now_ms = self._clock_ms()
        self._forget(workers)
        self._pages.keep(workers.values())
        due = [uid for uid in workers if uid not in self._asking and not self._rests(uid, now_ms)]
        together = _Round(len(due), asyncio.get_running_loop().create_future())
        self._asking.update(due)
        self._questions.extend((uid, workers[uid], together) for uid in due)
        # A task each would cost as much as a tenth of the question.
        for _ in range(min(PARALLEL - len(self._askers), len(self._questions))):
            self._askers.add(asyncio.create_task(self._ask_on()))
        if not due:
            return
        await asyncio.wait((together.over,), timeout=within_s)

    def load(self, uid: str) -> Load | None:
        """What the worker last told; None when that is too old, or nothing."""
        load = self._loads.get(uid)
        return load if load is not None and self._clock_ms() - load.at_ms <= TOO_OLD_MS else None

    def silent_since(self, uid: str) -> int | None:
        """When (milliseconds of the clock) the first of the questions was asked that it has left unanswered since.

        None while it had no chance to tell: when thousands are asked one after the other, as after a start, who waits
        for its turn is not silent, however long it has told nothing.
        """
        missed = self._missed.get(uid)
        return missed.since_ms if missed is not None and missed.times >= SILENT_AFTER else None

    async def close(self) -> None:
        """End what is being asked, and the connections."""
        for *_, together in self._questions:
            together.over.cancel()
        self._questions.clear()
        tasks = list(self._askers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._asking.clear()
        self._pages.close()

    async def _ask_on(self) -> None:
        """One of those who ask, until nobody is left to be asked; who leaves is none of them from that moment on."""
        try:
            while self._questions:
                uid, address, together = self._questions.popleft()
                try:
                    await self._ask(uid, address)
                except Exception:  # one that nobody thought of keeps no other from being asked
                    log.exception("The worker at %s cannot be asked for its load.", address)
                finally:
                    together.left -= 1
                    if not together.left and not together.over.done():
                        together.over.set_result(None)
        finally:
            self._askers.discard(cast(asyncio.Task[None], asyncio.current_task()))

    async def _ask(self, uid: str, address: str) -> None:
        body, asked_ms = b"", self._clock_ms()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                body = await self._pages.get(address)
        except (Unanswered, OSError, TimeoutError):
            pass
        finally:
            self._asking.discard(uid)
        now_ms = self._clock_ms()
        if (load := read_load(body, now_ms)) is not None:
            self._loads[uid] = load
            self._missed.pop(uid, None)
            return
        missed = self._missed.setdefault(uid, _Missed(asked_ms))
        missed.times += 1
        missed.again_ms = now_ms + min(EVERY_MS * 2 ** (missed.times - 1), BACKOFF_MAX_MS) - EVERY_MS // 2

    def _rests(self, uid: str, now_ms: int) -> bool:
        missed = self._missed.get(uid)
        return missed is not None and missed.again_ms > now_ms

    def _forget(self, workers: Iterable[str]) -> None:
        named = set(workers)
        for known in (self._loads, self._missed):
            for uid in known.keys() - named:
                del known[uid]


def read_load(body: bytes, now_ms: int) -> Load | None:
    """The load in a text of Prometheus' format; None where it does not tell how many requests wait and run."""
    found: dict[bytes, list[float]] = {}
    for name, text in _WANTED.findall(b"\n" + body):
        try:
            value = float(text)
        except ValueError:
            continue
        if 0 <= value < 1e15:
            found.setdefault(name, []).append(value)
    waiting, running = found.get(b"vllm:num_requests_waiting"), found.get(b"vllm:num_requests_running")
    if waiting is None or running is None:
        return None
    gpus = found.get(b"gpumeter_gpu_utilization_ratio")
    return Load(
        at_ms=now_ms,
        waiting=int(sum(waiting)),
        running=int(sum(running)),
        gpu_percent=min(100, round(100 * sum(gpus) / len(gpus))) if gpus else None,
        ended=int(sum(found.get(b"gpumeter_sessions_total", ()))),
    )
