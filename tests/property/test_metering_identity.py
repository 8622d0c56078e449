"""The identity as a state machine: whatever happens to a worker, every nanosecond has exactly one owner.

Meter, accounts, the real journal file, the real collector and the real ledger, driven by made-up clocks through steps,
gaps, cancels, failures, lost engines, minute edges, flushes, acknowledgements that are lost, crashes and reopenings;
and through what befalls clocks: leap seconds, NTP steps in both directions, a node that is suspended. On one device
and on several, each nanosecond of whose time counts on all of them.
"""

import asyncio
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target, WorkerSilent
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.collect import Collector
from gpumeter_usage.chain import GENESIS, Link, verify
from gpumeter_usage.page import Acknowledgement, JournalStatus, Page
from gpumeter_usage.period import MINUTE_NS, Granularity, period_of
from gpumeter_usage.record import ENDED, Account, Kind, Record, Status, parse
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.clock import Anchor
from gpumeter_worker.metering.journal import Journal
from gpumeter_worker.metering.journalpages import Reader
from gpumeter_worker.metering.meter import Identity, Meter
from gpumeter_worker.metering.parts import Part
from rigs.ledger import START_NS, TOKEN, ended, gone, inline, open_ledger, started, worker
from rigs.thoroughness import examples

SECOND = 10**9
SKEW_NS = 50 * SECOND
"""How wrong the node's clock may get here: with more, a ledger refuses its records until they are no more to come."""
DURATIONS = st.one_of(
    st.integers(0, 5), st.integers(1, 10**7), st.integers(1, 10 * SECOND), st.integers(MINUTE_NS - 3, 3 * MINUTE_NS)
)


_EMPTY = tempfile.TemporaryDirectory()
open_ledger(Path(_EMPTY.name) / "empty.db", Granularity.HOUR).close()


class Port:
    """The collector's port to the worker of a test, with a network between that may lose an acknowledgement."""

    def __init__(self, of: "Worker", limit: int, lost: str) -> None:
        self._of, self._limit, self._lost = of, limit, lost

    async def status(self, target: Target) -> JournalStatus:
        return self._of.reader.status()

    async def page(self, target: Target, boot_id: str, after: int, limit: int) -> Page:
        page = self._of.reader.page(boot_id, after, min(limit, self._limit))
        assert page is not None
        return page

    async def acknowledge(self, target: Target, acknowledgement: Acknowledgement) -> None:
        if self._lost == "asked":
            raise WorkerSilent("the acknowledgement was lost on its way")
        self._of.journal.acknowledge(acknowledgement)
        if self._lost == "answered":
            raise WorkerSilent("its answer was lost on its way")


class Worker(RuleBasedStateMachine):
    """`started`, `used` and the like are what the test itself knows to be true: every boot's and every session's time.

    `now` is the worker's own line of time, `true` UTC as the collector and Kubernetes have it, and `error` by how much
    the node's clock is ahead of that.
    """

    @initialize(
        start=st.integers(START_NS, START_NS + MINUTE_NS),
        error=st.integers(-SECOND, SECOND),
        devices=st.sampled_from((1, 2, 8)),
    )
    def boot(self, start: int, error: int, devices: int) -> None:
        self.of = worker(devices=devices)
        self.folder = tempfile.TemporaryDirectory()
        self.true, self.error = start, error
        self.boots = 0
        shutil.copy(Path(_EMPTY.name) / "empty.db", Path(self.folder.name) / "ledger.db")
        self.ledger = Ledger(f"sqlite:///{self.folder.name}/ledger.db")
        self.lives: list[tuple[str, int, int]] = []
        self.unmeasured: dict[str, int] = {}
        self.started: dict[str, int] = {}
        self.flushed: dict[str, int] = {}
        self.used: dict[str, int] = {}
        self.ended: dict[str, Status] = {}
        self._open()

    def _open(self) -> None:
        self.boots += 1
        self.boot_id = f"boot-{self.boots}"
        self.now = self.true + self.error
        self.lives.append((self.boot_id, self.true, self.true))
        identity = Identity(
            self.of.worker_uid, self.boot_id, self.of.service_key, self.of.model, self.of.gpu_class, "cuda"
        )
        identity = replace(identity, devices=self.of.devices)
        self.meter = Meter(identity, uncalibrated(Rule.KNEE, "host"), self.now)
        self.started[self.boot_id] = self.flushed[self.boot_id] = self.now
        self.journal = Journal(Path(self.folder.name), identity, self.now)
        self.reader = Reader(Path(self.folder.name), self.of.worker_uid, self.of.service_key)
        self.sessions: list[str] = []
        self.unmeasured[self.boot_id] = self.lost = 0
        self.named = 0

    def _close(self) -> None:
        self.journal.close()
        self.reader.close()
        boot_id, begun, _ = self.lives[-1]
        self.lives[-1] = boot_id, begun, self.true

    def _pass(self, duration: int) -> None:
        self.now += duration
        self.true += duration

    @rule(duration=DURATIONS)
    def time_passes(self, duration: int) -> None:
        self._pass(duration)

    @rule(moved=st.sampled_from((-SECOND, SECOND)) | st.integers(-20 * SECOND, 20 * SECOND))
    def the_nodes_clock_is_moved(self, moved: int) -> None:
        """By a leap second or a step of NTP. The worker's line stays; too far off, a new boot begins."""
        self.error = max(-SKEW_NS, min(SKEW_NS, self.error + moved))
        self._look_at_clock()

    @rule(duration=DURATIONS)
    def the_node_is_suspended(self, duration: int) -> None:
        """The monotonic clock stands, UTC does not."""
        self.true += duration
        self._look_at_clock()

    def _look_at_clock(self) -> None:
        own = Anchor(self.now - self.true)
        if own.problem(Anchor(self.error)):
            for session in list(self.sessions):
                self._end(session, Status.CANCELLED)
            self._drain()
        elif abs(self.now - self.true - self.error) > 5 * SECOND:
            raise AssertionError("a clock that is off by more than it may goes on")

    @rule(phase=st.sampled_from(list(Phase)))
    def the_phase_changes(self, phase: Phase) -> None:
        self.meter.enter(phase, self.now)

    @rule()
    def a_session_begins(self) -> None:
        self.named += 1
        session = f"{self.boot_id}-s{self.named}"
        if not self.sessions:
            self.device_free = self.now
        self.meter.begin(session, f"tenant-{self.named % 3}", self.now)
        self.sessions.append(session)
        self.used[session] = 0

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), gap=DURATIONS, duration=DURATIONS, drift=st.sampled_from([0, -1000, 1000]))
    def a_step_is_reported(self, data: st.DataObject, gap: int, duration: int, drift: int) -> None:
        members = data.draw(st.lists(st.sampled_from(self.sessions), min_size=1, unique=True))
        parts = [
            Part(session, data.draw(st.integers(1, 600)), data.draw(st.integers(0, 4000)), data.draw(st.booleans()), 1)
            for session in members
        ]
        # Reports come late: a step may have run long before now, and still nothing else may have its time.
        started = self.device_free + gap
        shares = self.meter.step(started, started + duration, max(0, duration + drift), parts)
        assert sum(shares) <= duration * self.of.devices
        if drift <= 0:
            assert sum(shares) == max(0, duration + drift) * self.of.devices
        for session, share in zip(members, shares, strict=True):
            self.used[session] += share
        self.device_free = started + duration
        self._pass(max(0, self.device_free - self.now))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), status=st.sampled_from([Status.FINISHED, Status.CANCELLED, Status.FAILED]))
    def a_session_ends(self, data: st.DataObject, status: Status) -> None:
        self._end(data.draw(st.sampled_from(self.sessions)), status)

    def _end(self, session: str, status: Status) -> None:
        self.sessions.remove(session)
        totals = self.meter.end(session, status, self.now)
        assert totals.gpu_ns == self.used[session]
        self.ended[session] = status

    @precondition(lambda self: self.sessions)
    @rule()
    def the_engine_dies(self) -> None:
        self.lost += max(0, self.now - self.meter.accounts.frontier_ns) * self.of.devices
        self.meter.lose(self.now)
        for session in list(self.sessions):
            self._end(session, Status.FAILED)
        assert self.meter.accounts.unmeasured_ns == self.lost
        self.meter.enter(Phase.INIT, self.now)

    @rule()
    def a_flush_is_committed(self) -> None:
        flush = self.meter.cut(self.now)
        if flush is not None:
            self.journal.append(flush)
            self._flushed(flush.frontier_ns)

    def _flushed(self, frontier_ns: int) -> None:
        self.flushed[self.boot_id] = frontier_ns
        self.unmeasured[self.boot_id] = self.lost

    @rule(limit=st.integers(1, 50), lost=st.sampled_from(("", "", "asked", "answered")))
    def the_collector_pulls(self, limit: int, lost: str = "") -> None:
        self._observe()
        collector = Collector(self.ledger, Port(self, limit, lost), inline, lambda: self.true)
        asyncio.run(collector.pull(self.of, Target("", TOKEN)))
        held = {boot.boot_id: boot.committed_seq for boot in self.ledger.boots(self.of.worker_uid)}
        for boot in self.reader.status().boots:
            assert boot.acknowledged_seq <= held.get(boot.boot_id, 0), "more is acknowledged than is in the ledger"

    def _observe(self) -> None:
        ends = [ended(boot_id, end) for boot_id, _, end in self.lives[:-1]]
        self.ledger.observe(self.of, [*(started(boot_id, begun) for boot_id, begun, _ in self.lives), *ends], self.true)

    @rule(away=DURATIONS)
    def the_process_is_killed_and_starts_again(self, away: int) -> None:
        # What was not flushed is lost with the process: the ledger will call it unaccounted.
        for session in list(self.used):
            if session.startswith(f"{self.boot_id}-"):
                self.used[session] = -1  # judged by what reached the journal
        self._close()
        self.true += away
        self._open()

    @precondition(lambda self: not self.sessions)
    @rule()
    def the_worker_drains_and_starts_again(self) -> None:
        self._drain()

    def _drain(self) -> None:
        self.meter.enter(Phase.DRAIN, self.now)
        flush = self.meter.cut(self.now) or self.meter.nothing()
        head = self.journal.append(flush, closing=self.meter.seal(Status.DRAINED))
        assert head.sealed
        self._flushed(flush.frontier_ns)
        self._close()
        self.true += 1
        self._open()

    @invariant()
    def the_accounts_partition_the_time_up_to_the_frontier(self) -> None:
        accounts = self.meter.accounts
        passed_ns = (accounts.frontier_ns - accounts.started_ns) * self.of.devices
        assert sum(accounts.totals_ns.values()) + accounts.unmeasured_ns == passed_ns
        if not self.sessions:
            assert accounts.totals_ns[Account.NONBILLABLE] == 0

    @invariant()
    def nothing_in_flight_is_booked_beyond_the_last_step(self) -> None:
        assert self.meter.accounts.frontier_ns <= self.now

    def teardown(self) -> None:
        if not hasattr(self, "journal"):
            return
        for session in list(self.sessions):
            self._end(session, Status.FINISHED)
        self.a_flush_is_committed()
        self._close()
        self._open()  # seals whatever is left open
        self._drain()
        for _ in range(3):  # an acknowledgement that was lost, and then all of it
            self.the_collector_pulls(5000)
        self._close()
        self._check_ledger()
        self.ledger.close()
        self.folder.cleanup()

    def _check_ledger(self) -> None:
        records: dict[str, list[Record]] = {}
        heads: dict[str, str] = {}
        for boot_id, _, digest, body, _ in self.ledger.bodies(self.of.worker_uid):
            heads[boot_id] = verify(heads.get(boot_id, GENESIS), (Link(digest, body),))
            records.setdefault(boot_id, []).append(parse(body))
        for boot_id, begun in self.started.items():
            if boot_id != self.boot_id:
                self._check_boot(boot_id, records[boot_id], begun)
        self.true += SECOND
        self._close_last_life()
        self.ledger.observe(self.of, [gone(self.true)], self.true)
        Closer(self.ledger, MINUTE_NS).close_all(Pricing({}, {}), self.true + 120 * MINUTE_NS)
        frozen = [accounts for _, accounts in self.ledger.pod_accounts(self.of.worker_uid)]
        lived = sum(end - begun for _, begun, end in self.lives) * self.of.devices
        assert sum(accounts.allocated for accounts in frozen) == lived
        assert sum(accounts.owned + accounts.unaccounted for accounts in frozen) == lived
        slices = sum(one.gpu_ns for of_boot in records.values() for one in of_boot if one.kind is Kind.SESSION)
        assert sum(accounts.attributed for accounts in frozen) == slices
        assert audit(self.ledger, (self.of.namespace, self.of.service)) == []
        assert self.ledger.alarms() == []

    def _close_last_life(self) -> None:
        boot_id, begun, _ = self.lives[-1]
        self.lives[-1] = boot_id, begun, self.true
        self.ledger.observe(self.of, [ended(boot_id, end) for boot_id, _, end in self.lives], self.true)

    def _check_boot(self, boot_id: str, records: list[Record], started: int) -> None:
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        assert records[-1].kind is Kind.SEAL
        assert records[-1].ended_at == self.flushed[boot_id]
        accounts = [record for record in records if record.kind is Kind.ACCOUNT]
        slices = [record for record in records if record.kind is Kind.SESSION]
        recorded = sum(record.gpu_ns for record in accounts)
        assert recorded + self.unmeasured[boot_id] == (self.flushed[boot_id] - started) * self.of.devices
        attributed = sum(record.gpu_ns for record in accounts if record.account == Account.ATTRIBUTED)
        assert sum(record.gpu_ns for record in slices) == attributed
        for record in records[:-1]:
            assert record.ended_at - record.started_at <= MINUTE_NS
            if record.ended_at > record.started_at:
                minute = period_of(record.ended_at, Granularity.MINUTE)
                assert minute.start_ns <= record.started_at
        by_session: dict[str, list[Record]] = {}
        for record in slices:
            by_session.setdefault(record.session_id, []).append(record)
        for session, own in by_session.items():
            assert all(record.status is Status.OPEN for record in own[:-1])
            if self.used[session] >= 0:
                assert sum(record.gpu_ns for record in own) == self.used[session]
                assert own[-1].status is self.ended[session]
            if own[-1].status in ENDED:
                assert own[-1].status is self.ended[session]


TestWorker = Worker.TestCase
TestWorker.settings = settings(
    max_examples=examples(15),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
