"""Collects the records of workers: pull, verify, commit, and only then acknowledge.

Owns the order of these steps, what a worker may take of our time and memory in one turn, and what becomes of one that
fails: an alarm with a sentence, and nobody else is touched. Whose turn it is is decided in flow.turns, what is
acceptable in billing.accept, what is durable in the ledger.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.intake import Given, boots_of, settle_all, take_all
from gpumeter_operator.adapters.ledger.resume import take_after_gap
from gpumeter_operator.adapters.ledger.rows import Taken
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target, WorkerRefuses, WorkerSilent, page_bytes_max
from gpumeter_operator.billing.accept import PageRefused, refuse_foreign, refuse_future
from gpumeter_operator.billing.facts import BootFacts, Worker
from gpumeter_operator.billing.gaps import lost, refuse_without_continuation
from gpumeter_operator.flow.bounds import Batch, Room
from gpumeter_operator.flow.turns import Outcome, Silence, Turns
from gpumeter_usage.chain import GENESIS
from gpumeter_usage.page import MAX_PAGE_RECORDS, Acknowledgement, Boot, JournalStatus, Page, PageInvalid
from gpumeter_usage.record import Status

log = logging.getLogger(__name__)

MAX_TURNS = 256
"""Workers that are asked at the same time: bounds connections. Most of them are waited for, so there are many: one that
does not answer keeps its place for CONNECT_TIMEOUT_S, and a hundred of those must not keep the others waiting."""

PAGES_BYTES = 128 * 2**20
"""Room for the pages that are read and not committed yet; each takes what it may have at most (page_bytes_max)."""

PAGES_A_TURN = 4
"""A worker with a backlog of a million records gets its next 20,000 when everybody else has had a turn."""

TURN_S = 20.0
"""How long one worker may make us wait in one turn, all its answers together."""

MAX_TOGETHER = 64
"""Pages that are committed together; to wait for more would only make each of them wait longer."""

COMMITS_AT_ONCE = 2
"""While one is written, the pages of the next are judged: the database works beside the interpreter, not after it."""

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

    async def page(self, target: Target, boot_id: str, after: int, limit: int) -> Page:
        """The records of a boot after a seq, at most `limit`."""
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
    settled_ns: dict[str, int] = field(default_factory=dict)  # by worker, how far its records are committed
    ledger_problem: str = ""


class NotAllCollected(Exception):
    """Some of a worker's boots were refused, and are named in alarms; the message is their sentences."""


class Turn:
    """One worker's turn: how many pages and how much waiting it has left."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.pages_left = PAGES_A_TURN
        self._left_s = TURN_S

    async def answer(self, exchange: Awaitable[T]) -> T:
        """What the worker answers. Raises WorkerSilent when its time is used up."""
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(self._left_s):
                return await exchange
        except TimeoutError:
            raise WorkerSilent(f"{self.target.host} kept us waiting for {TURN_S:.0f} s in one turn") from None
        finally:
            self._left_s -= time.monotonic() - begun_s


class Collector:
    """Pulls every worker that it is told of, turn by turn; at most one turn a worker at a time, MAX_TURNS in all."""

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
        self._turns = Turns()
        self._runners: set[asyncio.Task[None]] = set()
        self._room = Room(PAGES_BYTES)
        self._cursors = Batch(self._boots_of, MAX_TURNS)
        self._takes = Batch(self._take_all, MAX_TOGETHER, COMMITS_AT_ONCE)
        self._settles = Batch(self._settle_all, MAX_TURNS)

    @property
    def silent(self) -> Mapping[str, Silence]:
        """By uid, the workers that did not answer when they were asked last."""
        return self._turns.silent

    def start_pulls(self, fleet: Iterable[tuple[Worker, Target]], urgent: Collection[str] = ()) -> None:
        """Give every worker a turn that is not having or awaiting one; those whose pods end (`urgent`) go first."""
        self._turns.offer(fleet, self._clock_ns(), urgent)
        for _ in range(min(len(self._turns), MAX_TURNS - len(self._runners))):
            runner = asyncio.create_task(self._run_turns())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)

    async def finish(self) -> None:
        """Wait until everybody has had all turns that are needed: what was read is committed and acknowledged."""
        while self._runners:
            await asyncio.wait(list(self._runners))
        if self._profiles:
            await self._profiles.finish()

    async def stop(self) -> None:
        """The same for those only that have their turn now; the others keep their records."""
        self._turns.drop()
        await self.finish()

    def forget(self, worker_uid: str) -> None:
        """A worker is gone; it has no lag any more."""
        self.counters.settled_ns.pop(worker_uid, None)
        self._turns.forget(worker_uid)
        if self._profiles:
            self._profiles.forget(worker_uid)

    def keep_only(self, worker_uids: Collection[str]) -> None:
        """Forget the lag of workers that are not asked any more: they ended, or are another collector's now."""
        for uid in [uid for uid in self.counters.settled_ns if uid not in worker_uids]:
            del self.counters.settled_ns[uid]

    async def pull(self, worker: Worker, target: Target) -> bool:
        """Collect everything that a worker's journal holds; returns whether that succeeded."""
        while (outcome := await self._turn(worker, target)) is Outcome.MORE:
            pass
        return outcome is Outcome.DONE

    async def _run_turns(self) -> None:
        while (turn := self._turns.next()) is not None:
            worker, target = turn
            outcome = Outcome.TROUBLE
            try:
                outcome = await self._turn(worker, target)
            except Exception:
                log.exception("The pull of pod %s/%s failed unexpectedly.", worker.namespace, worker.pod)
            finally:
                self._turns.ended(worker.worker_uid, outcome, self._clock_ns())

    async def _turn(self, worker: Worker, target: Target) -> Outcome:
        outcome = Outcome.TROUBLE
        try:
            outcome = await self._collect(worker, Turn(target))
        except WorkerSilent as silence:
            outcome = Outcome.SILENT
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
            self.counters.ledger_problem = ""
            return outcome
        self.counters.pulls_failed += 1
        return outcome

    async def _collect(self, worker: Worker, turn: Turn) -> Outcome:
        status = await turn.answer(self._workers.status(turn.target))
        now_ns = self._clock_ns()
        refuse_foreign(worker, status.worker_uid, status.service)
        refuse_future("the worker's watermark", status.watermark_ns, now_ns)
        if self._profiles:
            self._profiles.heard(worker, turn.target)
        known = {boot.boot_id: boot for boot in await self._cursors.put(worker.worker_uid)}
        refusals: list[str] = []
        whole = True
        for boot in status.boots:
            # A boot is refused alone: if it kept those after it from being acknowledged, their lease would run out.
            try:
                whole &= await self._collect_boot(worker, turn, boot, known.get(boot.boot_id), status.watermark_ns)
            except (WorkerRefuses, PageInvalid, PageRefused) as refusal:
                reason, kept = type(refusal).__name__, None
                if isinstance(refusal, PageRefused):
                    reason, kept = refusal.reason, refusal.kept
                await self._alarm(worker, reason, str(refusal), kept, boot.boot_id)
                refusals.append(str(refusal))
        for ended in await self._lost(worker, turn, status, known.values()):
            # Its records so far are safe; what came after them is not in this journal any more.
            message = f"boot {ended.boot_id} has left the journal without a seal after seq {ended.committed_seq}"
            await self._alarm(worker, "BootLost", message)
        if not whole:
            return Outcome.MORE
        if refusals:
            raise NotAllCollected("; ".join(refusals[:MAX_TOLD]))
        await self._settles.put((worker.worker_uid, status.watermark_ns))
        self.counters.settled_ns[worker.worker_uid] = status.watermark_ns
        return Outcome.DONE

    async def _lost(
        self, worker: Worker, turn: Turn, status: JournalStatus, known: Iterable[BootFacts]
    ) -> list[BootFacts]:
        """The boots without a seal that the journal does not hold any more."""
        listed = {boot.boot_id for boot in status.boots}
        if all(boot.seal is not Status.NONE or boot.boot_id in listed for boot in known):
            return []
        # Asked once more, in this order: another collector may have met a new boot, or the end of an old one, since.
        listed = {boot.boot_id for boot in (await turn.answer(self._workers.status(turn.target))).boots}
        now = await self._cursors.put(worker.worker_uid)
        return [boot for boot in now if boot.seal is Status.NONE and boot.boot_id not in listed]

    async def _collect_boot(
        self, worker: Worker, turn: Turn, boot: Boot, known: BootFacts | None, watermark_ns: int
    ) -> bool:
        """Whether all of the boot is committed; where not, the turn's pages are used up."""
        seq, head_hash = (known.committed_seq, known.head_hash) if known else (0, GENESIS)
        if boot.head_seq < seq:
            # The status is older than what was read of the ledger: another collector may have been here in between.
            again = await turn.answer(self._workers.status(turn.target))
            if any(each.boot_id == boot.boot_id and each.head_seq < seq for each in again.boots):
                raise PageRefused(
                    "JournalRewound", f"boot {boot.boot_id:.64} ends at seq {boot.head_seq}; {seq} was committed before"
                )
            return True
        gap = boot.acknowledged_seq > seq
        if gap:
            refuse_without_continuation(boot, seq)
            await self._alarm(worker, "AcknowledgedAhead", lost(boot, seq), boot_id=boot.boot_id)
            seq = boot.acknowledged_seq
        elif boot.acknowledged_hash and 0 < seq == boot.acknowledged_seq and boot.acknowledged_hash != head_hash:
            forked = replace(boot, head_seq=seq, head_hash=boot.acknowledged_hash)
            await self._refuse_head(worker, forked, head_hash, watermark_ns)
        while seq < boot.head_seq:
            if turn.pages_left == 0:
                return False
            turn.pages_left -= 1
            try:
                taken = await self._take_page(worker, turn, boot, seq, gap=gap)
            except (WorkerRefuses, PageInvalid, PageRefused):
                # Where another collector was faster, the worker has trimmed what we asked for.
                now = {each.boot_id: each for each in await self._cursors.put(worker.worker_uid)}.get(boot.boot_id)
                if now is None or now.committed_seq <= seq:
                    raise
                seq, head_hash, gap = now.committed_seq, now.head_hash, False
                continue
            gap = False
            seq, head_hash = taken.seq, taken.head_hash
            if self._profiles:
                self._profiles.heard(worker, turn.target, taken.profile_hashes)
            self.counters.records += taken.inserted
            self.counters.pages += 1
            await self._acknowledge(turn, boot, seq, head_hash)
        if seq == boot.head_seq and head_hash != boot.head_hash:
            await self._refuse_head(worker, boot, head_hash, watermark_ns)
        if known and seq == known.committed_seq and boot.acknowledged_seq < seq:
            # The former acknowledgement was lost on its way.
            await self._acknowledge(turn, boot, seq, head_hash)
        return True

    async def _take_page(self, worker: Worker, turn: Turn, boot: Boot, seq: int, *, gap: bool) -> Taken:
        limit = min(MAX_PAGE_RECORDS, boot.head_seq - seq)
        async with self._room.of(page_bytes_max(limit)):
            page = await turn.answer(self._workers.page(turn.target, boot.boot_id, seq, limit))
            if page.boot_id != boot.boot_id:
                raise PageRefused("ForeignBoot", f"boot {boot.boot_id:.64} was asked, {page.boot_id:.64} was sent")
            whole = page.after + len(page.links) == boot.head_seq
            if gap:
                last_hash, now_ns = boot.acknowledged_hash, self._clock_ns()
                after = partial(take_after_gap, self._ledger, worker, page, last_hash, now_ns, whole=whole)
                taken = await self._execute(after)
            else:
                taken = await self._takes.put((worker, page, whole))
        if taken.seq <= seq:
            raise PageRefused("NothingNew", f"boot {boot.boot_id:.64}: nothing after seq {seq} was sent")
        return taken

    async def _refuse_head(self, worker: Worker, boot: Boot, our_hash: str, watermark_ns: int) -> None:
        await self._execute(partial(self._ledger.refuse_head, worker, boot, our_hash, watermark_ns, self._clock_ns()))

    async def _acknowledge(self, turn: Turn, boot: Boot, seq: int, head_hash: str) -> None:
        try:
            await turn.answer(self._workers.acknowledge(turn.target, Acknowledgement(boot.boot_id, seq, head_hash)))
        except WorkerRefuses:
            # A boot that is over is forgotten once it is acknowledged whole, by another collector as well as by us.
            if not (boot.sealed and seq == boot.head_seq):
                raise
            status = await turn.answer(self._workers.status(turn.target))
            if boot.boot_id in {each.boot_id for each in status.boots}:
                raise

    async def _boots_of(self, worker_uids: Sequence[str]) -> Sequence[tuple[BootFacts, ...]]:
        found = await self._execute(partial(boots_of, self._ledger, worker_uids))
        return [found.get(uid, ()) for uid in worker_uids]

    async def _take_all(self, pages: Sequence[Given]) -> Sequence[Taken | Exception]:
        return await self._execute(partial(take_all, self._ledger, pages, self._clock_ns()))

    async def _settle_all(self, settled: Sequence[tuple[str, int]]) -> Sequence[None]:
        await self._execute(partial(settle_all, self._ledger, settled))
        return [None] * len(settled)

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
