"""The identity as a state machine: whatever happens to a worker, every nanosecond has exactly one owner.

Meter, accounts and the real journal file, driven by a fake clock through steps, gaps, cancels, failures, minute edges,
flushes, acknowledgements, crashes and reopenings.
"""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpumeter_usage.chain import GENESIS, verify
from gpumeter_usage.page import Acknowledgement
from gpumeter_usage.period import MINUTE_NS, Granularity, period_of
from gpumeter_usage.record import ENDED, Account, Kind, Record, Status, parse
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.journal import Journal, Reader
from gpumeter_worker.metering.meter import Identity, Meter, Part

SECOND = 10**9
DURATIONS = st.one_of(
    st.integers(0, 5), st.integers(1, 10**7), st.integers(1, 10 * SECOND), st.integers(MINUTE_NS - 3, 3 * MINUTE_NS)
)


class Worker(RuleBasedStateMachine):
    """`self.told` is what the test itself knows to be true: the time of every boot and of every session."""

    @initialize(start=st.integers(10**18, 10**18 + MINUTE_NS))
    def boot(self, start: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.now = start
        self.boots = 0
        self.ledger: dict[str, list[Record]] = {}
        self.heads: dict[str, str] = {}
        self.started: dict[str, int] = {}
        self.flushed: dict[str, int] = {}
        self.used: dict[str, int] = {}
        self.ended: dict[str, Status] = {}
        self._open()

    def _open(self) -> None:
        self.boots += 1
        self.boot_id = f"boot-{self.boots}"
        identity = Identity("worker", self.boot_id, "team/model", "model", "cpu", "host")
        self.meter = Meter(identity, uncalibrated(Rule.KNEE, "host"), self.now)
        self.started[self.boot_id] = self.flushed[self.boot_id] = self.now
        self.journal = Journal(Path(self.folder.name), identity, self.now)
        self.reader = Reader(Path(self.folder.name), "worker", "team/model")
        self.sessions: list[str] = []
        self.unflushed: dict[str, int] = {}
        self.named = 0

    @rule(duration=DURATIONS)
    def time_passes(self, duration: int) -> None:
        self.now += duration

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
        assert sum(shares) <= duration
        if drift <= 0:
            assert sum(shares) == max(0, duration + drift)
        for session, share in zip(members, shares, strict=True):
            self.used[session] += share
        self.device_free = started + duration
        self.now = max(self.now, self.device_free)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), status=st.sampled_from([Status.FINISHED, Status.CANCELLED, Status.FAILED]))
    def a_session_ends(self, data: st.DataObject, status: Status) -> None:
        session = data.draw(st.sampled_from(self.sessions))
        self.sessions.remove(session)
        totals = self.meter.end(session, status, self.now)
        assert totals.gpu_ns == self.used[session]
        self.ended[session] = status

    @precondition(lambda self: self.sessions)
    @rule()
    def the_engine_dies(self) -> None:
        for session in self.sessions:
            self.meter.end(session, Status.FAILED, self.now)
            self.ended[session] = Status.FAILED
        self.sessions = []
        self.meter.enter(Phase.INIT, self.now)

    @rule()
    def a_flush_is_committed(self) -> None:
        flush = self.meter.cut(self.now)
        if flush is not None:
            self.journal.append(flush)
            self.flushed[self.boot_id] = flush.frontier_ns

    @rule(limit=st.integers(1, 50))
    def the_collector_pulls(self, limit: int) -> None:
        for boot in self.reader.status().boots:
            page = self.reader.page(boot.boot_id, boot.acknowledged_seq, limit)
            assert page is not None
            if not page.links:
                continue
            head = verify(self.heads.get(boot.boot_id, GENESIS), page.links)
            self.heads[boot.boot_id] = head
            self.ledger.setdefault(boot.boot_id, []).extend(parse(link.body) for link in page.links)
            self.journal.acknowledge(Acknowledgement(boot.boot_id, boot.acknowledged_seq + len(page.links), head))

    @rule(away=DURATIONS)
    def the_process_is_killed_and_starts_again(self, away: int) -> None:
        # What was not flushed is lost with the process: the ledger will call it unaccounted.
        for session in list(self.used):
            if session.startswith(f"{self.boot_id}-"):
                self.used[session] = -1  # judged by what reached the journal
        self.journal.close()
        self.reader.close()
        self.now = max(self.now, self.meter.accounts.frontier_ns) + away
        self._open()

    @precondition(lambda self: not self.sessions)
    @rule()
    def the_worker_drains_and_starts_again(self) -> None:
        self.meter.enter(Phase.DRAIN, self.now)
        flush = self.meter.cut(self.now) or self.meter.nothing()
        head = self.journal.append(flush, closing=self.meter.seal(Status.DRAINED))
        assert head.sealed
        self.flushed[self.boot_id] = flush.frontier_ns
        self.journal.close()
        self.reader.close()
        self.now += 1
        self._open()

    @invariant()
    def the_accounts_partition_the_time_up_to_the_frontier(self) -> None:
        accounts = self.meter.accounts
        assert sum(accounts.totals_ns.values()) == accounts.frontier_ns - accounts.started_ns
        if not self.sessions:
            assert accounts.totals_ns[Account.NONBILLABLE] == 0

    @invariant()
    def nothing_in_flight_is_booked_beyond_the_last_step(self) -> None:
        assert self.meter.accounts.frontier_ns <= self.now

    def teardown(self) -> None:
        if not hasattr(self, "journal"):
            return
        for session in list(self.sessions):
            self.a_session_ends_at_last(session)
        self.a_flush_is_committed()
        self.journal.close()
        self.reader.close()
        self._open()  # seals whatever is left open
        for _ in range(10_000):
            before = sum(map(len, self.ledger.values()))
            self.the_collector_pulls(5000)
            if sum(map(len, self.ledger.values())) == before:
                break
        for boot_id, started in self.started.items():
            if boot_id != self.boot_id:
                self._check_boot(boot_id, started)
        self.journal.close()
        self.reader.close()
        self.folder.cleanup()

    def a_session_ends_at_last(self, session: str) -> None:
        self.sessions.remove(session)
        self.meter.end(session, Status.FINISHED, self.now)
        self.ended[session] = Status.FINISHED

    def _check_boot(self, boot_id: str, started: int) -> None:
        records = self.ledger[boot_id]
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        assert records[-1].kind is Kind.SEAL
        assert records[-1].ended_at == self.flushed[boot_id]
        accounts = [record for record in records if record.kind is Kind.ACCOUNT]
        slices = [record for record in records if record.kind is Kind.SESSION]
        assert sum(record.gpu_ns for record in accounts) == self.flushed[boot_id] - started
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
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
