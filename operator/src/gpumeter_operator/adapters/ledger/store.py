"""Writing the ledger: the one place where a fact becomes durable.

Owns the transactions: a page and its cursor together, an observation and the correction that follows from it together,
all Final reports of a period together. Knows no HTTP and no Kubernetes.
"""

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from hashlib import sha256

from sqlalchemy import Connection, func, insert, select

from gpumeter_operator.adapters.ledger import dialect, locks, rows
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.closed import FactsVersion, facts_version, last_final_ns
from gpumeter_operator.adapters.ledger.days import DayMissing, Days
from gpumeter_operator.adapters.ledger.engine import has_one_writer, reading, refuse_other_schema, upgrade
from gpumeter_operator.adapters.ledger.engine import writing as begin_writing
from gpumeter_operator.adapters.ledger.locks import Lock
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.rows import ContainerEvent, Taken
from gpumeter_operator.billing.accept import OfPod, PageRefused, accept, others_ns, refuse_foreign
from gpumeter_operator.billing.accounts import NAMES, Accounts
from gpumeter_operator.billing.facts import NOTHING, Worker
from gpumeter_operator.billing.report import Manifest
from gpumeter_operator.billing.schedule import effective_from_ns
from gpumeter_usage.chain import GENESIS, Link, link
from gpumeter_usage.page import Boot, Page
from gpumeter_usage.period import Granularity, Period
from gpumeter_usage.record import Status

MAX_PROFILES_PER_WORKER = 64
"""A worker has one a calibration; a broken one must not fill the ledger."""

ServiceName = tuple[str, str]
"""(namespace, name)."""


class Ledger(Reader):
    """The ledger, for the collector. Methods block, and may be called from several threads."""

    def __init__(self, url: str, *, migrate: bool = True) -> None:
        """Raises LedgerUnavailable. Its owner brings the tables up to date, and makes them where there are none.

        With `migrate` off they are refused, untouched, where they are not of this version: a ledger that somebody else
        owns, whose version of gpumeter could not use it any more.
        """
        if not migrate:
            look = Reader(url)
            try:
                refuse_other_schema(look.engine)
            finally:
                look.close()
        super().__init__(url, read_only=False)
        # Where there is one writer, to queue here is fairer than the database's busy-waiting.
        self._queue = threading.Lock() if has_one_writer(self.engine) else nullcontext()
        self.days = Days(self.engine)
        if migrate:
            upgrade(self.engine)

    def set_granularity(self, granularity: Granularity, now_ns: int) -> int:
        """Let periods have this length from the next full hour on (from the beginning in an empty ledger).

        Returns since when, or from when, the length holds.
        """
        with self.writing() as connection:
            g = t.granularities.c
            known = connection.execute(select(t.granularities).order_by(g.effective_from_ns)).all()
            if known and known[-1].granularity == granularity.value:
                return int(known[-1].effective_from_ns)
            from_ns = effective_from_ns(now_ns) if known else 0
            while any(row.effective_from_ns >= from_ns for row in known):  # changed twice within one hour
                from_ns = effective_from_ns(from_ns + 1)
            values = {"effective_from_ns": from_ns, "granularity": granularity.value, "set_ns": now_ns}
            connection.execute(insert(t.granularities).values(values))
            return from_ns

    def take(self, worker: Worker, page: Page, now_ns: int, *, whole: bool = False) -> Taken:
        """Commit a page: its new records, their place in a period, and the cursor, in one transaction.

        What is already there is compared and ignored. Raises PageRefused, with nothing taken: for a page that does not
        continue what is there, and for two different records under one key (both are kept, the second in an alarm).
        `whole` as for `accept`.
        """
        refuse_foreign(worker, page.worker_uid, page.service)  # before anything is compared under its name
        if not page.boot_id.isprintable():
            raise PageRefused("BootInvalid", f"it sent a boot whose id is no name: {page.boot_id!r:.80}")
        while True:
            boots = self.boots(worker.worker_uid)
            boot = next((one for one in boots if one.boot_id == page.boot_id), None)
            seq, head_hash = (boot.committed_seq, boot.head_hash) if boot else (0, GENESIS)
            if page.after > seq:
                raise PageRefused(
                    "SequenceGap",
                    f"boot {page.boot_id:.64}: records {seq + 1} to {page.after} are missing, and were not committed",
                )
            known, fresh = page.links[: seq - page.after], page.links[seq - page.after :]
            self._refuse_fork(worker, page, known, now_ns)
            if fresh and boot and boot.seal is not Status.NONE:
                raise PageRefused("AfterSeal", f"boot {page.boot_id:.64} goes on at seq {seq + 1} after its seal")
            accepted = accept(
                replace(page, after=seq, links=fresh),
                worker,
                head_hash,
                now_ns,
                spent=boot.spent if boot else NOTHING,
                of_pod=OfPod(self.first_started_ns(worker.worker_uid), others_ns(boots, page.boot_id)),
                whole=whole,
            )
            if not fresh:
                return Taken(0, seq, head_hash)
            mine = (locks.of_service(worker.service_key, shared=True), locks.of_worker(worker.worker_uid))
            try:
                with self.writing(*mine) as connection:
                    if not rows.advance(connection, boot, accepted):
                        continue  # another collector was faster: what was fresh may be known by now
                    rows.insert_records(connection, worker, accepted.records, fresh, now_ns, days=self.days)
            except DayMissing as missing:
                self.days.make(missing.day_ends_ns)
                continue
            named = frozenset(record.profile_hash for record in accepted.records if record.profile_hash)
            return Taken(len(fresh), seq + len(fresh), accepted.head_hash, named)

    def settle(self, worker_uid: str, settled_ns: int) -> None:
        """Note that all usage of a worker up to this time is committed. Never moves back."""
        with self.writing(locks.of_worker(worker_uid)) as connection:
            row = connection.execute(select(t.progress).where(t.progress.c.worker_uid == worker_uid)).one_or_none()
            values = {"settled_ns": max(settled_ns, row.settled_ns if row else 0), "problem": ""}
            rows.put_progress(connection, worker_uid, values)

    def note_problem(self, worker_uid: str, problem: str) -> None:
        """Note in a sentence why a worker cannot be collected from now; it is shown where the period waits for it."""
        with self.writing(locks.of_worker(worker_uid)) as connection:
            row = connection.execute(select(t.progress).where(t.progress.c.worker_uid == worker_uid)).one_or_none()
            if row is None or row.problem != problem:
                values = {
                    "settled_ns": row.settled_ns if row else 0,
                    "problem": problem,
                }
                rows.put_progress(connection, worker_uid, values)

    def observe(self, worker: Worker, events: Iterable[ContainerEvent], now_ns: int) -> int:
        """Keep what is new about a worker's pod; returns how many events were.

        Where it changes the allocation of periods that are Final already, the difference is booked as an adjustment of
        the next period, in the same transaction.
        """
        with self.writing(
            locks.of_service(worker.service_key, shared=True), locks.of_worker(worker.worker_uid)
        ) as connection:
            exists = connection.scalar(
                select(t.workers.c.worker_uid).where(t.workers.c.worker_uid == worker.worker_uid)
            )
            if exists is None:
                values = asdict(worker) | {"first_seen_ns": now_ns}
                connection.execute(insert(t.workers).values(values))
            final_ns = last_final_ns(connection, worker.namespace, worker.service)
            added = 0
            for event in events:
                added += rows.observe(connection, worker, event, final_ns, now_ns)
            return added

    def raise_alarm(
        self,
        reason: str,
        worker_uid: str,
        message: str,
        now_ns: int,
        *,
        fault: str = "",
        boot_id: str = "",
    ) -> bool:
        """Keep an alarm; returns whether it is a new one. `fault` stands for the message where that changes."""
        with self.writing(locks.of_worker(worker_uid)) as connection:
            return rows.raise_alarm(
                connection,
                now_ns,
                reason=reason,
                worker_uid=worker_uid,
                message=message,
                fault=fault,
                boot_id=boot_id[:256],
            )

    def keep_plan(self, name: str, version: int, spec: bytes, now_ns: int) -> str:
        """Keep a version of a price plan, once, and that it is in force from now on; returns its hash."""
        with self.writing(locks.PLANS) as connection:
            digest = sha256(spec).hexdigest()
            values = {"name": name, "hash": digest, "version": version, "spec": spec, "observed_ns": now_ns}
            dialect.keep_first(connection, t.price_plans, values)
            rows.observe_plan(connection, name, digest, now_ns)
            return digest

    def keep_profiles(self, worker_uid: str, profiles: Sequence[tuple[str, bytes]], now_ns: int) -> set[str]:
        """Keep what a worker told of its profiles (hash, canonical bytes), each once, the first of them only where it
        tells too many; returns which of them are in the ledger now."""
        p = t.profiles.c
        with self.writing(locks.of_worker(worker_uid)) as connection:
            known = set(connection.scalars(select(p.hash).where(p.hash.in_([digest for digest, _ in profiles]))))
            of_worker = select(func.count()).select_from(t.profiles).where(p.worker_uid == worker_uid)
            room = max(0, MAX_PROFILES_PER_WORKER - (connection.scalar(of_worker) or 0))
            for digest, body in [each for each in profiles if each[0] not in known][:room]:
                values = {"hash": digest, "body": body, "worker_uid": worker_uid, "kept_ns": now_ns}
                dialect.keep_first(connection, t.profiles, values)  # another worker may tell of the same one now
                known.add(digest)
            return known

    def note_plans(self, present: Collection[str], now_ns: int) -> None:
        """Note which price plans are there now: those that were and are not any more are in force no longer."""
        with self.writing(locks.PLANS) as connection:
            for name in connection.scalars(select(t.price_plans.c.name).distinct()).all():
                if name not in present:
                    rows.observe_plan(connection, name, "", now_ns)

    def open_period(self, service: ServiceName, period: Period, plan_name: str, plan_hash: str, now_ns: int) -> None:
        """Open a period for a service with the price plan that holds for all of it; once opened it stays so."""
        with self.writing(locks.of_service("/".join(service), shared=True)) as connection:
            values = {
                "namespace": service[0],
                "service": service[1],
                "end_ns": period.end_ns,
                "start_ns": period.start_ns,
                "granularity": period.granularity.value,
                "plan_name": plan_name,
                "plan_hash": plan_hash,
                "opened_ns": now_ns,
            }
            dialect.keep_first(connection, t.periods, values)

    def keep_reports(self, manifests: Sequence[Manifest], period: Period, now_ns: int) -> None:
        """Keep the first version of a phase before Final."""
        with self.writing(locks.REPORTS) as connection:
            rows.keep_reports(connection, manifests, period, now_ns)

    def keep_final(
        self,
        service: ServiceName,
        period: Period,
        *,
        manifests: Sequence[Manifest],
        accounts: Sequence[tuple[str, Accounts]],
        made_from: FactsVersion,
        now_ns: int,
    ) -> bool:
        """Close a period for good: all its reports and the accounts of its pods, once.

        False, with nothing kept, where facts came in since the reports were folded, or the period is Final already.
        """
        with self.writing(locks.of_service("/".join(service), shared=False)) as connection:
            if facts_version(connection, *service, period.end_ns) != made_from:
                return False
            if last_final_ns(connection, *service) >= period.end_ns:
                return False
            rows.keep_reports(connection, manifests, period, now_ns)
            of_pods = [
                {"worker_uid": worker_uid, "period_end_ns": period.end_ns}
                | {name: getattr(of_pod, name) for name in NAMES}
                for worker_uid, of_pod in accounts
            ]
            if of_pods:
                connection.execute(insert(t.pod_accounts), of_pods)
            return True

    def refuse_head(self, worker: Worker, boot: Boot, our_hash: str, watermark_ns: int, now_ns: int) -> None:
        """Raise PageRefused for a boot whose head is another than ours at the same seq, and hold the period for it.

        Which record it is that differs is not known; the alarm stands at the worker's watermark, in an open period.
        """
        message = (
            f"boot {boot.boot_id:.64}: its head at seq {boot.head_seq} is {boot.head_hash:.16}…, ours is "
            f"{our_hash:.16}…"
        )
        with self.writing(locks.of_worker(worker.worker_uid)) as connection:
            new = rows.raise_alarm(
                connection,
                now_ns,
                reason="ChainForked",
                worker_uid=worker.worker_uid,
                message=message,
                boot_id=boot.boot_id[:256],
                seq=boot.head_seq,
                ended_at=watermark_ns,
                our_hash=our_hash,
                their_hash=boot.head_hash[:64],
            )
        raise PageRefused("ChainForked", message, kept=new)

    def _refuse_fork(self, worker: Worker, page: Page, known: tuple[Link, ...], now_ns: int) -> None:
        if not known:
            return
        r = t.records.c
        query = (
            select(r.seq, r.hash, r.body, r.ended_at)
            .where(r.worker_uid == worker.worker_uid, r.boot_id == page.boot_id)
            .where(r.seq > page.after, r.seq <= page.after + len(known))
            .order_by(r.seq)
        )
        with reading(self.engine) as connection:
            ours = connection.execute(query).all()
            previous = select(r.hash).where(r.worker_uid == worker.worker_uid, r.boot_id == page.boot_id)
            previous_hash = connection.scalar(previous.where(r.seq == page.after)) or GENESIS
        # Of what retention has removed nothing can be compared any more; it was committed, and is not taken again.
        for row in ours:
            given = known[row.seq - page.after - 1]
            if row.hash != given.hash or row.body != given.body:
                break
            previous_hash = row.hash
        else:
            return
        if link(previous_hash, given.body).hash != given.hash:
            raise PageRefused(
                "ChainBroken", f"boot {page.boot_id:.64}: what was sent for seq {row.seq} does not continue its chain"
            )
        message = (
            f"boot {page.boot_id} seq {row.seq}: the worker sent {given.hash:.16}… where the ledger has "
            f"{row.hash:.16}…; both are kept, and the period is held until its grace ends"
        )
        with self.writing(locks.of_worker(worker.worker_uid)) as connection:
            new = rows.raise_alarm(
                connection,
                now_ns,
                reason="ChainForked",
                worker_uid=worker.worker_uid,
                message=message,
                boot_id=page.boot_id,
                seq=row.seq,
                ended_at=row.ended_at,
                our_hash=row.hash,
                their_hash=given.hash,
                their_body=given.body,
            )
        raise PageRefused("ChainForked", message, kept=new)

    @contextmanager
    def writing(self, *held: Lock) -> Iterator[Connection]:
        """One write transaction; without locks it has the ledger to itself (see `locks`)."""
        with self._queue, begin_writing(self.engine, *held) as connection:
            yield connection
