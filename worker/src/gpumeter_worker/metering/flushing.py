"""When what was metered is written down: soon after a session's end, at checkpoints, and with a seal at the boot's end.

Owns these moments and that nothing follows the seal. Knows neither sessions nor engines; the meter says what a flush
holds, the journal's writer how it gets to the disk.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from gpumeter_usage.record import Status
from gpumeter_worker.deadline import Deadline
from gpumeter_worker.metering.meter import Meter
from gpumeter_worker.metering.writer import JournalWriter

log = logging.getLogger(__name__)

_GROUP_COMMIT_S = 0.05
"""How long a session's end waits for others to share its transaction; with the disk's time well under 200 ms."""

_RETRY_S = 1.0
_SEAL_S = 20.0
_LOOK_S = 0.02


class Flusher:
    """The flushes of one boot. `before` is called ahead of each that is not the last."""

    def __init__(
        self,
        meter: Meter,
        journal: JournalWriter,
        now_ns: Callable[[], int],
        checkpoint_interval_ms: int,
        before: Callable[[], None],
    ) -> None:
        self._meter = meter
        self._journal = journal
        self._now_ns = now_ns
        self._checkpoint_s = checkpoint_interval_ms / 1000
        self._before = before
        self._wanted = asyncio.Event()
        self._ends = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on, until `end`."""
        self._task = asyncio.create_task(self._often())

    def want(self) -> None:
        """Something is to be on disk soon."""
        self._wanted.set()

    async def flush(self) -> bool:
        """Journal everything up to the frontier; True when it is on disk."""
        if self._journal.problem and not await self._journal.retry():
            return False
        flush = self._meter.cut(self._now_ns())
        return await self._journal.append(flush) if flush else True

    async def end(self, deadline: Deadline) -> None:
        """By a flag and never by a cancellation: a flush in the middle is finished before anything follows it."""
        self._ends = True
        self._wanted.set()
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=deadline.left_s(time.monotonic(), _SEAL_S))

    async def keep(self) -> None:
        """The boot ends without a seal: write what was measured. The next boot on this volume seals the chain."""
        deadline = Deadline(time.monotonic() + _SEAL_S)
        await self.end(deadline)
        self._journal.leave()
        if self._journal.head is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(deadline.left_s(time.monotonic(), _SEAL_S)):
                    await self.flush()

    async def seal(self, deadline: Deadline, cut_short: asyncio.Event) -> None:
        """End the boot's chain, after `end`; tried again while the disk refuses it and there is time."""
        journal = self._journal
        if journal.head is None:
            return
        flush = self._meter.cut(self._now_ns()) or self._meter.nothing()
        try:
            async with asyncio.timeout(deadline.left_s(time.monotonic(), _SEAL_S)):
                sealed = await journal.append(flush, closing=self._meter.seal(Status.DRAINED))
                while not sealed and not cut_short.is_set():
                    await asyncio.sleep(_RETRY_S)
                    sealed = await journal.retry()
        except TimeoutError:
            sealed = False
        if sealed:
            log.info("sealed at record %d", journal.head.seq)
        else:
            log.error("the chain could not be sealed (%s); the next boot seals it", journal.problem or "too slow")

    async def acknowledged(self, deadline: Deadline, grace_ms: int, cut_short: asyncio.Event) -> None:
        """Wait until the ledger has everything, for as long as there is time."""
        now_s = time.monotonic()
        until_s = now_s + deadline.left_s(now_s, grace_ms / 1000)
        while (head := self._journal.head) is not None and head.acknowledged_seq < head.seq:
            if time.monotonic() >= until_s or cut_short.is_set():
                if grace_ms:
                    log.warning("records up to %d were not acknowledged in time; they stay in the journal", head.seq)
                return
            await asyncio.sleep(_LOOK_S)

    async def _often(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S if self._journal.problem else self._checkpoint_s):
                    await self._wanted.wait()
            if self._wanted.is_set():
                await asyncio.sleep(_RETRY_S if self._journal.problem else _GROUP_COMMIT_S)
            if self._ends:
                return
            self._wanted.clear()
            try:
                self._before()
                await self.flush()
            except Exception:
                log.exception("a flush failed; it is tried again")
