"""Many workers' pages in one transaction: thousands of workers that send a few records each share one commit.

Owns what may be written together. A page that is not simply the next one of its boot is not: it goes through
`Ledger.take` by itself, which compares, retries and keeps evidence. Either way a page is taken whole or not at all.
"""

from collections.abc import Collection, Sequence

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger import locks, rows
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.days import DayMissing, Days
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable, reading
from gpumeter_operator.adapters.ledger.read import boot_of
from gpumeter_operator.adapters.ledger.rows import Taken
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.accept import PageRefused, accept
from gpumeter_operator.billing.facts import NOTHING, BootFacts, Worker
from gpumeter_operator.billing.reading import Row
from gpumeter_usage.chain import GENESIS, Link
from gpumeter_usage.page import Page
from gpumeter_usage.record import Record, Status

Given = tuple[Worker, Page]
Refusal = PageRefused | LedgerUnavailable


def take_all(ledger: Ledger, given: Sequence[Given], now_ns: int) -> list[Taken | Refusal]:
    """Commit these pages; for each what became of it, or what `Ledger.take` would have raised for it.

    Raises LedgerUnavailable where none of them was taken.
    """
    if len(given) == 1:
        return [_alone(ledger, *given[0], now_ns)]
    try:
        services = {locks.of_service(worker.service_key, shared=True) for worker, _ in given}
        workers = {locks.of_worker(worker.worker_uid) for worker, _ in given}
        with ledger.writing(*services, *workers) as connection:
            together = _take_next(connection, given, now_ns, ledger.days)
    except (DayMissing, IntegrityError):
        together = [None] * len(given)  # nothing of this was committed; alone each makes its day, or tells its fault
    return [
        _alone(ledger, worker, page, now_ns) if done is None else done
        for done, (worker, page) in zip(together, given, strict=True)
    ]


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


def _take_next(
    connection: Connection, given: Sequence[Given], now_ns: int, days: Days
) -> list[Taken | PageRefused | None]:
    """For each page what became of it; None where it is not the next one of its boot."""
    uids = {worker.worker_uid for worker, _ in given}
    boots = {(uid, boot.boot_id): boot for uid, of_worker in _boots(connection, uids).items() for boot in of_worker}
    c = t.containers.c
    began = select(c.worker_uid, func.min(c.at_ns)).where(c.worker_uid.in_(uids), c.event == "started")
    since_ns = {row[0]: int(row[1]) for row in connection.execute(began.group_by(c.worker_uid))}
    met: set[tuple[str, str]] = set()
    results: list[Taken | PageRefused | None] = []
    pages: list[tuple[Worker, Sequence[Record | Row], Sequence[Link]]] = []
    for worker, page in given:
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
            results.append(None)
            continue
        spent = boot.spent if boot else NOTHING
        try:
            accepted = accept(page, worker, head_hash, now_ns, spent=spent, since_ns=since_ns.get(key[0], 0))
        except PageRefused as refused:
            results.append(refused)
            continue
        met.add(key)
        if not rows.advance(connection, boot, accepted):
            results.append(None)  # another collector was faster
            continue
        pages.append((worker, accepted.records, page.links))
        named = frozenset(record.profile_hash for record in accepted.records if record.profile_hash)
        results.append(Taken(len(page.links), seq + len(page.links), accepted.head_hash, named))
    if pages:
        rows.insert_pages(connection, pages, now_ns, days=days)
    return results


def _boots(connection: Connection, worker_uids: Collection[str]) -> dict[str, tuple[BootFacts, ...]]:
    b = t.boots.c
    of_these = select(t.boots).where(b.worker_uid.in_(worker_uids)).order_by(b.worker_uid, b.started_ns, b.boot_id)
    found: dict[str, tuple[BootFacts, ...]] = {}
    for row in connection.execute(of_these):
        found[row.worker_uid] = (*found.get(row.worker_uid, ()), boot_of(row))
    return found


def _alone(ledger: Ledger, worker: Worker, page: Page, now_ns: int) -> Taken | Refusal:
    try:
        return ledger.take(worker, page, now_ns)
    except (PageRefused, LedgerUnavailable) as refusal:
        return refusal
    except IntegrityError as error:  # a fault of this page or of the schema; others' pages must not wait for it
        told = str(error.orig).strip().splitlines()
        return LedgerUnavailable(
            f"The database refuses what worker {worker.worker_uid} sent: {told[0] if told else ''}"
        )
