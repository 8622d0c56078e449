"""The sums of a period's records, added up by the database.

Owns the query, and how a sum beyond 64 bits is asked for. What a sum is of, `billing.facts.Line` says; `flow.folds`
keeps the same sums from round to round.
"""

from typing import Any

from sqlalchemy import Connection, and_, case, func, select

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.billing.facts import FIGURES, Line
from gpumeter_usage.record import ENDED, Account, Kind

HALF = 2**31
"""Sums are made of what is above and below this, so that neither can leave 64 bits in as many rows as a disk holds."""


def sums_of_period(
    connection: Connection, service_key: str, end_ns: int, after_ns: int | None = None, until_ns: int | None = None
) -> tuple[Line, ...]:
    """The sums of the records of a service that are booked in a period, in the order of their keys; of those only that
    ended after, and until, a time."""
    r = t.records.c
    in_time = [r.ended_at > after_ns] if after_ns is not None else []
    in_time += [r.ended_at <= until_ns] if until_ns is not None else []
    key = (r.worker_uid, r.boot_id, r.kind, r.account, r.tenant, r.clock)
    ended = and_(r.status.in_([status.value for status in ENDED]), r.account == Account.ATTRIBUTED.value)
    figures = [r[name] for name in FIGURES]  # of STATED, NULL where no row states it
    # Each is summed in two halves: SQLite refuses a sum beyond 64 bits, and with it the whole query, and no worker may
    # have the means to do that to its service.
    halves = [half for column in figures for half in (func.sum(column // HALF), func.sum(column % HALF))]
    counts = (func.count(), func.min(r.seq), func.max(r.seq), func.sum(case((ended, 1), else_=0)))
    query = (
        select(*key, *counts, *halves)
        .where(r.service == service_key, r.booked_end_ns == end_ns, *in_time)
        .group_by(*key)
        .order_by(*key)
    )
    return tuple(_line(tuple(row)) for row in connection.execute(query))


def _line(row: tuple[Any, ...]) -> Line:
    worker_uid, boot_id, kind, account, tenant, clock = row[:6]
    counts, halves = (int(number) for number in row[6:10]), row[10:]
    figures: list[Any] = [_joined(high, low) for high, low in zip(halves[::2], halves[1::2], strict=True)]
    return Line(worker_uid, boot_id, Kind(kind), account, tenant, clock, *counts, *figures)


def _joined(high: Any, low: Any) -> int | None:
    return None if high is None else int(high) * HALF + int(low)
