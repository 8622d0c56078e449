"""Retention: removes the records of whole days whose periods are all Final, and keeps a fact of what went.

Owns which day may go, the fact, and the removal: the fact first, then what it names, so that a collector that is
killed between the two goes on where it was. Reports, pods' accounts, adjustments, price plans, alarms and the cursors
of chains stay for ever: they are what a bill and a redelivered page need. The database itself refuses to let go what no
fact names.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from hashlib import sha256
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, func, insert, or_, select, text

from gpumeter_operator.adapters.ledger import days, locks
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.closed import last_final_ns
from gpumeter_operator.adapters.ledger.engine import reading
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.removals import LEAST_DAYS, Removal

AT_A_TIME = 20_000  # records that one transaction deletes in SQLite: others write in between


@dataclass(frozen=True, slots=True)
class Removed:
    """What went of one day: how many chains and records."""

    day_end_ns: int
    chains: int
    records: int


def remove_old(ledger: Ledger, retention_days: int, now_ns: int) -> list[Removed]:
    """Remove every day that is over since `retention_days` and whole Final, the oldest first, up to the first that is
    not. Raises ValueError below LEAST_DAYS, and LedgerUnavailable."""
    if retention_days < LEAST_DAYS:
        raise ValueError(f"retention of {retention_days} days; records are kept for {LEAST_DAYS} days at least")
    _finish(ledger)
    removed: list[Removed] = []
    while (end_ns := _oldest(ledger)) is not None:
        if end_ns + retention_days * days.DAY_NS > now_ns:
            break
        one = _remove(ledger, end_ns, retention_days, now_ns)
        if one is None:
            break
        if one.chains:
            removed.append(one)
    return removed


def removals_of(reader: Reader, namespace: str, service: str) -> list[Removal]:
    """What the log says was removed of a service, by day. Whether that is so, `billing.removals` judges."""
    columns = [t.removals.c[each.name] for each in fields(Removal)]
    query = select(*columns).where(t.removals.c.service == f"{namespace}/{service}")
    with reading(reader.engine) as connection:
        return [Removal(*row) for row in connection.execute(query.order_by(*t.removals.primary_key))]


def strangers(reader: Reader) -> list[tuple[str, str, int, int, str]]:
    """(worker_uid, boot_id, end of day, first seq, service) of rows in the log that name a service that their worker is
    not of."""
    m, w = t.removals.c, t.workers.c
    key = w.namespace.concat("/").concat(w.service)
    query = (
        select(m.worker_uid, m.boot_id, m.day_end_ns, m.first_seq, m.service)
        .select_from(t.removals.outerjoin(t.workers, w.worker_uid == m.worker_uid))
        .where(or_(w.worker_uid.is_(None), m.service != key))
    )
    with reading(reader.engine) as connection:
        rows = connection.execute(query.order_by(*t.removals.primary_key))
        return [(row[0], row[1], row[2], row[3], row[4]) for row in rows]


def worker_uids(reader: Reader, namespace: str, service: str) -> set[str]:
    """All workers that a service ever had."""
    w = t.workers.c
    with reading(reader.engine) as connection:
        query = select(w.worker_uid).where(w.namespace == namespace, w.service == service)
        return set(connection.scalars(query))


def first_left(reader: Reader, namespace: str, service: str, day_ends_ns: Iterable[int]) -> dict[int, str]:
    """By end of day, for those of these days in which records of a service are booked that are there: one of them."""
    r, found = t.records.c, {}
    with reading(reader.engine) as connection:
        for end_ns in day_ends_ns:  # one index seek each, in one partition
            query = select(r.worker_uid, r.boot_id, r.seq).where(
                r.service == f"{namespace}/{service}", r.booked_end_ns > end_ns - days.DAY_NS, r.booked_end_ns <= end_ns
            )
            if (row := connection.execute(query.limit(1)).first()) is not None:
                found[end_ns] = f"worker {row[0]} boot {row[1]} seq {row[2]}"
    return found


def _oldest(ledger: Ledger) -> int | None:
    """The end of the oldest day that holds records."""
    with reading(ledger.engine) as connection:
        return _oldest_in(connection)


def _oldest_in(connection: Connection) -> int | None:
    services = connection.execute(select(t.workers.c.namespace, t.workers.c.service).distinct()).all()
    firsts = [  # one index seek a service
        connection.scalar(select(func.min(t.records.c.booked_end_ns)).where(t.records.c.service == f"{name}/{of}"))
        for name, of in services
    ]
    return min((days.day_end_ns(first) for first in firsts if first is not None), default=None)


def _remove(ledger: Ledger, end_ns: int, retention_days: int, now_ns: int) -> Removed | None:
    with ledger.writing(locks.RETENTION) as connection:
        if not _is_final(connection, end_ns):
            return None
        if _oldest_in(connection) != end_ns:  # another collector was faster while this one waited
            ledger.days.forget([end_ns])
            return Removed(end_ns, 0, 0)
        found = []
        for chain in _chains(connection, end_ns):
            found.append(chain | {"day_end_ns": end_ns, "retention_days": retention_days, "removed_ns": now_ns})
        if found:
            connection.execute(insert(t.removals), found)
        if connection.dialect.name == "postgresql" and end_ns > days.EARLY_END_NS:
            days.drop(connection, end_ns)
    ledger.days.forget([end_ns])
    _finish(ledger)
    return Removed(end_ns, len(found), sum(chain["records"] for chain in found))


def _is_final(connection: Connection, end_ns: int) -> bool:
    """Whether no service has a record in this day that is booked in a period that is not Final."""
    r, w = t.records.c, t.workers.c
    for namespace, service in connection.execute(select(w.namespace, w.service).distinct()).all():
        final_ns = last_final_ns(connection, namespace, service)
        still_open = select(func.min(r.booked_end_ns)).where(
            r.service == f"{namespace}/{service}", r.booked_end_ns > final_ns, r.booked_end_ns <= end_ns
        )
        if connection.scalar(still_open) is not None:
            return False
    return True


def _chains(connection: Connection, end_ns: int) -> Iterator[dict[str, Any]]:
    """For each chain with records in this day, the fact of their removal."""
    r = t.records.c
    query = (
        select(r.worker_uid, r.boot_id, r.service, r.seq, r.hash, r.booked_end_ns)
        .where(r.booked_end_ns > end_ns - days.DAY_NS, r.booked_end_ns <= end_ns)
        .order_by(r.worker_uid, r.boot_id, r.seq)
    )
    rows = connection.execute(query, execution_options={"yield_per": 10_000})
    for (worker_uid, boot_id, service), group in groupby(rows, key=lambda row: (row[0], row[1], row[2])):
        yield {"worker_uid": worker_uid, "boot_id": boot_id, "service": service} | _sum(group)


def _sum(rows: Iterable[Any]) -> dict[str, Any]:
    digest, count, seqs, ends_ns, last_hash = sha256(), 0, [0, 0], [0, 0], ""
    for row in rows:
        digest.update(row.hash.encode())
        seqs = [seqs[0] or row.seq, row.seq]
        ends_ns = [min(ends_ns[0] or row.booked_end_ns, row.booked_end_ns), max(ends_ns[1], row.booked_end_ns)]
        count, last_hash = count + 1, row.hash
    return {
        "first_seq": seqs[0],
        "last_seq": seqs[1],
        "last_hash": last_hash,
        "records": count,
        "digest": digest.hexdigest(),
        "first_end_ns": ends_ns[0],
        "last_end_ns": ends_ns[1],
    }


def _finish(ledger: Ledger) -> None:
    """In SQLite: delete what facts name and is there still, a little at a time."""
    if ledger.engine.dialect.name != "sqlite":
        return
    r, m = t.records.c, t.removals.c
    named = (
        select(text("records.rowid"))
        .select_from(t.records.join(t.removals, (r.worker_uid == m.worker_uid) & (r.boot_id == m.boot_id)))
        .where(r.seq.between(m.first_seq, m.last_seq), r.booked_end_ns.between(m.first_end_ns, m.last_end_ns))
        .limit(AT_A_TIME)
    )
    while True:
        with ledger.writing(locks.RETENTION) as connection:
            rowids = connection.scalars(named).all()
            if not rowids:
                return
            connection.exec_driver_sql("DELETE FROM records WHERE rowid = ?", [(rowid,) for rowid in rowids])
