"""Asks workers that start how far they are: the operator's side of /readyz.

Owns when a worker is asked, how long its answer holds, and that nobody waits for it: a look at a service takes what is
known now, and what is learned meanwhile at the next one. Does not judge what a worker says.
"""

import asyncio
import json
import time
from collections.abc import Callable

import aiohttp

from gpumeter_operator.decide.names import HTTP_PORT

ASK_EVERY_S = 10.0  # every change of a status is a write: a thousand services that load are a hundred writes a second
FORGET_S = 60.0
TIMEOUT_S = 2.0
ANSWER_BYTES_MAX = 2**14
SENTENCE_MAX = 300
_TELLING = ("Loading", "WarmingUp", "Starting", "EngineRestarting", "EngineHung")


class StartingWorkers:
    """The last answer of every worker that was asked lately. `clock` gives seconds that never go back."""

    def __init__(self, port: int = HTTP_PORT, clock: Callable[[], float] = time.monotonic) -> None:
        self._port = port
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._asked_s: dict[str, float] = {}
        self._answers: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def told(self, address: str) -> str:
        """What the worker at this address last said, empty where it said nothing; asks again when that is due."""
        now_s = self._clock()
        if now_s - self._asked_s.get(address, -ASK_EVERY_S) >= ASK_EVERY_S:
            self._forget(now_s)
            self._asked_s[address] = now_s
            task = asyncio.create_task(self._ask(address))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self._answers.get(address, "")

    async def close(self) -> None:
        """End what is being asked, and the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _ask(self, address: str) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), auto_decompress=False)
        host = f"[{address}]" if ":" in address else address
        try:
            async with self._session.get(f"http://{host}:{self._port}/readyz", allow_redirects=False) as response:
                self._answers[address] = sentence(await response.content.read(ANSWER_BYTES_MAX))
        except (aiohttp.ClientError, OSError, TimeoutError):
            self._answers[address] = ""  # it does not listen yet, or not any more

    def _forget(self, now_s: float) -> None:
        for address in [one for one, asked_s in self._asked_s.items() if now_s - asked_s > FORGET_S]:
            del self._asked_s[address]
            self._answers.pop(address, None)


def sentence(body: bytes) -> str:
    """What /readyz says while a worker starts, fit for a status; empty for anything else."""
    try:
        document = json.loads(body)
        reason, message = document["reason"], document["message"]
    except (ValueError, KeyError, TypeError):
        return ""
    if reason not in _TELLING or not isinstance(message, str):
        return ""
    return "".join(one if one.isprintable() else " " for one in message)[:SENTENCE_MAX].strip().rstrip(".")
