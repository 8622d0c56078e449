"""What an auditor reads of the ledger beside what billing reads: raw rows of a span, and what was known when.

Owns these queries; changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Select, and_, func, not_, or_, select, union_all

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.engine import reading
from gpumeter_operator.adapters.ledger.gaps import gaps_of
from gpumeter_operator.billing.audit import RawRow
from gpumeter_operator.billing.close import Phase

_DERIVED = [column.name for column in t.records.columns if column.name not in ("hash", "body", "booked_end_ns")]
_READ_AT_ONCE = 5_000


@dataclass(frozen=True, slots=True)
class ContainerFact:
    """An event of a container, and when it became known."""

    worker_uid: str
    container_id: str
    event: str
    at_ns: int
    observed_ns: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """An adjustment of allocation: that something about a worker became known at `made_ns`, after `closed_end_ns`."""

    worker_uid: str
    closed_end_ns: int
    made_ns: int


def count_records(engine: Engine, worker_uid: str) -> int:
    """How many records of a worker there are."""
    query = select(func.count()).select_from(t.records).where(t.records.c.worker_uid == worker_uid)
    with reading(engine) as connection:
        return int(connection.scalar(query) or 0)


def heads_before(engine: Engine, worker_uid: str, since_ns: int, until_ns: int) -> dict[str, tuple[int, str]]:
    """By boot that has records booked in a span, seq and hash of the record before the first of these; "" for
    a hash that retention has removed."""
    r = t.records.c
    first = (
        select(r.boot_id, func.min(r.seq))
        .where(r.worker_uid == worker_uid, r.booked_end_ns > since_ns, r.booked_end_ns <= until_ns)
        .group_by(r.boot_id)
    )
    found = {}
    with reading(engine) as connection:
        for boot_id, seq in connection.execute(first).all():
            of = select(r.hash).where(r.worker_uid == worker_uid, r.boot_id == boot_id, r.seq == seq - 1)
            found[boot_id] = (seq - 1, connection.scalar(of) or "") if seq > 1 else (0, "0" * 64)
    return found


def kept_records(engine: Engine, worker_uid: str) -> Iterator[RawRow]:
    """All records of a worker, in the order of their keys."""
    r = t.records
    with reading(engine) as connection:
        yield from _raw_rows(connection, select(r).where(r.c.worker_uid == worker_uid).order_by(r.c.boot_id, r.c.seq))


def records_in_span(engine: Engine, worker_uid: str, since_ns: int, until_ns: int) -> Iterator[RawRow]:
    """The records of a worker from the first to the last of each boot that is booked in a span, as `kept_records`."""
    r = t.records
    inside = (
        select(r.c.boot_id, func.min(r.c.seq).label("first"), func.max(r.c.seq).label("last"))
        .where(r.c.worker_uid == worker_uid, r.c.booked_end_ns > since_ns, r.c.booked_end_ns <= until_ns)
        .group_by(r.c.boot_id)
        .subquery()
    )
    query = (
        select(r)
        .join(inside, and_(r.c.boot_id == inside.c.boot_id, r.c.seq >= inside.c.first, r.c.seq <= inside.c.last))
        .where(r.c.worker_uid == worker_uid)
        .order_by(r.c.boot_id, r.c.seq)
    )
    with reading(engine) as connection:
        yield from _raw_rows(connection, query)


def strays(engine: Engine) -> list[tuple[str, str, int]]:
    """(worker_uid, boot_id, first seq) of records whose worker or boot is not in the ledger, or that name a service
    that is not their worker's."""
    r, w, b = t.records.c, t.workers.c, t.boots.c
    key = w.namespace.concat("/").concat(w.service)
    query = (
        select(r.worker_uid, r.boot_id, func.min(r.seq))
        .select_from(
            t.records.outerjoin(t.workers, w.worker_uid == r.worker_uid).outerjoin(
                t.boots, and_(b.worker_uid == r.worker_uid, b.boot_id == r.boot_id)
            )
        )
        .where(or_(w.worker_uid.is_(None), b.boot_id.is_(None), r.service != key))
        .group_by(r.worker_uid, r.boot_id)
        .order_by(r.worker_uid, r.boot_id)
    )
    with reading(engine) as connection:
        return [(row[0], row[1], row[2]) for row in connection.execute(query)]


def stray_boots(engine: Engine) -> list[tuple[str, str]]:
    """(worker_uid, boot_id) of cursors whose worker is not in the ledger."""
    b, w = t.boots.c, t.workers.c
    query = select(b.worker_uid, b.boot_id).where(not_(b.worker_uid.in_(select(w.worker_uid))))
    with reading(engine) as connection:
        return [(row[0], row[1]) for row in connection.execute(query.order_by(b.worker_uid, b.boot_id))]


def final_services(engine: Engine) -> list[tuple[str, str]]:
    """(namespace, service) that any report, period or digest names, whether there are workers of it or not."""
    parts = [select(table.c.namespace, table.c.service) for table in (t.reports, t.periods, t.workers)]
    parts.append(select(t.digests.c.namespace, t.digests.c.service).where(t.digests.c.service != ""))
    every = union_all(*(part.distinct() for part in parts)).subquery()
    query = select(every.c.namespace, every.c.service).distinct().order_by(every.c.namespace, every.c.service)
    with reading(engine) as connection:
        return [(row[0], row[1]) for row in connection.execute(query)]


def final_ends(engine: Engine, namespace: str, service: str) -> list[tuple[int, int]]:
    """(end, when its last report was kept) of the Final periods of a service, ascending."""
    r = t.reports.c
    query = select(r.period_end_ns, func.max(r.kept_ns)).where(r.namespace == namespace, r.service == service)
    query = query.where(r.phase == Phase.FINAL.value).group_by(r.period_end_ns).order_by(r.period_end_ns)
    with reading(engine) as connection:
        return [(row[0], row[1]) for row in connection.execute(query)]


def reports_of_period(engine: Engine, namespace: str, service: str, end_ns: int) -> list[tuple[str, str, bytes, str]]:
    """(tenant, name, bytes, digest) of the Final reports of one period, by tenant."""
    r = t.reports.c
    query = select(r.tenant, r.name, r.body, r.digest).where(
        r.namespace == namespace, r.service == service, r.period_end_ns == end_ns, r.phase == Phase.FINAL.value
    )
    with reading(engine) as connection:
        return [(row[0], row[1], row[2], row[3]) for row in connection.execute(query.order_by(r.tenant))]


def container_facts(engine: Engine, namespace: str, service: str) -> list[ContainerFact]:
    """The events of all containers of a service."""
    c, w = t.containers.c, t.workers.c
    query = (
        select(c.worker_uid, c.container_id, c.event, c.at_ns, c.observed_ns)
        .join(t.workers, w.worker_uid == c.worker_uid)
        .where(w.namespace == namespace, w.service == service, c.container_id != "")
    )
    with reading(engine) as connection:
        return [ContainerFact(*row) for row in connection.execute(query.order_by(*t.containers.primary_key))]


def allocations(engine: Engine, namespace: str, service: str) -> list[Allocation]:
    """What became known of a service's containers after it mattered."""
    a = t.adjustments.c
    query = select(a.worker_uid, a.closed_end_ns, a.made_ns).where(
        a.namespace == namespace, a.service == service, a.kind == "allocation"
    )
    with reading(engine) as connection:
        return [Allocation(*row) for row in connection.execute(query.order_by(a.id))]


def bookings(engine: Engine, worker_uid: str) -> dict[str, tuple[int, int]]:
    """By boot, the ends of the periods in which its first record that is no gap, and its last, are booked."""
    b, r = t.boots.c, t.records.c
    found: dict[str, list[int]] = {}
    with reading(engine) as connection:
        gaps = gaps_of(connection, [worker_uid]).get(worker_uid, ())
        begins = {gap.boot_id: gap.last_seq + 1 for gap in gaps if gap.first_seq == 1}
        for boot_id, last_seq in connection.execute(
            select(b.boot_id, b.committed_seq).where(b.worker_uid == worker_uid)
        ).all():
            for seq in (begins.get(boot_id, 1), last_seq):
                of = select(r.booked_end_ns).where(r.worker_uid == worker_uid, r.boot_id == boot_id, r.seq == seq)
                found.setdefault(boot_id, []).append(connection.scalar(of) or 0)
    return {boot_id: (first_ns, last_ns) for boot_id, (first_ns, last_ns) in found.items()}


def _raw_rows(connection: Connection, query: Select[Any]) -> Iterator[RawRow]:
    """The rows of a query of whole records, a few at a time, as an audit looks at them."""
    for row in connection.execution_options(yield_per=_READ_AT_ONCE).execute(query).mappings():
        columns = {name: row[name] for name in _DERIVED}
        yield row["boot_id"], row["seq"], row["hash"], row["body"], row["booked_end_ns"], columns
