"""Asks workers how far they are while they start, and how they split steps once they serve: our side of /readyz.

Owns when a worker is asked, how long its answer holds, and that nobody waits for it: a look at a service takes what is
known now, and what is learned meanwhile at the next one. Does not judge what a worker says.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import aiohttp

from gpumeter_operator.decide.names import HTTP_PORT

ASK_EVERY_S = 10.0  # every change of a status is a write: a thousand services that load are a hundred writes a second
ASK_SERVING_EVERY_S = 300.0
"""What a worker that serves says changes only when its engine is started again."""

FORGET_S = 600.0
TIMEOUT_S = 2.0
ANSWER_BYTES_MAX = 2**14
SENTENCE_MAX = 300
STAND_IN_MAX = 600
BATCHES_MAX = 32  # of the CRD
_DECIMAL = re.compile(r"[0-9]{1,15}(\.[0-9]{1,9})?")
_TELLING = ("Loading", "WarmingUp", "Starting", "EngineRestarting", "EngineHung")
_STANDING_IN = ("CalibrationPoor",)


class Answer(NamedTuple):
    """What a worker said: how far it is while it starts; once it serves, why it splits steps otherwise than was asked
    to, and what it can do (status.capacity)."""

    progress: str = ""
    stand_in: tuple[str, str] | None = None
    capacity: Mapping[str, Any] | None = None


Key = tuple[str, str, bool]  # pod, address, whether it serves


class StartingWorkers:
    """The last answer of every worker that was asked lately. `clock` gives seconds that never go back."""

    def __init__(self, port: int = HTTP_PORT, clock: Callable[[], float] = time.monotonic) -> None:
        self._port = port
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._asked_s: dict[Key, float] = {}
        self._looked_s: dict[Key, float] = {}
        self._answers: dict[Key, Answer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def told(self, pod: str, address: str, serves: bool) -> Answer:
        """What the worker in this pod last said; asks at its address again when that is due.

        What it said before it served is forgotten then, and one that serves is asked seldom, whether it answers or not.
        """
        key = (pod, address, serves)  # an address soon belongs to another pod
        every_s = ASK_SERVING_EVERY_S if serves else ASK_EVERY_S
        now_s = self._looked_s[key] = self._clock()
        if now_s - self._asked_s.get(key, now_s - every_s) >= every_s:
            self._forget(now_s)
            self._asked_s[key] = now_s
            task = asyncio.create_task(self._ask(key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self._answers.get(key, Answer())

    async def close(self) -> None:
        """End what is being asked, and the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _ask(self, key: Key) -> None:
        _, address, _ = key
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), auto_decompress=False)
        host = f"[{address}]" if ":" in address else address
        try:
            async with self._session.get(f"http://{host}:{self._port}/readyz", allow_redirects=False) as response:
                self._answers[key] = read(await response.content.read(ANSWER_BYTES_MAX))
        except (aiohttp.ClientError, OSError, TimeoutError):
            self._answers[key] = Answer()  # it does not listen yet, or not any more

    def _forget(self, now_s: float) -> None:
        for key in [one for one, looked_s in self._looked_s.items() if now_s - looked_s > FORGET_S]:
            del self._looked_s[key]
            self._asked_s.pop(key, None)
            self._answers.pop(key, None)


def read(body: bytes) -> Answer:
    """What /readyz says, fit for a status; nothing for anything that it should not say."""
    try:
        document = json.loads(body)
        ready, reason, message = document["ready"], document["reason"], document["message"]
        attribution = document.get("attribution") or {}
        split_by, why = attribution.get("reason"), attribution.get("message")
    except (ValueError, KeyError, TypeError, AttributeError):
        return Answer()
    if ready is True:
        capacity = _capacity(document.get("capacity"))
        if split_by not in _STANDING_IN or not isinstance(why, str):
            return Answer(capacity=capacity)
        return Answer(stand_in=(str(split_by), f"{_sentence(why, STAND_IN_MAX)}."), capacity=capacity)
    return (
        Answer(progress=_sentence(message, SENTENCE_MAX))
        if reason in _TELLING and isinstance(message, str)
        else Answer()
    )


def _capacity(told: Any) -> dict[str, Any] | None:
    """Only what the status has fields for, and only in their types; nothing of an answer that is broken anywhere."""
    if not isinstance(told, dict) or not isinstance(told.get("batches"), list):
        return None
    texts = {key: told.get(key) for key in ("profileHash", "gpuClass", "boundBy")}
    numbers = {key: told[key] for key in ("contextTokens", "memoryHeadroomBytes") if key in told}
    batches = [_batch(one) for one in told["batches"][:BATCHES_MAX]]
    known = all(isinstance(one, str) and len(one) <= SENTENCE_MAX for one in texts.values())
    if not known or not all(type(one) is int for one in numbers.values()) or None in batches:
        return None
    return {**texts, **numbers, "batches": batches}


def _batch(told: Any) -> dict[str, Any] | None:
    if not isinstance(told, dict) or type(told.get("batchSize")) is not int:
        return None
    figures = {key: told.get(key) for key in ("tokensPerSecond", "gpuSecondsPerThousandTokens")}
    if not all(isinstance(one, str) and _DECIMAL.fullmatch(one) for one in figures.values()):
        return None
    return {"batchSize": told["batchSize"], **figures}


def _sentence(text: str, longest: int) -> str:
    return "".join(one if one.isprintable() else " " for one in text)[:longest].strip().rstrip(".")
