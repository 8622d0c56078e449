"""Sums of usage as people ask for them: by tenant, service, model or session, over any span of whole periods.

Owns the queries; the database adds up, and rows come out in the order of their keys, one by one. Changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Engine, and_, case, func, literal_column, select

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.engine import reading
from gpumeter_operator.adapters.ledger.sums import HALF
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import PLATFORM, USED
from gpumeter_usage.period import DAY_NS
from gpumeter_usage.record import ENDED, Account, Kind

_READ_AT_ONCE = 5_000
_LAST_NS = 2**62
_NAMED = {
    "tenant": t.records.c.tenant,
    "service": t.records.c.service,
    "model": t.workers.c.model,
    "session": t.records.c.session_id,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for: periods that end after `since_ns` and at `until_ns` at the latest; None for any."""

    since_ns: int
    until_ns: int
    namespace: str | None = None
    service: str | None = None
    tenant: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Sum:
    """What one key used in one period on one class of GPU, of what ended until `until_ns` and after the edge before."""

    key: tuple[str, ...]
    service: str
    end_ns: int
    gpu_class: str
    until_ns: int
    records: int
    sessions: int
    gpu_ns: int
    prefill_ns: int
    decode_ns: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def sums(engine: Engine, by: Sequence[str], asked: Asked, edges_ns: Sequence[int] = ()) -> Iterator[Sum]:
    """The sums of sessions' slices, in the order of the keys; `by` are of tenant, service, model, session.

    What ended on different sides of an edge is summed apart; `edges_ns` ascend.
    """
    r, w = t.records.c, t.workers.c
    key = [_NAMED[name] for name in by]
    group: list[ColumnElement[Any]] = [*key, r.service, r.booked_end_ns, w.gpu_class]
    if edges_ns:
        # Written out: of two parameters PostgreSQL does not know that they are the same.
        edges: list[ColumnElement[Any]] = [literal_column(str(int(edge_ns))) for edge_ns in edges_ns]
        group.append(case(*((r.ended_at <= edge, edge) for edge in edges), else_=literal_column(str(_LAST_NS))))
    ended = case((r.status.in_([status.value for status in ENDED]), 1), else_=0)
    # In two halves, for SQLite refuses a sum beyond 64 bits.
    halves = [half for name in USED for half in (func.sum(r[name] // HALF), func.sum(r[name] % HALF))]
    query = (
        select(*group, func.count(), func.sum(ended), *halves)
        .select_from(t.records.join(t.workers, w.worker_uid == r.worker_uid))
        .where(*_where(asked))
        .group_by(*group)
        .order_by(*group)
    )
    width = len(by)
    with reading(engine) as connection:
        for row in connection.execution_options(yield_per=_READ_AT_ONCE).execute(query):
            records, sessions, *numbers = (int(number) for number in row[len(group) :])
            figures = [high * HALF + low for high, low in zip(numbers[::2], numbers[1::2], strict=True)]
            service, end_ns, gpu_class, *until_ns = row[width : len(group)]
            yield Sum(
                tuple(row[:width]),
                service,
                end_ns,
                gpu_class,
                int(until_ns[0]) if until_ns else _LAST_NS,
                records,
                sessions,
                *figures,
            )


def slices(engine: Engine, session_id: str) -> Iterator[tuple[bytes, int, str, str]]:
    """(bytes, end of the period in which it is booked, pod, class of GPU) of every slice of a session, oldest first.

    There is no index by session: whoever asks waits for one pass over the records.
    """
    r, w = t.records.c, t.workers.c
    query = (
        select(r.body, r.booked_end_ns, w.pod, w.gpu_class)
        .select_from(t.records.join(t.workers, w.worker_uid == r.worker_uid))
        .where(r.session_id == session_id, r.kind == Kind.SESSION.value)
        .order_by(r.ended_at, r.worker_uid, r.boot_id, r.seq)
    )
    with reading(engine) as connection:
        for row in connection.execution_options(yield_per=_READ_AT_ONCE).execute(query):
            yield bytes(row[0]), row[1], row[2], row[3]


def names(engine: Engine, of: str) -> list[str]:
    """Every tenant that has a report, or every service or model that had a worker, for whoever misspells one."""
    column: ColumnElement[Any]
    if of == "tenant":
        column = t.reports.c.tenant
    else:
        column = {"service": t.workers.c.service, "model": t.workers.c.model, "namespace": t.workers.c.namespace}[of]
    with reading(engine) as connection:
        return [each for each in connection.scalars(select(column).distinct().order_by(column)) if each != PLATFORM]


def has_tenant(engine: Engine, tenant: str) -> bool:
    """Whether there are any records of a tenant; it may have none that is in a report yet."""
    with reading(engine) as connection:
        return connection.scalar(select(t.records.c.seq).where(t.records.c.tenant == tenant).limit(1)) is not None


def platform_reports(engine: Engine, asked: Asked) -> Iterator[tuple[str, int, bytes]]:
    """(service, end, bytes) of the platform's Final reports in the span, which say how complete a period is."""
    r = t.reports.c
    query = select(r.namespace, r.service, r.period_end_ns, r.body).where(
        r.tenant == PLATFORM,
        r.phase == Phase.FINAL.value,
        *_of_span(asked, r.period_end_ns, r.namespace, r.service),
    )
    with reading(engine) as connection:
        for row in connection.execution_options(yield_per=_READ_AT_ONCE).execute(query):
            yield f"{row[0]}/{row[1]}", row[2], bytes(row[3])


def tenant_reports(engine: Engine, asked: Asked) -> Iterator[tuple[str, str, int, bytes]]:
    """(service, tenant, end, bytes) of the Final reports of tenants in the span."""
    r = t.reports.c
    query = select(r.namespace, r.service, r.tenant, r.period_end_ns, r.body).where(
        r.tenant != PLATFORM,
        r.phase == Phase.FINAL.value,
        *_of_span(asked, r.period_end_ns, r.namespace, r.service),
        *([r.tenant == asked.tenant] if asked.tenant is not None else []),
    )
    with reading(engine) as connection:
        for row in connection.execution_options(yield_per=_READ_AT_ONCE).execute(query):
            yield f"{row[0]}/{row[1]}", row[2], row[3], bytes(row[4])


def opened(engine: Engine, asked: Asked) -> list[tuple[str, int]]:
    """(service, end) of the periods of the span that were opened."""
    p = t.periods.c
    query = select(p.namespace, p.service, p.end_ns).where(*_of_span(asked, p.end_ns, p.namespace, p.service))
    with reading(engine) as connection:
        return [(f"{row[0]}/{row[1]}", row[2]) for row in connection.execute(query.order_by(*t.periods.primary_key))]


def models(engine: Engine) -> dict[str, set[str]]:
    """By service ("namespace/name"), every model that its workers ever served."""
    w = t.workers.c
    found: dict[str, set[str]] = {}
    with reading(engine) as connection:
        for namespace, service, model in connection.execute(select(w.namespace, w.service, w.model).distinct()):
            found.setdefault(f"{namespace}/{service}", set()).add(model)
    return found


def removed_days(engine: Engine, asked: Asked | None = None) -> set[tuple[str, int]]:
    """(service, end of the UTC day) of every day of which retention says that it removed records; with `asked`, of days
    with periods in the span only."""
    m = t.removals.c
    query = select(m.service, m.day_end_ns).distinct()
    if asked is not None:
        query = query.where(m.day_end_ns > asked.since_ns, m.day_end_ns - DAY_NS < asked.until_ns)
    with reading(engine) as connection:
        return {(row[0], row[1]) for row in connection.execute(query)}


def _of_span(
    asked: Asked, end_ns: ColumnElement[int], namespace: ColumnElement[str], service: ColumnElement[str]
) -> list[ColumnElement[bool]]:
    found = [end_ns > asked.since_ns, end_ns <= asked.until_ns]
    found += [namespace == asked.namespace] if asked.namespace is not None else []
    return found + ([service == asked.service] if asked.service is not None else [])


def _where(asked: Asked) -> list[Any]:
    r, w = t.records.c, t.workers.c
    found = [
        and_(r.kind == Kind.SESSION.value, r.account == Account.ATTRIBUTED.value),
        r.booked_end_ns > asked.since_ns,
        r.booked_end_ns <= asked.until_ns,
    ]
    for column, value in (
        (w.namespace, asked.namespace),
        (w.service, asked.service),
        (w.model, asked.model),
        (r.tenant, asked.tenant),
    ):
        found += [column == value] if value is not None else []
    return found
