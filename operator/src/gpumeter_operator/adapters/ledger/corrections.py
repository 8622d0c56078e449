"""Corrections in the ledger, and what a correction is decided from.

Owns the table `corrections`. What may be corrected, and how it is priced, is billing's.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields

from sqlalchemy import Column, ColumnElement, Connection, and_, select

from gpumeter_operator.adapters.ledger import dialect, locks
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.closed import corrections_count, last_final_ns
from gpumeter_operator.adapters.ledger.engine import reading
from gpumeter_operator.adapters.ledger.late import next_open_end_ns
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import Correction

Version = tuple[int, int]
"""The end of the last Final period of a service, and how many corrections there are of it: what must not have changed
between deciding one and keeping it."""


@dataclass(frozen=True, slots=True)
class FinalReport:
    """A Final report of a closing period, by whose name a correction says what it corrects."""

    namespace: str
    service: str
    tenant: str
    end_ns: int
    body: bytes
    digest: str


def version(reader: Reader, namespace: str, service: str) -> Version:
    """The state that a correction is decided from; read before anything else of it."""
    with reading(reader.engine) as connection:
        return _version(connection, namespace, service)


def final_report(reader: Reader, namespace: str, name: str) -> FinalReport | None:
    """The Final report of this name; None where there is none of a closing period."""
    r = t.reports.c
    columns = (r.namespace, r.service, r.tenant, r.period_end_ns, r.body, r.digest)
    query = select(*columns).where(r.namespace == namespace, r.name == name, r.phase == Phase.FINAL.value)
    with reading(reader.engine) as connection:
        row = connection.execute(query).one_or_none()
    return None if row is None else FinalReport(row[0], row[1], row[2], row[3], bytes(row[4]), row[5])


def gpu_classes(reader: Reader, namespace: str, service: str, end_ns: int) -> list[str]:
    """The classes of GPU that the pods of a service had in a Final period, by name."""
    return _of_pods(reader, t.workers.c.gpu_class, namespace, service, end_ns)


def models(reader: Reader, namespace: str, service: str, end_ns: int) -> list[str]:
    """The models that the pods of a service had in a Final period, by name."""
    return _of_pods(reader, t.workers.c.model, namespace, service, end_ns)


def next_open(reader: Reader, namespace: str, service: str, now_ns: int) -> int:
    """The end of the period in which a correction is booked that is made now."""
    with reading(reader.engine) as connection:
        final_ns = last_final_ns(connection, namespace, service)
        return next_open_end_ns(connection, namespace, service, final_ns, now_ns)


def of_ids(reader: Reader, ids: Collection[str]) -> tuple[Correction, ...]:
    """The corrections under these ids, of whatever service."""
    with reading(reader.engine) as connection:
        return _corrections(connection, t.corrections.c.id.in_(ids))


def of_service(
    reader: Reader, namespace: str, service: str, booked_end_ns: int | None = None
) -> tuple[Correction, ...]:
    """The corrections of a service that are booked in a period, or in any, by their ids."""
    c = t.corrections.c
    which = and_(c.namespace == namespace, c.service == service)
    if booked_end_ns is not None:
        which = and_(which, c.booked_end_ns == booked_end_ns)
    with reading(reader.engine) as connection:
        return _corrections(connection, which)


def keep(ledger: Ledger, correction: Correction, *, made_from: Version) -> bool:
    """Keep a correction. False, with nothing kept, where a period was closed or another correction booked meanwhile."""
    of = (correction.namespace, correction.service)
    with ledger.writing(locks.of_service("/".join(of), shared=False)) as connection:
        if _version(connection, *of) != made_from:
            return False
        # Those of this service were counted; the same id may have come to another one.
        return dialect.keep_first(connection, t.corrections, asdict(correction))


def _version(connection: Connection, namespace: str, service: str) -> Version:
    return last_final_ns(connection, namespace, service), corrections_count(connection, namespace, service)


def _of_pods(reader: Reader, column: Column[str], namespace: str, service: str, end_ns: int) -> list[str]:
    p, w = t.pod_accounts.c, t.workers.c
    query = (
        select(column)
        .distinct()
        .join(t.pod_accounts, p.worker_uid == w.worker_uid)
        .where(w.namespace == namespace, w.service == service, p.period_end_ns == end_ns)
    )
    with reading(reader.engine) as connection:
        return list(connection.scalars(query.order_by(column)))


def _corrections(connection: Connection, which: ColumnElement[bool]) -> tuple[Correction, ...]:
    columns = [t.corrections.c[field.name] for field in fields(Correction)]
    rows = connection.execute(select(*columns).where(which).order_by(t.corrections.c.id))
    return tuple(Correction(*row) for row in rows)
