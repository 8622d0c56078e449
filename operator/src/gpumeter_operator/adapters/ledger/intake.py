"""Many workers' pages in one transaction: thousands of workers that send a few records each share one commit.

Owns what may be written together. A page that is not simply the next one of its boot is not: it goes through
`Ledger.take` by itself, which compares, retries and keeps evidence. Either way a page is taken whole or not at all.

Pages are judged before the transaction begins, by where their boots stood then: that takes as long as the writing, and
others write meanwhile. Where a boot has moved since, its cursor does not let the page in.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger import locks, rows
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.days import DayMissing
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable, reading
from gpumeter_operator.adapters.ledger.read import boot_of
from gpumeter_operator.adapters.ledger.rows import Taken
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.accept import Accepted, OfPod, PageRefused, accept, others_ns
from gpumeter_operator.billing.facts import NOTHING, BootFacts, Worker
from gpumeter_usage.chain import GENESIS
from gpumeter_usage.page import Page
from gpumeter_usage.record import Status

Given = tuple[Worker, Page, bool]
"""A worker's page, and whether the journal ends with it (`whole` of `accept`)."""

Refusal = PageRefused | LedgerUnavailable


@dataclass(frozen=True, slots=True)
class _Judged:
    """A page that is the next one of its boot, from where that stands, and what of it is acceptable."""

    worker: Worker
    page: Page
    known: BootFacts | None
    accepted: Accepted

    @property
    def taken(self) -> Taken:
        records, seq = self.accepted.records, self.page.after + len(self.page.links)
        named = frozenset(record.profile_hash for record in records if record.profile_hash)
        return Taken(len(records), seq, self.accepted.head_hash, named)


def take_all(ledger: Ledger, given: Sequence[Given], now_ns: int) -> list[Taken | Refusal]:
    """Commit these pages; for each what became of it, or what `Ledger.take` would have raised for it.

    Raises LedgerUnavailable where none of them was taken.
    """
    if len(given) == 1:
        return [_alone(ledger, given[0], now_ns)]
    judged = _judge(ledger, given, now_ns)
    next_ones = [each for each in judged if isinstance(each, _Judged)]
    try:
        moved = iter(_write(ledger, next_ones, now_ns))
    except (DayMissing, IntegrityError):
        moved = iter([False] * len(next_ones))  # none was committed; alone each makes its day, or tells its fault
    results: list[Taken | Refusal] = []
    for each, one in zip(judged, given, strict=True):
        if isinstance(each, PageRefused):
            results.append(each)
        elif each is not None and next(moved):
            results.append(each.taken)
        else:
            results.append(_alone(ledger, one, now_ns))
    return results


def boots_of(ledger: Ledger, worker_uids: Collection[str]) -> dict[str, tuple[BootFacts, ...]]:
    """The chains of these workers, oldest first, in one query; a worker without any is left out."""
    with reading(ledger.engine) as connection:
        return _boots(connection, worker_uids)


def settle_all(ledger: Ledger, settled: Sequence[tuple[str, int]]) -> None:
    """Note of each of these workers (uid, time) that all its usage up to that time is committed; never moves back."""
    newest = dict(sorted(settled, key=lambda one: one[1]))
    with ledger.writing(*(locks.of_worker(uid) for uid in newest)) as connection:
        p = t.progress.c
        known = {row.worker_uid: row for row in connection.execute(select(t.progress).where(p.worker_uid.in_(newest)))}
        for uid, settled_ns in newest.items():
            row = known.get(uid)
            if row is None or row.problem or row.settled_ns < settled_ns:
                reached_ns = max(settled_ns, row.settled_ns if row else 0)
                rows.put_progress(connection, uid, {"settled_ns": reached_ns, "problem": ""})


def _judge(ledger: Ledger, given: Sequence[Given], now_ns: int) -> list[_Judged | PageRefused | None]:
    """Each page as it is to be judged where its boot stands now; None where it is not the next one of its boot."""
    uids = {worker.worker_uid for worker, _, _ in given}
    c = t.containers.c
    began = select(c.worker_uid, func.min(c.at_ns)).where(c.worker_uid.in_(uids), c.event == "started")
    with reading(ledger.engine) as connection:
        known = _boots(connection, uids)
        boots = {(uid, boot.boot_id): boot for uid, of_worker in known.items() for boot in of_worker}
        since_ns = {row[0]: int(row[1]) for row in connection.execute(began.group_by(c.worker_uid))}
    met: set[tuple[str, str]] = set()
    judged: list[_Judged | PageRefused | None] = []
    for worker, page, whole in given:
        key = (worker.worker_uid, page.boot_id)
        boot = boots.get(key)
        seq, head_hash = (boot.committed_seq, boot.head_hash) if boot else (0, GENESIS)
        if (
            key in met
            or page.after != seq
            or not page.links
            or (boot and boot.seal is not Status.NONE)
            or not page.boot_id.isprintable()
        ):
            judged.append(None)
            continue
        of_pod = OfPod(since_ns.get(key[0], 0), others_ns(known.get(key[0], ()), page.boot_id))
        spent = boot.spent if boot else NOTHING
        try:
            accepted = accept(page, worker, head_hash, now_ns, spent=spent, of_pod=of_pod, whole=whole)
        except PageRefused as refused:
            judged.append(refused)
            continue
        met.add(key)
        judged.append(_Judged(worker, page, boot, accepted))
    return judged


def _write(ledger: Ledger, judged: Sequence[_Judged], now_ns: int) -> list[bool]:
    """Commit these pages; for each whether it is in: it is not where another collector was faster."""
    if not judged:
        return []
    services = {locks.of_service(each.worker.service_key, shared=True) for each in judged}
    workers = {locks.of_worker(each.worker.worker_uid) for each in judged}
    with ledger.writing(*services, *workers) as connection:
        moved = [rows.advance(connection, each.known, each.accepted) for each in judged]
        pages = [
            (each.worker, each.accepted.records, each.page.links)
            for each, is_next in zip(judged, moved, strict=True)
            if is_next
        ]
        if pages:
            rows.insert_pages(connection, pages, now_ns, days=ledger.days)
    return moved


def _boots(connection: Connection, worker_uids: Collection[str]) -> dict[str, tuple[BootFacts, ...]]:
    b = t.boots.c
    of_these = select(t.boots).where(b.worker_uid.in_(worker_uids)).order_by(b.worker_uid, b.started_ns, b.boot_id)
    found: dict[str, tuple[BootFacts, ...]] = {}
    for row in connection.execute(of_these):
        found[row.worker_uid] = (*found.get(row.worker_uid, ()), boot_of(row))
    return found


def _alone(ledger: Ledger, given: Given, now_ns: int) -> Taken | Refusal:
    worker, page, whole = given
    try:
        return ledger.take(worker, page, now_ns, whole=whole)
    except (PageRefused, LedgerUnavailable) as refusal:
        return refusal
    except IntegrityError as error:  # a fault of this page or of the schema; others' pages must not wait for it
        told = str(error.orig).strip().splitlines()
        return LedgerUnavailable(
            f"The database refuses what worker {worker.worker_uid} sent: {told[0] if told else ''}"
        )
