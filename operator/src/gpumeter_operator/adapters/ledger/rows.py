"""The statements that a write transaction is made of.

Owns how facts become rows, and the bookkeeping that belongs into the same transaction: in which period a record is
booked, how far its chain reaches, and what an observation changes in periods that are closed. Begins and ends no
transaction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from gpumeter_operator.adapters.ledger import bulk, dialect
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.bulk import Run
from gpumeter_operator.adapters.ledger.closed import last_final_ns
from gpumeter_operator.adapters.ledger.days import Days
from gpumeter_operator.adapters.ledger.late import next_open_end_ns
from gpumeter_operator.adapters.ledger.read import schedule, span_of
from gpumeter_operator.billing.accept import Accepted
from gpumeter_operator.billing.accounts import overlap_ns
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import BootFacts, Span, Worker
from gpumeter_operator.billing.reading import Row
from gpumeter_operator.billing.report import Manifest, canonical_report
from gpumeter_operator.billing.schedule import Schedule
from gpumeter_usage.chain import Link
from gpumeter_usage.period import Period, rfc3339
from gpumeter_usage.record import Kind, Record

MAX_ALARMS_PER_WORKER = 100
"""A broken worker may fail in ever new ways; its first hundred alarms tell the story."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a page: how many records are new, where the boot's chain stands now, and which profiles the new
    records name."""

    inserted: int
    seq: int
    head_hash: str
    profile_hashes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ContainerEvent:
    """Something that Kubernetes said of a container (`started`, `ended`), or that was concluded (`vanished`).

    `container_id` is "" and `event` "gone" where the pod as a whole is no more.
    """

    container_id: str
    event: str
    at_ns: int


def insert_records(
    connection: Connection,
    worker: Worker,
    records: Sequence[Record | Row],
    links: Sequence[Link],
    now_ns: int,
    *,
    days: Days,
) -> None:
    """Insert records, each booked in the period of its end, or in the next open one where that is Final already.

    Raises DayMissing, before anything is inserted, where the database has no place for a day yet.
    """
    insert_pages(connection, [(worker, records, links)], now_ns, days=days)


def insert_pages(
    connection: Connection,
    pages: Sequence[tuple[Worker, Sequence[Record | Row], Sequence[Link]]],
    now_ns: int,
    *,
    days: Days,
) -> None:
    """The same for the pages of many workers: what is asked of a service, or written at all, is so once."""
    periods = schedule(connection)
    of_services: dict[str, list[tuple[Worker, Run]]] = {}
    for worker, records, links in pages:
        of_services.setdefault(worker.service_key, []).extend((worker, run) for run in _runs(records, links, periods))
    booked: list[Run] = []
    belated = []
    for runs in of_services.values():
        service = (runs[0][0].namespace, runs[0][0].service)
        final_ns = last_final_ns(connection, *service)
        late = [(worker, run) for worker, run in runs if run.end_ns <= final_ns]
        booked += [run for _, run in runs if run.end_ns > final_ns]
        if late:
            ends_ns = {run.end_ns for _, run in runs}
            next_open_ns = next_open_end_ns(connection, *service, final_ns, now_ns, with_ends_ns=ends_ns)
            booked += [replace(run, end_ns=next_open_ns) for _, run in late]
            belated += [(worker, run, next_open_ns) for worker, run in late]
    days.require({run.end_ns for run in booked})
    try:
        bulk.insert_records(connection, booked)
    except bulk.NoPartition:
        raise days.gone(run.end_ns for run in booked) from None
    for worker, run, next_open_ns in belated:
        _tell_late(connection, worker, run, next_open_ns, now_ns)


def _runs(records: Sequence[Record | Row], links: Sequence[Link], periods: Schedule) -> Iterator[Run]:
    """A page's records, cut where one belongs to another period than the one before it."""
    start, period = 0, periods.period_of(records[0].ended_at)
    start_ns, end_ns = period.start_ns, period.end_ns
    for index, record in enumerate(records):
        if not start_ns < record.ended_at <= end_ns:
            yield Run(records[start:index], links[start:index], end_ns)
            start, period = index, periods.period_of(record.ended_at)
            start_ns, end_ns = period.start_ns, period.end_ns
    yield Run(records[start:], links[start:], end_ns)


def _tell_late(connection: Connection, worker: Worker, run: Run, next_open_ns: int, now_ns: int) -> None:
    first, last = run.records[0], run.records[-1]
    reason = (
        f"Records {first.seq} to {last.seq} of pod {worker.pod} arrived after the period that ended "
        f"{rfc3339(run.end_ns)} was Final; they are booked here."
    )
    _adjust(
        connection,
        worker,
        now_ns,
        kind="records",
        boot_id=first.boot_id,
        first_seq=first.seq,
        last_seq=last.seq,
        closed_end_ns=run.end_ns,
        booked_end_ns=next_open_ns,
        allocated_ns=0,
        reason=reason,
    )
    raise_alarm(connection, now_ns, reason="LateRecords", worker_uid=worker.worker_uid, message=reason)


def advance(connection: Connection, known: BootFacts | None, accepted: Accepted) -> bool:
    """Move a chain's cursor from where it was `known` to stand to the last of these records, and note its seal and what
    it has claimed. False, with nothing changed, where it stands elsewhere by now.

    The row stays locked until the transaction ends: of two that bring the same records one waits here, and finds that
    the other has brought them. It comes before they are inserted, and is what keeps a record from being there twice.
    """
    last = accepted.records[-1]
    sealed = last.kind is Kind.SEAL
    values = {
        "committed_seq": last.seq,
        "head_hash": accepted.head_hash,
        "accounts_ns": accepted.spent.accounts_ns,
        "slices_ns": accepted.spent.slices_ns,
        "open_seq": last.seq,
        "open_ns": accepted.spent.open.gpu_ns,
        "open_minute_ns": accepted.spent.open.minute_ns,
        "open_cut": accepted.spent.open.cut,
        "tokens": accepted.spent.tokens,
        "seal": last.status.value if sealed else "",
        "sealed_ns": last.ended_at if sealed else 0,
    }
    key = {"worker_uid": last.worker_uid, "boot_id": last.boot_id}
    if known is None:
        return dialect.keep_first(connection, t.boots, {**key, **values, "started_ns": accepted.spent.began_ns})
    b = t.boots.c
    where_it_was = (
        b.worker_uid == last.worker_uid,
        b.boot_id == last.boot_id,
        b.committed_seq == known.committed_seq,
        b.head_hash == known.head_hash,
    )
    return connection.execute(update(t.boots).where(*where_it_was).values(values)).rowcount == 1


def put_progress(connection: Connection, worker_uid: str, values: dict[str, Any]) -> None:
    """Insert or replace how far a worker is."""
    values = values | {"problem": _text(values["problem"])}
    dialect.put(connection, t.progress, {"worker_uid": worker_uid}, values)


def observe(connection: Connection, worker: Worker, event: ContainerEvent, final_ns: int, now_ns: int) -> int:
    """Keep one event about a container unless it is known; book what it changes in periods up to `final_ns`."""
    c = t.containers.c
    rows = connection.execute(
        select(c.event, c.at_ns).where(c.worker_uid == worker.worker_uid, c.container_id == event.container_id)
    )
    known = {row[0]: row[1] for row in rows}
    if event.event in known:
        return 0
    values = {
        "worker_uid": worker.worker_uid,
        "container_id": event.container_id,
        "event": event.event,
        "at_ns": event.at_ns,
        "observed_ns": now_ns,
    }
    connection.execute(insert(t.containers).values(values))
    before_ns = _allocated_ns(worker, event.container_id, known, final_ns)
    after_ns = _allocated_ns(worker, event.container_id, known | {event.event: event.at_ns}, final_ns)
    if after_ns != before_ns:
        reason = (
            f"That a container of pod {worker.pod} {event.event} at {rfc3339(event.at_ns)} became known after the "
            f"period that ended {rfc3339(final_ns)} was Final; {after_ns - before_ns} ns of allocation are booked here."
        )
        _adjust(
            connection,
            worker,
            now_ns,
            kind="allocation",
            boot_id="",
            first_seq=0,
            last_seq=0,
            closed_end_ns=final_ns,
            booked_end_ns=next_open_end_ns(connection, worker.namespace, worker.service, final_ns, now_ns),
            allocated_ns=after_ns - before_ns,
            reason=reason,
        )
        raise_alarm(connection, now_ns, reason="LateContainer", worker_uid=worker.worker_uid, message=reason)
    return 1


def observe_plan(connection: Connection, name: str, digest: str, now_ns: int) -> None:
    """Keep that this version of a price plan ("" for none) is in force from now on, unless it is known to be.

    Versions only ever go forward: where a clock stepped back, or another collector's is behind, "now" is right after
    what is known. A closed period must be priced tomorrow as it was when it was closed, and one that is open goes on
    from the version that it was opened with.
    """
    o = t.plan_observations.c
    of_plan = select(o.hash, o.observed_ns).where(o.name == name).order_by(o.observed_ns.desc(), o.id.desc())
    latest = connection.execute(of_plan.limit(1)).one_or_none()
    if latest is not None and latest.hash == digest:
        return
    seen_ns = 0 if latest is None else latest.observed_ns
    opened_ns = int(connection.scalar(select(func.max(t.periods.c.opened_ns))) or 0)
    of_final = select(func.max(t.reports.c.period_end_ns)).where(t.reports.c.phase == Phase.FINAL.value)
    final_ns = int(connection.scalar(of_final) or 0)
    values = {"name": name, "hash": digest, "observed_ns": max(now_ns, seen_ns + 1, opened_ns + 1, final_ns)}
    connection.execute(insert(t.plan_observations).values(values))


def raise_alarm(
    connection: Connection,
    now_ns: int,
    *,
    reason: str,
    worker_uid: str,
    message: str,
    fault: str = "",
    boot_id: str = "",
    seq: int = 0,
    ended_at: int = 0,
    our_hash: str = "",
    their_hash: str = "",
    their_body: bytes = b"",
) -> bool:
    """Keep an alarm unless the same is kept already; returns whether it is new.

    `fault` is what the trouble is recognised by where the message tells it in ever other figures.
    """
    told = "\0".join((reason, worker_uid, boot_id, str(seq), their_hash, fault or message))
    fingerprint = sha256(told.encode("utf-8", "backslashreplace")).hexdigest()
    a = t.alarms.c
    if connection.scalar(select(a.id).where(a.fingerprint == fingerprint)) is not None:
        return False
    count = connection.scalar(select(func.count()).select_from(t.alarms).where(a.worker_uid == worker_uid)) or 0
    if count >= MAX_ALARMS_PER_WORKER and reason != "ChainForked":
        return False
    values = {
        "reason": reason,
        "worker_uid": worker_uid,
        "boot_id": _text(boot_id),
        "seq": seq,
        "ended_at": ended_at,
        "our_hash": our_hash,
        "their_hash": _text(their_hash),
        "their_body": their_body,
        "message": _text(message),
        "fingerprint": fingerprint,
        "raised_ns": now_ns,
    }
    return dialect.keep_first(connection, t.alarms, values)


def keep_reports(connection: Connection, manifests: Sequence[Manifest], period: Period, now_ns: int) -> None:
    """Keep these versions; of a phase that is kept already the first stays."""
    values = []
    for manifest in manifests:
        body = canonical_report(manifest)
        values.append(
            {
                "namespace": manifest["metadata"]["namespace"],
                "service": manifest["spec"]["serviceRef"]["name"],
                "tenant": manifest["spec"]["tenant"],
                "period_end_ns": period.end_ns,
                "phase": manifest["status"]["phase"],
                "name": manifest["metadata"]["name"],
                "body": body,
                "digest": sha256(body).hexdigest(),
                "kept_ns": now_ns,
            }
        )
    dialect.keep_first_of_each(connection, t.reports, values)


def _text(told: str) -> str:
    """What a worker said, as every database takes it: PostgreSQL has no NUL in a text, and neither has half a pair."""
    return told.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _allocated_ns(worker: Worker, container_id: str, events: dict[str, int], final_ns: int) -> int:
    if "started" not in events or not container_id:
        return 0
    span: Span = span_of(container_id, events)
    return overlap_ns([span], worker.devices, 0, final_ns)


def _adjust(connection: Connection, worker: Worker, now_ns: int, **values: Any) -> None:
    connection.execute(
        insert(t.adjustments).values(
            namespace=worker.namespace,
            service=worker.service,
            worker_uid=worker.worker_uid,
            made_ns=now_ns,
            **values,
        )
    )
