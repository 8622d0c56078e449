"""Days and months in the ledger: what they are made from, and the Final ones.

Owns the table `rollups` and the queries for closing it. Every one of them reads a span of an index, so that its cost
does not grow with the ledger. Decides nothing; raises LedgerUnavailable.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256

from sqlalchemy import Connection, Engine, bindparam, func, insert, select

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.closed import corrections_count, last_final_ns, last_sum_ns
from gpumeter_operator.adapters.ledger.engine import reading, writing
from gpumeter_operator.billing.accounts import NAMES, Accounts
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.report import Manifest, canonical_report
from gpumeter_usage.period import Granularity, Period

Service = tuple[str, str]
Version = tuple[int, int, int, int, int]
"""What must not have changed between folding a day and keeping it."""


def last_rollup_ns(engine: Engine, service: Service, granularity: Granularity) -> int:
    """The end of the last Final day or month of a service; 0 where there is none."""
    with reading(engine) as connection:
        return last_sum_ns(connection, *service, granularity)


def final_bodies(engine: Engine, service: Service, after_ns: int, until_ns: int) -> list[tuple[int, str, bytes]]:
    """(end, tenant, bytes) of the Final reports of closing periods that ended after `after_ns` and by `until_ns`."""
    r = t.reports.c
    query = select(r.period_end_ns, r.tenant, r.body).where(
        r.namespace == service[0],
        r.service == service[1],
        r.phase == Phase.FINAL.value,
        r.period_end_ns > after_ns,
        r.period_end_ns <= until_ns,
    )
    with reading(engine) as connection:
        rows = connection.execute(query.order_by(r.period_end_ns, r.tenant))
        return [(row[0], row[1], row[2]) for row in rows]


def final_count(engine: Engine, service: Service, period: Period) -> int:
    """How many Final closing periods of a service the ledger holds in a day or month."""
    r = t.reports.c
    query = select(func.count()).where(
        r.namespace == service[0],
        r.service == service[1],
        r.tenant == PLATFORM,
        r.phase == Phase.FINAL.value,
        r.period_end_ns > period.start_ns,
        r.period_end_ns <= period.end_ns,
    )
    with reading(engine) as connection:
        return int(connection.scalar(query) or 0)


def rollup_bodies(
    engine: Engine, service: Service, granularity: Granularity, after_ns: int, until_ns: int = 2**62
) -> list[tuple[int, str, bytes]]:
    """The same of Final days or months."""
    d = t.rollups.c
    query = select(d.period_end_ns, d.tenant, d.body).where(
        d.namespace == service[0],
        d.service == service[1],
        d.granularity == granularity.value,
        d.period_end_ns > after_ns,
        d.period_end_ns <= until_ns,
    )
    with reading(engine) as connection:
        rows = connection.execute(query.order_by(d.period_end_ns, d.tenant))
        return [(row[0], row[1], row[2]) for row in rows]


def previous_digests(engine: Engine, service: Service, period: Period, tenants: Iterable[str]) -> dict[str, str]:
    """Of each of these tenants, the digest of its last Final report of the same kind before this period: of another day
    or month, or of another closing period. Who has none is left out."""
    of = t.rollups if period.granularity in (Granularity.DAY, Granularity.MONTH) else t.reports
    kind = of.c.granularity == period.granularity.value if of is t.rollups else of.c.phase == Phase.FINAL.value
    newest = (  # one index seek a tenant, however long the history
        select(of.c.digest)
        .where(of.c.namespace == service[0], of.c.service == service[1], of.c.tenant == bindparam("tenant"), kind)
        .where(of.c.period_end_ns < period.end_ns)
        .order_by(of.c.period_end_ns.desc())
        .limit(1)
    )
    with reading(engine) as connection:
        found = {tenant: connection.scalar(newest, {"tenant": tenant}) for tenant in tenants}
    return {tenant: digest for tenant, digest in found.items() if digest is not None}


def pod_sums(engine: Engine, service: Service, period: Period) -> dict[str, Accounts]:
    """The accounts of each pod of a service, summed over its Final periods in a day or month, by uid."""
    p, w = t.pod_accounts.c, t.workers.c
    query = (
        select(p.worker_uid, *(func.sum(getattr(p, name)) for name in NAMES))
        .join(t.workers, w.worker_uid == p.worker_uid)
        .where(w.namespace == service[0], w.service == service[1])
        .where(p.period_end_ns > period.start_ns, p.period_end_ns <= period.end_ns)
        .group_by(p.worker_uid)
    )
    with reading(engine) as connection:
        return {row[0]: Accounts(*(int(ns) for ns in row[1:])) for row in connection.execute(query)}


def facts_before(engine: Engine, service: Service, end_ns: int) -> Version:
    """The state of everything that could still belong into a day or month that ended at `end_ns`."""
    with reading(engine) as connection:
        return _facts_before(connection, service, end_ns)


def final_names(engine: Engine, since_ns: Mapping[Granularity, int]) -> set[tuple[str, str]]:
    """(namespace, name) of the Final reports of all services whose periods ended after a time, which days, months and
    (under HOUR) closing periods have each of their own."""
    r, d = t.reports.c, t.rollups.c
    of_periods = select(r.namespace, r.name).where(
        r.phase == Phase.FINAL.value, r.period_end_ns > since_ns[Granularity.HOUR]
    )
    found: set[tuple[str, str]] = set()
    with reading(engine) as connection:
        found |= {(row[0], row[1]) for row in connection.execute(of_periods)}
        for granularity in (Granularity.DAY, Granularity.MONTH):
            of_sums = select(d.namespace, d.name).where(
                d.granularity == granularity.value, d.period_end_ns > since_ns[granularity]
            )
            found |= {(row[0], row[1]) for row in connection.execute(of_sums)}
    return found


def final_body(engine: Engine, namespace: str, name: str) -> bytes | None:
    """The bytes of a Final report of any length, as it was published and will be again; None where there is none."""
    r, d = t.reports.c, t.rollups.c
    of_period = select(r.body).where(r.phase == Phase.FINAL.value, r.namespace == namespace, r.name == name)
    of_sum = select(d.body).where(d.namespace == namespace, d.name == name)
    with reading(engine) as connection:
        found = connection.scalar(of_period)
        return connection.scalar(of_sum) if found is None else found


def is_final(engine: Engine, service: Service, period: Period) -> bool:
    """Whether a day or month of a service is Final."""
    d = t.rollups.c
    query = select(d.tenant).where(
        d.namespace == service[0],
        d.service == service[1],
        d.granularity == period.granularity.value,
        d.period_end_ns == period.end_ns,
    )
    with reading(engine) as connection:
        return connection.scalar(query.limit(1)) is not None


def keep_rollup(
    engine: Engine, service: Service, period: Period, manifests: Sequence[Manifest], *, made_from: Version, now_ns: int
) -> bool:
    """Keep the Final reports of a day or month, all or none, once.

    False, with nothing kept, where a fact for one of its periods came in since `made_from` was read, where it is there,
    and where one before it is not, though something that belongs to that is Final: after a later one nobody would look
    for it again.
    """
    with writing(engine) as connection:
        if _facts_before(connection, service, period.end_ns) != made_from:
            return False
        last_ns = last_sum_ns(connection, *service, period.granularity)
        if last_ns >= period.end_ns or _is_final_between(connection, service, period, last_ns):
            return False
        rows = []
        for manifest in manifests:
            body = canonical_report(manifest)
            rows.append(
                {
                    "namespace": service[0],
                    "service": service[1],
                    "granularity": period.granularity.value,
                    "period_end_ns": period.end_ns,
                    "tenant": manifest["spec"]["tenant"],
                    "name": manifest["metadata"]["name"],
                    "body": body,
                    "digest": sha256(body).hexdigest(),
                    "kept_ns": now_ns,
                }
            )
        connection.execute(insert(t.rollups), rows)
        return True


def _is_final_between(connection: Connection, service: Service, period: Period, last_ns: int) -> bool:
    """Whether a part of an earlier day (a closing period) or month (a day) is Final, after the last that was kept."""
    of = t.rollups if period.granularity is Granularity.MONTH else t.reports
    part = [of.c.granularity == Granularity.DAY.value] if of is t.rollups else [of.c.phase == Phase.FINAL.value]
    query = select(of.c.tenant).where(
        of.c.namespace == service[0],
        of.c.service == service[1],
        of.c.period_end_ns > last_ns,
        of.c.period_end_ns <= period.start_ns,
        *part,
    )
    return connection.scalar(query.limit(1)) is not None


def _facts_before(connection: Connection, service: Service, end_ns: int) -> Version:
    namespace, name = service
    final_ns = last_final_ns(connection, namespace, name)
    r, p, a, w = t.records.c, t.periods.c, t.adjustments.c, t.workers.c
    uids = select(w.worker_uid).where(w.namespace == namespace, w.service == name)
    counts = (
        select(func.count()).where(
            r.service == f"{namespace}/{name}", r.booked_end_ns > final_ns, r.booked_end_ns <= end_ns
        ),
        select(func.count()).where(
            p.namespace == namespace, p.service == name, p.end_ns > final_ns, p.end_ns <= end_ns
        ),
        select(func.count()).where(a.namespace == namespace, a.service == name),
        select(func.count()).where(t.containers.c.worker_uid.in_(uids)),
    )
    first, second, third, fourth = (int(connection.scalar(count) or 0) for count in counts)
    return final_ns, first, second, third + corrections_count(connection, namespace, name), fourth
