"""Keeps the journal's disk work off the event loop: one thread writes, one reads.

Owns the order of transactions and what happens when the disk refuses: the flush is kept and tried again, because what
was measured must not be lost while this process lives. A write that has begun is never abandoned, even where its caller
is cancelled: it would be on disk and still wait here, to be written a second time. Does not know what a flush says.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gpumeter_usage.page import Acknowledgement, JournalStatus, Page
from gpumeter_usage.record import Record, canonical
from gpumeter_worker.metering.journal import FlushRefused, Head, Journal
from gpumeter_worker.metering.journalfile import Damaged, DiskFull, JournalUnusable
from gpumeter_worker.metering.journalpages import Reader
from gpumeter_worker.metering.meter import Flush, Identity

T = TypeVar("T")
log = logging.getLogger(__name__)

_RETRY_OPEN_S = 1.0
_SHOWN_BYTES = 2**16
"""So much of a flush that is refused is logged, which is a hundred records or so."""


class JournalWriter:
    """The journal as the event loop sees it.

    `problem` is a sentence while nothing can be written, `damage` one once something that was written cannot be read,
    `full` one while more is unacknowledged than there may be; else they are empty.
    """

    def __init__(self, directory: Path, worker_uid: str, service: str, max_bytes: int) -> None:
        self._directory = directory
        self._worker_uid = worker_uid
        self._service = service
        self._max_bytes = max_bytes
        self._writing = ThreadPoolExecutor(1, "journal-write")
        self._reading = ThreadPoolExecutor(1, "journal-read")
        self._journal: Journal | None = None
        self._reader: Reader | None = None
        self._waiting: deque[tuple[Flush, Record | None]] = deque()
        self._order = asyncio.Lock()
        self._leaving = False
        self._begun: set[asyncio.Task[Any]] = set()
        self.problem = ""
        self.damage = ""
        self.full = ""
        self.opening_over = asyncio.Event()
        self.head: Head | None = None
        self.acknowledged_at_ns = time.monotonic_ns()
        self.commit_ns_last = 0

    async def open(self, identity: Identity, started_ns: int) -> None:
        """Begin this boot's chain. On failure `problem` says why; whatever is readable stays readable.

        Returns while there is hope only once it is open: a full disk is waited for.
        """
        while self._journal is None:
            try:
                self._journal, self.head = await self._write(lambda: _opened(self._directory, identity, started_ns))
                self.problem = ""
            except DiskFull as error:
                self._fail(error)
                self.opening_over.set()  # whoever leaves need not wait for it
                await asyncio.sleep(_RETRY_OPEN_S)
            except JournalUnusable as error:
                self._fail(error)
                break
        self.acknowledged_at_ns = time.monotonic_ns()
        self.opening_over.set()

    async def append(self, flush: Flush, closing: Record | None = None) -> bool:
        """Commit a flush behind all that wait already; True when it and they are on disk."""
        if closing is not None:
            self.leave()
        self._waiting.append((flush, closing))
        return await self.retry()

    def leave(self) -> None:
        """The process leaves: from now on all that waits may use the reserve, for memory keeps it no longer."""
        self._leaving = True

    async def retry(self) -> bool:
        """Commit what waits; True when nothing is left."""
        return await self._to_the_end(self._commit())

    async def acknowledge(self, acknowledgement: Acknowledgement) -> None:
        """Trim what is committed elsewhere, and renew the lease where it names what was acknowledged last.

        Raises AcknowledgementRefused, JournalUnusable.
        """
        await self._to_the_end(self._trim(acknowledgement))

    async def status(self) -> JournalStatus:
        """Raises JournalUnusable."""
        return await self._read(lambda reader: reader.status())

    async def page(self, boot_id: str, after: int, limit: int) -> Page | None:
        """Raises JournalUnusable, RecordsGone."""
        try:
            return await self._read(lambda reader: reader.page(boot_id, after, limit))
        except Damaged as error:
            if self.damage != str(error):
                log.error("%s", error)
            self.damage = str(error)
            raise

    async def close(self) -> None:
        """Wait for what runs and give the file back."""
        async with self._order:
            journal, self._journal = self._journal, None
            if journal is not None:
                await self._write(journal.close)
        self._writing.shutdown(wait=False)
        self._reading.shutdown(wait=False)

    async def _commit(self) -> bool:
        async with self._order:
            journal = self._journal
            while self._waiting and journal is not None:
                flush, closing = self._waiting[0]
                began_ns = time.monotonic_ns()
                try:
                    self.head = await self._write(partial(journal.append, flush, closing, leaving=self._leaving))
                except JournalUnusable as error:
                    self._fail(error)
                    return False
                except (FlushRefused, TypeError, ValueError, ArithmeticError) as error:
                    # A defect of ours: stop admitting rather than write a bill that does not add up. What cannot even
                    # be written as a record is no better.
                    problem = f"a flush was refused ({error}); restart the worker and report this"
                    if self.problem != problem:
                        _log_refused(flush)
                    self._fail(JournalUnusable(problem))
                    return False
                self._waiting.popleft()
                self.commit_ns_last = time.monotonic_ns() - began_ns
                self.problem = ""
            if journal is not None:
                await self._look_at_size(journal)
            return not self._waiting

    async def _look_at_size(self, journal: Journal) -> None:
        try:
            size = await self._write(journal.size_bytes)
        except JournalUnusable as error:
            log.warning("how much the journal holds cannot be read: %s", error)  # what was committed stays committed
            return
        self.full = (
            f"the journal holds {size} bytes that nobody has acknowledged (at most {self._max_bytes})"
            if size > self._max_bytes
            else ""
        )

    async def _trim(self, acknowledgement: Acknowledgement) -> None:
        journal = self._journal
        if journal is None:
            raise JournalUnusable(self.problem or "the journal is not open")
        self.head, newest = await self._write(lambda: _acknowledged(journal, acknowledgement))
        # A lease is for records that a collector has: whoever says no hash of theirs, or an old one, renews none.
        if newest:
            self.acknowledged_at_ns = time.monotonic_ns()
        if self.full:
            await self._look_at_size(journal)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        self._begun.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._begun.discard)
        return await asyncio.shield(task)

    async def _write(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writing, work)

    async def _read(self, work: Callable[[Reader], T]) -> T:
        def with_reader() -> T:
            if self._reader is None:
                self._reader = Reader(self._directory, self._worker_uid, self._service)
            return work(self._reader)

        return await asyncio.get_running_loop().run_in_executor(self._reading, with_reader)

    def _fail(self, error: JournalUnusable) -> None:
        if self.problem != str(error):
            log.error("the journal is unusable: %s", error)
        self.problem = str(error)


def _log_refused(flush: Flush) -> None:
    """The only trace of what was measured there: it is never on disk. Of a long flush, the beginning."""
    shown: list[str] = []
    left_bytes = _SHOWN_BYTES
    for record in flush.records:
        try:
            body = canonical(record).decode()
        except (TypeError, ValueError):
            body = ascii(record)
        left_bytes -= len(body)
        if left_bytes < 0:
            break
        shown.append(body)
    log.error(
        "refused: %d records up to %d with %d ns unmeasured, of which the first %d are\n%s",
        len(flush.records),
        flush.frontier_ns,
        flush.unmeasured_ns,
        len(shown),
        "\n".join(shown),
    )


def _acknowledged(journal: Journal, acknowledgement: Acknowledgement) -> tuple[Head, bool]:
    return journal.acknowledge(acknowledgement), journal.ends_acknowledged(acknowledgement)


def _opened(directory: Path, identity: Identity, started_ns: int) -> tuple[Journal, Head]:
    journal = Journal(directory, identity, started_ns)
    return journal, journal.head()
