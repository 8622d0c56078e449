"""Asks workers for their load over HTTP: the autoscaler's side of a worker's /metrics.

Owns when a worker is asked, how many at once, which of its metrics are a load, and when a load is too old to mean
anything: a worker that does not answer is silent, not idle. Reads the names that every engine has
(vllm:num_requests_waiting and vllm:num_requests_running), and gpumeter's own for the rest. Does not decide.
"""

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from gpumeter_operator.adapters.scraping import Scraper, Unanswered
from gpumeter_operator.decide.crew import Load
from gpumeter_operator.decide.names import HTTP_PORT

EVERY_MS = 2_000
TOO_OLD_MS = 3 * EVERY_MS  # two answers may be lost
TIMEOUT_S = 1.5  # below EVERY_MS, so that an answer is never older than the next question
PARALLEL = 64  # questions at a time: a thousand workers are asked in a second, and no burst fills the event loop
BODY_BYTES_MAX = 2**20
BACKOFF_MAX_MS = 16_000  # a worker that does not answer is asked ever less often, or dead ones would hold all slots

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


class Signals:
    """The last load of every worker. `clock_ms` never goes back."""

    def __init__(
        self, port: int = HTTP_PORT, clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000
    ) -> None:
        self._clock_ms = clock_ms
        self._scraper = Scraper(port, "/metrics", BODY_BYTES_MAX)
        self._loads: dict[str, Load] = {}
        self._asking: set[str] = set()  # uids, of `_questions` too
        self._questions: deque[tuple[str, str, _Round]] = deque()
        self._askers: set[asyncio.Task[None]] = set()
        self._failures: dict[str, int] = {}
        self._again_ms: dict[str, int] = {}

    async def ask(self, workers: Mapping[str, str], within_s: float) -> None:
        """Ask all `workers` (uid -> address) and return when they have answered, at the latest after `within_s`.

        Those that take longer go on; their answers count when they come. What is known of workers that are not named
        is forgotten.
        """
        now_ms = self._clock_ms()
        self._forget(workers)
        self._scraper.keep(workers.values())
        due = [uid for uid in workers if uid not in self._asking and self._again_ms.get(uid, 0) <= now_ms]
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
        self._scraper.close()

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
        body = b""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                body = await self._scraper.get(address)
        except (Unanswered, OSError, TimeoutError):
            pass
        finally:
            self._asking.discard(uid)
        now_ms = self._clock_ms()
        if (load := read_load(body, now_ms)) is not None:
            self._loads[uid] = load
            self._failures.pop(uid, None)
            self._again_ms.pop(uid, None)
            return
        failures = self._failures[uid] = self._failures.get(uid, 0) + 1
        self._again_ms[uid] = now_ms + min(EVERY_MS * 2 ** (failures - 1), BACKOFF_MAX_MS) - EVERY_MS // 2

    def _forget(self, workers: Iterable[str]) -> None:
        named = set(workers)
        for uid in [uid for uid in self._loads.keys() | self._failures.keys() if uid not in named]:
            for known in (self._loads, self._failures, self._again_ms):
                known.pop(uid, None)


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
