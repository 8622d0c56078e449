"""This process as a candidate for the Lease: flow.election in a thread and an event loop of its own.

Owns the thread, and what becomes of the process when the Lease is lost: it ends here and at once, because the loop that
acts may be what stands still. That loop is busy for seconds when thousands of services come together, and a renewal
that waited for its turn there would come too late, as would its answer. It may not be dead, though: whoever has not
come round for `STALLED_NS` is not renewed for. Does not know what the holder does, nor when a Lease may be taken.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from gpumeter_operator.decide.lease import Terms
from gpumeter_operator.flow.election import Election, LeaseStore
from gpumeter_operator.flow.tenure import Tenure

LEASE_LOST = 1
BEAT_S = 1.0
LAST_WORDS_S = 0.5
STALLED_NS = 30 * 1_000_000_000  # a thousand times what a healthy loop needs; until then the probes judge

log = logging.getLogger(__name__)

T = TypeVar("T")


class Leases(LeaseStore, Protocol):
    """Where the Lease is, over a connection of its own: adapters.lease.Leases."""

    async def close(self) -> None:
        """Close the connection."""
        ...


class Candidate:
    """Stands for the Lease from `stand` on; everything is called in the loop that acts."""

    def __init__(
        self,
        leases: Leases,
        tenure: Tenure,
        me: str,
        terms: Terms = Terms(),  # noqa: B008 - frozen
        stalled_ns: int = STALLED_NS,
    ) -> None:
        self.election = Election(leases, tenure, me, terms, standstill=self._standstill)
        self._stalled_ns = stalled_ns
        self.won = asyncio.Event()
        self._leases = leases
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lease", daemon=True)
        self._beaten_ns = time.monotonic_ns()
        self._tasks: list[asyncio.Task[None]] = []
        self._standing: asyncio.Task[None] | None = None

    def stand(self) -> None:
        """Begin; `won` is set when the Lease is ours."""
        self._thread.start()
        self._tasks = [
            asyncio.create_task(self._beat(), name="heartbeat"),
            asyncio.create_task(self._there(self._begin(asyncio.get_running_loop())), name="candidate"),
        ]

    async def stand_down(self) -> None:
        """Renew no more; the Lease stays ours until it is released or runs out."""
        await self._there(self._end())

    async def release(self) -> bool:
        """Give the Lease back, after `stand_down` and when nothing is written any more."""
        return await self._there(self.election.release())

    async def close(self) -> None:
        """End the thread."""
        for task in self._tasks:
            task.cancel()
        if self._thread.is_alive():
            await self._there(self._end())
            await self._there(self._leases.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join)
        self._loop.close()

    async def _there(self, what: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(what, self._loop))

    async def _beat(self) -> None:
        while True:
            self._beaten_ns = time.monotonic_ns()
            await asyncio.sleep(BEAT_S)

    def _standstill(self) -> str | None:
        age_ns = time.monotonic_ns() - self._beaten_ns
        return f"the process did not come round for {age_ns / 1e9:.0f} s" if age_ns > self._stalled_ns else None

    # What follows runs in the thread.

    async def _begin(self, acting: asyncio.AbstractEventLoop) -> None:
        self._standing = asyncio.create_task(self._stand())
        await self.election.won.wait()
        acting.call_soon_threadsafe(self.won.set)

    async def _stand(self) -> None:
        try:
            lost = await self.election.run()
            say = partial(log.error, "%s: %s", lost.reason, lost.message)
        except asyncio.CancelledError:
            return
        except BaseException as error:
            say = partial(log.error, "LeaseNotRenewed: the loop that renews the lease has failed.", exc_info=error)
        # No write may follow, so nothing is tidied up and the kernel closes what is open. A log that nobody reads any
        # more must not keep the process, either: whoever holds its lock may be what stands still.
        ends = threading.Timer(LAST_WORDS_S, os._exit, (LEASE_LOST,))
        ends.daemon = True
        try:
            ends.start()
        except RuntimeError:  # no thread is to be had, so nobody would end a process whose log hangs
            os._exit(LEASE_LOST)
        say()
        logging.shutdown()
        os._exit(LEASE_LOST)

    async def _end(self) -> None:
        if self._standing is not None:
            self._standing.cancel()
            with suppress(asyncio.CancelledError):
                await self._standing
