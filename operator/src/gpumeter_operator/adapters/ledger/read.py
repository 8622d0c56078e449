"""Reading the ledger: what billing folds, what the collector goes on from, what an auditor looks at.

Owns the queries. Changes nothing; opened read-only it works beside a running collector.
"""

from collections.abc import Collection, Iterator
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    case,
    exists,
    func,
    not_,
    or_,
    select,
    true,
)

from gpumeter_operator.adapters.ledger import audit, prices
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.closed import FactsVersion, facts_version, last_final_ns
from gpumeter_operator.adapters.ledger.engine import open_engine, reading
from gpumeter_operator.adapters.ledger.gaps import gaps_of
from gpumeter_operator.adapters.ledger.sums import sums_of_period
from gpumeter_operator.billing.accounts import NAMES, Accounts
from gpumeter_operator.billing.audit import RawRow
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import PLATFORM, Adjustment, BootFacts, Line, Pod, Span, Worker
from gpumeter_operator.billing.report import digest_of
from gpumeter_operator.billing.schedule import Schedule
from gpumeter_operator.billing.tariff import PeriodPlan
from gpumeter_usage.balance import CUT, Open
from gpumeter_usage.period import Granularity
from gpumeter_usage.record import Status


class Reader:
    """The ledger, for reading. Raises LedgerUnavailable when it cannot be read.

    With `one_state` whatever it reads is as its first query found it, until it is closed: what is compared with each
    other must be of one moment, where a collector writes beside it.
    """

    def __init__(self, url: str, *, read_only: bool = True, one_state: bool = False) -> None:
        self.engine = open_engine(url, read_only=read_only, one_state=one_state)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def schedule(self) -> Schedule:
        """The lengths of periods, now and formerly."""
        with reading(self.engine) as connection:
            return schedule(connection)

    def services(self) -> list[tuple[str, str]]:
        """(namespace, name) of every service that ever had a worker."""
        with reading(self.engine) as connection:
            columns = (t.workers.c.namespace, t.workers.c.service)
            return [(row[0], row[1]) for row in connection.execute(select(*columns).distinct().order_by(*columns))]

    def last_final_ns(self, namespace: str, service: str) -> int:
        """The end of the last Final period of a service; 0 where there is none."""
        with reading(self.engine) as connection:
            return last_final_ns(connection, namespace, service)

    def pods(
        self, namespace: str, service: str, since_ns: int, *, booked: Collection[str] | None = None
    ) -> tuple[Pod, ...]:
        """The pods of a service that ran after `since_ns` or may still run, or have something booked after it.

        Whoever knows which workers have records booked after it says so with `booked`; then no record is looked at, and
        no pod that ended before. Without it nothing but facts is trusted.
        """
        with reading(self.engine) as connection:
            w, v, a = t.workers.c, t.lives.c, t.adjustments.c
            of_service = and_(w.namespace == namespace, w.service == service)
            adjusted = select(a.worker_uid).where(
                a.namespace == namespace, a.service == service, a.booked_end_ns > since_ns
            )
            if booked is None:
                which = or_(_ran_after(since_ns), w.worker_uid.in_(adjusted), _booked_after(since_ns))
                return _load_pods(connection, and_(of_service, which))
            ran = select(v.worker_uid).where(v.namespace == namespace, v.service == service, v.until_ns > since_ns)
            found = {*connection.scalars(ran), *connection.scalars(adjusted), *booked}
            return _load_pods(connection, and_(of_service, w.worker_uid.in_(found)))

    def boots(self, worker_uid: str) -> tuple[BootFacts, ...]:
        """The chains of a worker, oldest first."""
        with reading(self.engine) as connection:
            return tuple(_boots(connection, [worker_uid]).get(worker_uid, ()))

    def not_gone(self) -> tuple[Pod, ...]:
        """The pods that were not seen to go."""
        with reading(self.engine) as connection:
            return _load_pods(connection, not_(_has_event("gone")))

    def pod(self, worker_uid: str) -> Pod | None:
        """One pod, also one that is gone; None where it was never seen."""
        with reading(self.engine) as connection:
            return next(iter(_load_pods(connection, t.workers.c.worker_uid == worker_uid)), None)

    def first_started_ns(self, worker_uid: str) -> int:
        """When the first container of a pod started, as Kubernetes says; 0 where that is not known."""
        c = t.containers.c
        query = select(func.min(c.at_ns)).where(c.worker_uid == worker_uid, c.event == "started")
        with reading(self.engine) as connection:
            return int(connection.scalar(query) or 0)

    def last_plan_name(self, namespace: str, service: str) -> str | None:
        """The price plan of the service's latest period."""
        p = t.periods.c
        query = select(p.plan_name).where(p.namespace == namespace, p.service == service)
        with reading(self.engine) as connection:
            return connection.scalar(query.order_by(p.end_ns.desc()).limit(1))

    def booked_ends(self, namespace: str, service: str, after_ns: int) -> list[int]:
        """The ends of periods after `after_ns` in which records, adjustments or corrections are booked, ascending."""
        found: set[int] = set()
        with reading(self.engine) as connection:
            at_ns: int | None = after_ns
            while at_ns is not None:  # one index seek a period, where DISTINCT would read every record
                at_ns = connection.scalar(
                    select(func.min(t.records.c.booked_end_ns)).where(
                        t.records.c.service == f"{namespace}/{service}", t.records.c.booked_end_ns > at_ns
                    )
                )
                found |= {at_ns} if at_ns is not None else set()
            for of in (t.adjustments.c, t.corrections.c):
                of_service = and_(of.namespace == namespace, of.service == service)
                found |= set(
                    connection.scalars(select(of.booked_end_ns).where(of_service, of.booked_end_ns > after_ns))
                )
        return sorted(found)

    def opened_ends(self, namespace: str, service: str, after_ns: int) -> list[int]:
        """The ends of the periods after `after_ns` that were opened, ascending."""
        p = t.periods.c
        query = select(p.end_ns).where(p.namespace == namespace, p.service == service, p.end_ns > after_ns)
        with reading(self.engine) as connection:
            return list(connection.scalars(query.order_by(p.end_ns)))

    def lines(
        self, namespace: str, service: str, end_ns: int, *, after_ns: int | None = None, until_ns: int | None = None
    ) -> tuple[Line, ...]:
        """The sums of the records that are booked in a period; of those only that ended after, and until, a time."""
        with reading(self.engine) as connection:
            return sums_of_period(connection, f"{namespace}/{service}", end_ns, after_ns, until_ns)

    def digests(self, namespace: str, service: str, end_ns: int) -> dict[str, str]:
        """By owner, the digest of the records that are booked in a period."""
        r = t.records.c
        owner = case((r.tenant == "", PLATFORM), else_=r.tenant).label("owner")
        query = (
            select(owner, r.hash)
            .where(r.service == f"{namespace}/{service}", r.booked_end_ns == end_ns)
            .order_by("owner", r.worker_uid, r.boot_id, r.seq)
        )
        found: dict[str, str] = {}
        with reading(self.engine) as connection:
            by_owner: dict[str, list[str]] = {}
            for name, each in connection.execution_options(yield_per=10_000).execute(query):
                by_owner.setdefault(name, []).append(each)
            for name, hashes in by_owner.items():
                found[name] = digest_of(hashes)
        return found

    def adjustments(self, namespace: str, service: str, booked_end_ns: int | None = None) -> list[Adjustment]:
        """What is booked in a period (or in any) instead of in an earlier, closed one."""
        a = t.adjustments.c
        columns = (a.worker_uid, a.closed_end_ns, a.booked_end_ns, a.allocated_ns, a.reason)
        query = select(*columns, a.boot_id, a.first_seq, a.last_seq).where(
            a.namespace == namespace, a.service == service
        )
        if booked_end_ns is not None:
            query = query.where(a.booked_end_ns == booked_end_ns)
        with reading(self.engine) as connection:
            return [Adjustment(*row) for row in connection.execute(query.order_by(a.id))]

    def forks(self, worker_uids: Collection[str], start_ns: int, end_ns: int) -> dict[str, str]:
        """By worker, a sentence for two different records under one key that ended in this time."""
        a = t.alarms.c
        query = select(a.worker_uid, a.message).where(
            a.reason == "ChainForked",
            a.worker_uid.in_(worker_uids),
            a.ended_at > start_ns,
            a.ended_at <= end_ns,
        )
        with reading(self.engine) as connection:
            return {row[0]: row[1] for row in connection.execute(query.order_by(a.id.desc()))}

    def plan_in_force(self, name: str, at_ns: int, until_ns: int | None = None) -> str | None:
        """The hash of the version of a price plan that was in force at a time, as far as anyone saw; see prices."""
        with reading(self.engine) as connection:
            found = prices.in_force(connection, name, at_ns, until_ns)
            return None if found is None else found[0]

    def newest_plans(self) -> dict[str, str]:
        """By name, the hash of the version of each price plan that was seen last; "" where it was gone then."""
        return prices.newest_hashes(self.engine)

    def period_plan(self, namespace: str, service: str, end_ns: int) -> PeriodPlan | None:
        """The price plan of a period; None where it was not opened."""
        with reading(self.engine) as connection:
            return prices.period_plan(connection, namespace, service, end_ns)

    def final_reports(self, namespace: str, service: str) -> list[tuple[int, str, bytes]]:
        """(end of the period, tenant, bytes) of all Final reports of a service, by period and tenant."""
        r = t.reports.c
        query = select(r.period_end_ns, r.tenant, r.body).where(
            r.phase == Phase.FINAL.value, r.namespace == namespace, r.service == service
        )
        with reading(self.engine) as connection:
            rows = connection.execute(query.order_by(r.period_end_ns, r.tenant))
            return [(row[0], row[1], row[2]) for row in rows]

    def pod_accounts(self, worker_uid: str) -> list[tuple[int, Accounts]]:
        """(end of the period, accounts) of a pod, as its Final periods froze them."""
        p = t.pod_accounts
        with reading(self.engine) as connection:
            rows = connection.execute(select(p).where(p.c.worker_uid == worker_uid).order_by(p.c.period_end_ns))
            return [(row.period_end_ns, Accounts(*(getattr(row, name) for name in NAMES))) for row in rows]

    def facts_version(self, namespace: str, service: str, end_ns: int) -> FactsVersion:
        """How many facts a fold of this period is made from."""
        with reading(self.engine) as connection:
            return facts_version(connection, namespace, service, end_ns)

    def bodies(self, worker_uid: str) -> Iterator[tuple[str, int, str, bytes, int]]:
        """(boot_id, seq, hash, body, booked_end_ns) of all records of a worker, in the order of their keys."""
        return (row[:5] for row in self.kept_records(worker_uid))

    def kept_records(self, worker_uid: str) -> Iterator[RawRow]:
        """The same, and what the columns beside the body say: those that were read from it, by name."""
        return audit.kept_records(self.engine, worker_uid)

    def kept_reports(self, namespace: str, service: str) -> list[tuple[int, str, str, bytes, str]]:
        """(end of the period, tenant, phase, bytes, digest) of every version of a service's reports that is kept."""
        r = t.reports.c
        query = select(r.period_end_ns, r.tenant, r.phase, r.body, r.digest)
        query = query.where(r.namespace == namespace, r.service == service)
        with reading(self.engine) as connection:
            rows = connection.execute(query.order_by(r.period_end_ns, r.tenant, r.phase))
            return [(row[0], row[1], row[2], row[3], row[4]) for row in rows]

    def kept_plans(self) -> list[tuple[str, str, bytes]]:
        """(name, hash, spec) of every version of every price plan that was seen."""
        p = t.price_plans.c
        with reading(self.engine) as connection:
            rows = connection.execute(select(p.name, p.hash, p.spec).order_by(p.name, p.version))
            return [(row[0], row[1], row[2]) for row in rows]

    def profile(self, digest: str) -> bytes | None:
        """The parameters of a profile, in the bytes whose SHA-256 is `digest`; None where they are not kept."""
        query = select(t.profiles.c.body).where(t.profiles.c.hash == digest)
        with reading(self.engine) as connection:
            return connection.scalar(query)

    def alarms(self) -> list[tuple[str, str, str]]:
        """(reason, worker_uid, message) of every alarm, oldest first."""
        a = t.alarms.c
        with reading(self.engine) as connection:
            rows = connection.execute(select(a.reason, a.worker_uid, a.message).order_by(a.id))
            return [(row[0], row[1], row[2]) for row in rows]


def schedule(connection: Connection) -> Schedule:
    """The schedule, inside a transaction."""
    g = t.granularities.c
    rows = connection.execute(select(g.effective_from_ns, g.granularity).order_by(g.effective_from_ns))
    return Schedule(tuple((row[0], Granularity(row[1])) for row in rows))


def spans(connection: Connection, worker_uids: Collection[str]) -> tuple[dict[str, list[Span]], set[str]]:
    """The container spans of these workers, each in order of start, and the uids of those whose pods are gone."""
    c = t.containers.c
    rows = connection.execute(
        select(c.worker_uid, c.container_id, c.event, c.at_ns).where(c.worker_uid.in_(worker_uids))
    ).all()
    events: dict[tuple[str, str], dict[str, int]] = {}
    gone: set[str] = set()
    for worker_uid, container_id, event, at_ns in rows:
        if event == "gone":
            gone.add(worker_uid)
        else:
            events.setdefault((worker_uid, container_id), {})[event] = at_ns
    found: dict[str, list[Span]] = {}
    for (worker_uid, container_id), known in events.items():
        if "started" in known:
            found.setdefault(worker_uid, []).append(span_of(container_id, known))
    for each in found.values():
        each.sort(key=lambda span: (span.started_ns, span.container_id))
    return found, gone


def span_of(container_id: str, events: dict[str, int]) -> Span:
    """The span that a container's events describe. What Kubernetes said of its end outweighs what was concluded."""
    ended_ns = events.get("ended", events.get("vanished"))
    return Span(container_id, events["started"], ended_ns, "ended" in events)


def _load_pods(connection: Connection, which: ColumnElement[bool]) -> tuple[Pod, ...]:
    rows = connection.execute(select(t.workers).where(which).order_by(t.workers.c.worker_uid)).all()
    uids = [row.worker_uid for row in rows]
    by_worker, gone = spans(connection, uids)
    boots = _boots(connection, uids)
    gaps = gaps_of(connection, uids)
    progress = {
        row.worker_uid: row for row in connection.execute(select(t.progress).where(t.progress.c.worker_uid.in_(uids)))
    }
    return tuple(
        Pod(
            worker=_worker(row),
            spans=tuple(by_worker.get(row.worker_uid, ())),
            boots=tuple(boots.get(row.worker_uid, ())),
            settled_ns=progress[row.worker_uid].settled_ns if row.worker_uid in progress else 0,
            gone=row.worker_uid in gone,
            problem=progress[row.worker_uid].problem if row.worker_uid in progress else "",
            gaps=gaps.get(row.worker_uid, ()),
        )
        for row in rows
    )


def _boots(connection: Connection, worker_uids: Collection[str]) -> dict[str, list[BootFacts]]:
    b = t.boots.c
    found: dict[str, list[BootFacts]] = {}
    rows = connection.execute(
        select(t.boots).where(b.worker_uid.in_(worker_uids)).order_by(b.worker_uid, b.started_ns, b.boot_id)
    )
    for row in rows:
        found.setdefault(row.worker_uid, []).append(boot_of(row))
    return found


def boot_of(row: Row[Any]) -> BootFacts:
    """A row of `boots`. A collector of an earlier schema moves the cursor and does not say what is open there."""
    return BootFacts(
        boot_id=row.boot_id,
        started_ns=row.started_ns,
        committed_seq=row.committed_seq,
        head_hash=row.head_hash,
        seal=Status(row.seal),
        sealed_ns=row.sealed_ns,
        accounts_ns=row.accounts_ns,
        slices_ns=row.slices_ns,
        open=Open(row.open_ns, row.open_minute_ns, row.open_cut) if row.open_seq == row.committed_seq else CUT,
        tokens=row.tokens,
    )


def _has_event(event: str) -> Any:
    c = t.containers.c
    of_container = c.container_id == "" if event == "gone" else true()  # the whole key, so that it is one look-up
    return exists().where(c.worker_uid == t.workers.c.worker_uid, of_container, c.event == event)


def _ran_after(since_ns: int) -> ColumnElement[bool]:
    c = t.containers.c
    ended_later = exists().where(
        c.worker_uid == t.workers.c.worker_uid, c.event.in_(("ended", "vanished")), c.at_ns > since_ns
    )
    return or_(not_(_has_event("gone")), ended_later)


def _booked_after(since_ns: int) -> ColumnElement[bool]:
    r, w = t.records.c, t.workers.c
    key = w.namespace.concat("/").concat(w.service)
    return exists().where(r.worker_uid == w.worker_uid, r.service == key, r.booked_end_ns > since_ns)


def _worker(row: Row[Any]) -> Worker:
    return Worker(
        row.worker_uid,
        row.namespace,
        row.service,
        row.service_uid,
        row.model,
        row.gpu_class,
        row.devices,
        row.pod,
    )
