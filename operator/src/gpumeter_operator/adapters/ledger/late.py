"""In which period something is booked that became known after its own was Final.

Owns what is asked of the ledger for that, within the transaction that books. The choice is billing's (`next_open`).
"""

from collections.abc import Iterable

from sqlalchemy import Connection, and_, func, select

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.read import schedule, spans
from gpumeter_operator.billing.schedule import next_open


def next_open_end_ns(
    connection: Connection,
    namespace: str,
    service: str,
    final_ns: int,
    now_ns: int,
    *,
    with_ends_ns: Iterable[int] = (),
) -> int:
    """The end of that period of a service whose last Final one ended at `final_ns`. `with_ends_ns` are ends of
    periods in which something is booked together with it."""
    open_from_ns = _open_from_ns(connection, namespace, service, final_ns)
    open_from_ns += [end_ns - 1 for end_ns in with_ends_ns if end_ns > final_ns]
    return next_open(schedule(connection), final_ns, open_from_ns, now_ns).end_ns


def _open_from_ns(connection: Connection, namespace: str, service: str, final_ns: int) -> list[int]:
    """The starts of what is open: where a container ran after the last Final period, one was opened, or anything is
    booked. What `open_periods` finds, but for what begins after now."""
    v = t.lives.c
    living = select(v.worker_uid).where(v.namespace == namespace, v.service == service, v.until_ns > final_ns)
    of_workers, _ = spans(connection, list(connection.scalars(living)))
    found = [
        span.started_ns
        for of_worker in of_workers.values()
        for span in of_worker
        if span.ended_ns is None or span.ended_ns > final_ns
    ]
    ends = [
        select(func.min(t.records.c.booked_end_ns)).where(
            t.records.c.service == f"{namespace}/{service}", t.records.c.booked_end_ns > final_ns
        )
    ]
    for of, end in (
        (t.periods.c, t.periods.c.end_ns),
        (t.adjustments.c, t.adjustments.c.booked_end_ns),
        (t.corrections.c, t.corrections.c.booked_end_ns),
    ):
        of_service = and_(of.namespace == namespace, of.service == service)
        ends.append(select(func.min(end)).where(of_service, end > final_ns))
    booked = [connection.scalar(query) for query in ends]
    # The last nanosecond of a period is in it.
    return found + [int(end_ns) - 1 for end_ns in booked if end_ns is not None]
