"""The records that came since the last look, as rows: what an open period's sums are brought up to date with.

Owns two queries, each over a span of an index. Changes nothing; raises LedgerUnavailable.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, Row, func, select

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.engine import reading
from gpumeter_operator.billing.facts import FIGURES

Chain = tuple[str, str]
"""(worker_uid, boot_id)."""

ROWS_AT_ONCE = 5_000  # bounds memory where a collector starts anew in the middle of a busy hour


def first_open_seqs(engine: Engine, service_key: str, final_ns: int) -> dict[Chain, int]:
    """By chain, the first record of a service that is booked after `final_ns`."""
    r = t.records.c
    query = select(r.worker_uid, r.boot_id, func.min(r.seq)).where(r.service == service_key, r.booked_end_ns > final_ns)
    with reading(engine) as connection:
        rows = connection.execute(query.group_by(r.worker_uid, r.boot_id))
        return {(row[0], row[1]): row[2] for row in rows}


def rows_between(
    engine: Engine, spans: Mapping[Chain, tuple[int, int]], service_key: str
) -> Iterator[Sequence[Row[Any]]]:
    """The records of chains after a seq and up to another, in portions."""
    r = t.records.c
    columns = (r.booked_end_ns, r.worker_uid, r.boot_id, r.kind, r.account, r.tenant, r.clock, r.seq, r.status)
    figures = [r[name] for name in FIGURES]
    with reading(engine) as connection:
        for (worker_uid, boot_id), (after, until) in spans.items():
            query = select(*columns, *figures).where(
                r.worker_uid == worker_uid,
                r.boot_id == boot_id,
                r.seq > after,
                r.seq <= until,
                r.service == service_key,
            )
            result = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(query)
            yield from result.partitions()
