"""Many workers' pages in one transaction: thousands of workers that send a few records each share one commit.

Owns what may be written together. A page that is not simply the next one of its boot is not: it goes through
`Ledger.take` by itself, which compares, retries and keeps evidence. Either way a page is taken whole or not at all.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger import rows
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.rows import Taken
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.accept import PageRefused, accept
from gpumeter_operator.billing.facts import NOTHING, Worker
from gpumeter_usage.chain import GENESIS
from gpumeter_usage.page import Page
from gpumeter_usage.record import Status

Given = tuple[Worker, Page]
Refusal = PageRefused | LedgerUnavailable


def take_all(ledger: Ledger, given: Sequence[Given], now_ns: int) -> list[Taken | Refusal]:
    """Commit these pages; for each what became of it, or what `Ledger.take` would have raised for it.

    Raises LedgerUnavailable where none of them was taken.
    """
    if len(given) == 1:
        return [_alone(ledger, *given[0], now_ns)]
    try:
        with ledger.writing() as connection:
            together = [_take_next(connection, worker, page, now_ns) for worker, page in given]
    except IntegrityError:
        together = [None] * len(given)  # another collector took one of them: nothing of this was committed
    return [
        _alone(ledger, worker, page, now_ns) if done is None else done
        for done, (worker, page) in zip(together, given, strict=True)
    ]


def settle_all(ledger: Ledger, settled: Sequence[tuple[str, int]]) -> None:
    """Note of each of these workers (uid, time) that all its usage up to that time is committed; never moves back."""
    newest = dict(sorted(settled, key=lambda one: one[1]))
    with ledger.writing() as connection:
        p = t.progress.c
        known = {row.worker_uid: row for row in connection.execute(select(t.progress).where(p.worker_uid.in_(newest)))}
        for uid, settled_ns in newest.items():
            row = known.get(uid)
            if row is None or row.problem or row.settled_ns < settled_ns:
                reached_ns = max(settled_ns, row.settled_ns if row else 0)
                rows.put_progress(connection, uid, {"settled_ns": reached_ns, "problem": ""})


def _take_next(connection: Connection, worker: Worker, page: Page, now_ns: int) -> Taken | PageRefused | None:
    """None where the page is not the next one of its boot."""
    boot = rows.boot(connection, worker.worker_uid, page.boot_id)
    seq, head_hash = (boot.committed_seq, boot.head_hash) if boot else (0, GENESIS)
    if page.after != seq or not page.links or (boot and boot.seal is not Status.NONE):
        return None
    c = t.containers.c
    began = select(func.min(c.at_ns)).where(c.worker_uid == worker.worker_uid, c.event == "started")
    since_ns = int(connection.scalar(began) or 0)
    try:
        accepted = accept(page, worker, head_hash, now_ns, spent=boot.spent if boot else NOTHING, since_ns=since_ns)
    except PageRefused as refused:
        return refused
    rows.insert_records(connection, worker, accepted.records, page.links, now_ns)
    rows.advance(connection, boot, accepted)
    named = frozenset(record.profile_hash for record in accepted.records if record.profile_hash)
    return Taken(len(page.links), seq + len(page.links), accepted.head_hash, named)


def _alone(ledger: Ledger, worker: Worker, page: Page, now_ns: int) -> Taken | Refusal:
    try:
        return ledger.take(worker, page, now_ns)
    except (PageRefused, LedgerUnavailable) as refusal:
        return refusal
