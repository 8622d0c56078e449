"""Collects the records of workers: pull, verify, commit, and only then acknowledge.

Owns the order of these steps and what becomes of a worker that fails in one of them: an alarm with a sentence, and
nobody else is touched. What is acceptable is decided in billing.accept, what is durable in the ledger.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target, WorkerRefuses, WorkerSilent
from gpumeter_operator.billing.accept import PageRefused, refuse_foreign, refuse_future
from gpumeter_operator.billing.facts import BootFacts, Worker
from gpumeter_usage.chain import GENESIS
from gpumeter_usage.page import Acknowledgement, Boot, JournalStatus, Page, PageInvalid
from gpumeter_usage.record import Status

log = logging.getLogger(__name__)

MAX_PULLS = 32
"""Workers that are asked at the same time: bounds memory (a page each) and connections."""

FIGURES = re.compile(r"[0-9a-f]{16,}|[0-9]+")
"""A fault that lasts is told with another seq or hash in every pull; without them it is one alarm of a boot."""

MAX_TOLD = 4  # of a worker's refused boots in one sentence; the alarms tell of all

T = TypeVar("T")


class Execute(Protocol):
    """Runs a blocking call of the ledger where it does not stop the event loop."""

    async def __call__(self, call: Callable[[], T]) -> T:
        """The call's result."""
        ...


class WorkersPort(Protocol):
    """What the collector needs of workers. Raises WorkerSilent, WorkerRefuses, PageInvalid."""

    async def status(self, target: Target) -> JournalStatus:
        """What is in the journal."""
        ...

    async def page(self, target: Target, boot_id: str, after: int) -> Page:
        """The records of a boot after a seq."""
        ...

    async def acknowledge(self, target: Target, acknowledgement: Acknowledgement) -> None:
        """Say what is committed."""
        ...


class Listener(Protocol):
    """Who wants to know which profiles records name. Never waits and never fails in `heard`."""

    def heard(self, worker: Worker, target: Target, hashes: Iterable[str] = ()) -> None:
        """A worker answered, and its new records named these."""
        ...

    def forget(self, worker_uid: str) -> None:
        """A worker is gone."""
        ...

    async def finish(self) -> None:
        """Wait for what is under way."""
        ...


@dataclass(slots=True)
class Counters:
    """What the collector has done since it started, for its metrics."""

    records: int = 0
    pages: int = 0
    pulls_failed: int = 0
    alarms: dict[str, int] = field(default_factory=dict)
    lag_ns: dict[str, int] = field(default_factory=dict)  # by worker, how far its settled records are behind
    ledger_problem: str = ""


class NotAllCollected(Exception):
    """Some of a worker's boots were refused, and are named in alarms; the message is their sentences."""


class Collector:
    """Pulls every worker that it is told of; at most one pull a worker at a time, MAX_PULLS in all."""

    def __init__(
        self,
        ledger: Ledger,
        workers: WorkersPort,
        execute: Execute,
        clock_ns: Callable[[], int],
        profiles: Listener | None = None,
    ) -> None:
        self.counters = Counters()
        self._profiles = profiles
        self._ledger = ledger
        self._workers = workers
        self._execute = execute
        self._clock_ns = clock_ns
        self._slots = asyncio.Semaphore(MAX_PULLS)
        self._pulls: dict[str, asyncio.Task[None]] = {}

    def start_pulls(self, fleet: Iterable[tuple[Worker, Target]]) -> None:
        """Begin a pull of every worker that is not being pulled; a slow one delays only itself."""
        for worker, target in fleet:
            if worker.worker_uid not in self._pulls:
                pull = asyncio.create_task(self._pull_in_turn(worker, target))
                self._pulls[worker.worker_uid] = pull
                pull.add_done_callback(partial(self._forget_pull, worker.worker_uid))

    async def finish(self) -> None:
        """Wait until no pull is under way: a page that was read is committed and acknowledged."""
        while self._pulls:
            await asyncio.wait(list(self._pulls.values()))
        if self._profiles:
            await self._profiles.finish()

    def forget(self, worker_uid: str) -> None:
        """A worker is gone; it has no lag any more."""
        self.counters.lag_ns.pop(worker_uid, None)
        if self._profiles:
            self._profiles.forget(worker_uid)

    def _forget_pull(self, worker_uid: str, _: asyncio.Task[None]) -> None:
        self._pulls.pop(worker_uid, None)

    async def pull(self, worker: Worker, target: Target) -> bool:
        """Collect everything that a worker's journal holds; returns whether that succeeded."""
        try:
            settled_ns = await self._collect(worker, target)
        except WorkerSilent as silence:
            await self._fail(worker, str(silence))
        except WorkerRefuses as refusal:
            await self._fail(worker, str(refusal), alarm="WorkerRefuses")
        except PageInvalid as broken:
            await self._fail(worker, str(broken), alarm="PageInvalid")
        except PageRefused as refused:
            await self._fail(worker, str(refused), alarm=refused.reason)
        except NotAllCollected as refusals:
            await self._fail(worker, str(refusals))
        except LedgerUnavailable as problem:
            self.counters.ledger_problem = str(problem)
            log.error("%s Nothing is acknowledged; workers keep their records.", problem)
        else:
            self.counters.lag_ns[worker.worker_uid] = max(0, self._clock_ns() - settled_ns)
            self.counters.ledger_problem = ""
            return True
        self.counters.pulls_failed += 1
        return False

    async def _pull_in_turn(self, worker: Worker, target: Target) -> None:
        async with self._slots:
            try:
                await self.pull(worker, target)
            except Exception:
                log.exception("The pull of pod %s/%s failed unexpectedly.", worker.namespace, worker.pod)

    async def _collect(self, worker: Worker, target: Target) -> int:
        status = await self._workers.status(target)
        now_ns = self._clock_ns()
        refuse_foreign(worker, status.worker_uid, status.service)
        refuse_future("the worker's watermark", status.watermark_ns, now_ns)
        if self._profiles:
            self._profiles.heard(worker, target)
        known = {boot.boot_id: boot for boot in await self._execute(partial(self._ledger.boots, worker.worker_uid))}
        refusals = []
        for boot in status.boots:
            # A boot is refused alone: if it kept those after it from being acknowledged, their lease would run out.
            try:
                await self._collect_boot(worker, target, boot, known.get(boot.boot_id), status.watermark_ns)
            except (WorkerRefuses, PageInvalid, PageRefused) as refusal:
                reason, kept = type(refusal).__name__, None
                if isinstance(refusal, PageRefused):
                    reason, kept = refusal.reason, refusal.kept
                await self._alarm(worker, reason, str(refusal), kept, boot.boot_id)
                refusals.append(str(refusal))
        listed = {boot.boot_id for boot in status.boots}
        for lost in (boot for boot in known.values() if boot.seal is Status.NONE and boot.boot_id not in listed):
            # Its records so far are safe; what came after them is not in this journal any more.
            message = f"boot {lost.boot_id} has left the journal without a seal after seq {lost.committed_seq}"
            await self._alarm(worker, "BootLost", message)
        if refusals:
            raise NotAllCollected("; ".join(refusals[:MAX_TOLD]))
        await self._execute(partial(self._ledger.settle, worker.worker_uid, status.watermark_ns))
        return status.watermark_ns

    async def _collect_boot(
        self, worker: Worker, target: Target, boot: Boot, known: BootFacts | None, watermark_ns: int
    ) -> None:
        seq, head_hash = (known.committed_seq, known.head_hash) if known else (0, GENESIS)
        if boot.head_seq < seq:
            raise PageRefused(
                "JournalRewound", f"boot {boot.boot_id:.64} ends at seq {boot.head_seq}; {seq} was committed before"
            )
        while seq < boot.head_seq:
            page = await self._workers.page(target, boot.boot_id, seq)
            if page.boot_id != boot.boot_id:
                raise PageRefused("ForeignBoot", f"boot {boot.boot_id:.64} was asked, {page.boot_id:.64} was sent")
            taken = await self._execute(partial(self._ledger.take, worker, page, self._clock_ns()))
            if taken.seq <= seq:
                raise PageRefused("NothingNew", f"boot {boot.boot_id:.64}: nothing after seq {seq} was sent")
            seq, head_hash = taken.seq, taken.head_hash
            if self._profiles:
                self._profiles.heard(worker, target, taken.profile_hashes)
            self.counters.records += taken.inserted
            self.counters.pages += 1
            await self._workers.acknowledge(target, Acknowledgement(boot.boot_id, seq, head_hash))
        if seq == boot.head_seq and head_hash != boot.head_hash:
            await self._execute(
                partial(self._ledger.refuse_head, worker, boot, head_hash, watermark_ns, self._clock_ns())
            )
        if known and seq == known.committed_seq and boot.acknowledged_seq < seq:
            # The former acknowledgement was lost on its way.
            await self._workers.acknowledge(target, Acknowledgement(boot.boot_id, seq, head_hash))

    async def _fail(self, worker: Worker, message: str, alarm: str = "") -> None:
        if alarm:
            await self._alarm(worker, alarm, message)
        try:
            await self._execute(partial(self._ledger.note_problem, worker.worker_uid, message))
        except LedgerUnavailable as problem:
            self.counters.ledger_problem = str(problem)

    async def _alarm(
        self, worker: Worker, reason: str, message: str, kept: bool | None = None, boot_id: str = ""
    ) -> None:
        self.counters.alarms[reason] = self.counters.alarms.get(reason, 0) + 1
        new = kept
        if new is None:
            try:
                alarm = partial(self._ledger.raise_alarm, reason, worker.worker_uid, message, self._clock_ns())
                fault = FIGURES.sub("#", message)
                new = await self._execute(partial(alarm, fault=fault, boot_id=boot_id))
            except LedgerUnavailable as problem:
                self.counters.ledger_problem = str(problem)
                new = True
        if new:
            log.warning("%s: pod %s/%s: %s", reason, worker.namespace, worker.pod, message)
