"""An hour of a worker's life on a clock that is made up: the real engine loop and scheduler on a device that does no
more than count time, the real meter and journal, and the real collector and ledger.

Owns the load (arrivals, lengths, cancels, engines that crash, a worker that is killed), the device, and a second,
independent count of every step, against which shares, slices, accounts, minutes and the hour are held.
"""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from pathlib import Path

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.collect import Collector
from gpumeter_usage.page import Acknowledgement, JournalStatus, Page
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account, Kind, Status, parse
from gpumeter_worker.engine.blocks import Copy, PagedBlocks
from gpumeter_worker.engine.loop import Engine, Sampled
from gpumeter_worker.engine.messages import Cancel, Ended, Event, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.clock import StepClock, StepTime
from gpumeter_worker.metering.journal import Journal
from gpumeter_worker.metering.journalpages import Reader
from gpumeter_worker.metering.meter import Flush, Identity, Meter
from rigs.ledger import START_NS, TOKEN, ended, gone, inline, open_ledger, started, worker

OF = worker()
TENANTS = ("acme", "beta-corp", "gamma")
CHECKPOINT_NS = 5 * SECOND_NS
GROUP_NS = 50_000_000
STEP_MS_LONGEST = 400
_STATUS = {Finish.STOP: Status.FINISHED, Finish.LENGTH: Status.FINISHED, Finish.CANCELLED: Status.CANCELLED}


@dataclass
class Load:
    """What happens in the hour. Intervals are means of a Poisson process."""

    seconds: int = 3600
    arrival_s: float = 0.7
    cancel_share: float = 0.12
    engine_crash_s: float = 240.0
    worker_kill_s: float = 900.0


@dataclass
class Count:
    """The second count, and every sentence about what does not agree with it."""

    problems: list[str] = field(default_factory=list)
    steps: int = 0
    flushes: int = 0
    sessions: Counter[str] = field(default_factory=Counter)
    crashes: int = 0
    kills: int = 0
    preempted: int = 0
    records: int = 0
    allocated_ns: int = 0
    attributed_ns: int = 0
    nonbillable_ns: int = 0
    unaccounted_ns: int = 0
    lost_ns: int = 0
    by_minute: dict[tuple[int, str], int] = field(default_factory=lambda: defaultdict(int))
    lost_by_minute: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    minutes: int = 0

    def expect(self, what: str, given: int, wanted: int) -> None:
        """Note a difference."""
        if given != wanted:
            self.problems.append(f"{what}: {given} ns, and the steps say {wanted} ns")

    def lose(self, from_ns: int, to_ns: int) -> None:
        """Time that nobody measured, minute by minute."""
        self.lost_ns += to_ns - from_ns
        while from_ns < to_ns:
            end_ns = min(to_ns, minute_end(from_ns + 1))
            self.lost_by_minute[minute_end(end_ns)] += end_ns - from_ns
            from_ns = end_ns


def minute_end(at_ns: int) -> int:
    """The end of the minute to which something that ends at this time belongs."""
    return -(-at_ns // MINUTE_NS) * MINUTE_NS


class Device:
    """A device on which a step takes what its tokens take, by a clock that nobody else moves while it runs."""

    kind = "cuda"
    drift_ppb = None
    begun = 0
    """It never fails half-way; what it was doing when its engine crashed is lost with it."""

    def __init__(self, dice: random.Random, now_ns: int) -> None:
        self.now_ns = now_ns
        self._dice = dice
        self._times: list[StepTime] = []

    def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
        self.now_ns += self._dice.randrange(2_000_000)  # a gap
        tokens = sum(work.count for work in plan)
        took_ns = 9_000_000 + 400_000 * tokens + self._dice.randrange(1_000_000)
        took_ns = min(took_ns, STEP_MS_LONGEST * 1_000_000)
        begun_ns, self.now_ns = self.now_ns, self.now_ns + took_ns
        drift_ns = self._dice.choice((0, 0, 0, -700, 300))  # two clocks disagree by some parts in a million
        self._times.append(StepTime(begun_ns, self.now_ns, took_ns + drift_ns))
        return [Sampled(self._dice.randrange(5, 500)) for work in plan if work.samples]

    def copy(self, copies: Row[Copy]) -> None: ...

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def abort(self) -> bool:
        return False

    def harvest(self) -> list[StepTime]:
        found, self._times = self._times, []
        return found


class Local:
    """The collector's port to a journal in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal: Journal | None = None
        self._reader: Reader | None = None

    async def status(self, target: Target) -> JournalStatus:
        return self.reader.status()

    async def page(self, target: Target, boot_id: str, after: int, limit: int) -> Page:
        page = self.reader.page(boot_id, after, limit)
        assert page is not None
        return page

    async def acknowledge(self, target: Target, acknowledgement: Acknowledgement) -> None:
        assert self.journal is not None
        self.journal.acknowledge(acknowledgement)

    @property
    def reader(self) -> Reader:
        """Opened when the journal is there."""
        self._reader = self._reader or Reader(self.folder, OF.worker_uid, OF.service_key)
        return self._reader


class Hour:
    """The hour, from the pod's start to its end."""

    def __init__(self, folder: Path, seed: int, load: Load) -> None:
        self.folder, self.load, self.count = folder, load, Count()
        self.dice = random.Random(seed)
        self.port, self.deaf = Local(folder), Deaf(folder)
        self.ledgers = {
            granularity: open_ledger(folder / f"{granularity}.db", granularity)
            for granularity in (Granularity.MINUTE, Granularity.HOUR)
        }
        self.device = Device(self.dice, START_NS + 7_000_000_001)
        self.boots = 0
        self.named = 0
        self.spans: list[tuple[str, int, int]] = []
        self.happenings: list[tuple[int, str]] = []
        for what, every_s in (("crash", load.engine_crash_s), ("kill", load.worker_kill_s)):
            self._next(what, every_s)
        self._next("ask", load.arrival_s)

    async def run(self) -> Count:
        end_ns = START_NS + self.load.seconds * SECOND_NS
        self._boot()
        while self.device.now_ns < end_ns:
            self._happen()
            if self.engine.busy:
                self._take(self.engine.turn())
            else:
                self.device.now_ns = min(self.happenings[0][0], self.flush_at_ns, end_ns)
            if self.device.now_ns >= self.flush_at_ns:
                self._flush()
            if self.device.now_ns >= self.collect_at_ns:
                await self._collect()
        self._drain()
        await self._collect()
        self._check()
        return self.count

    # ---- what happens ------------------------------------------------------------------------------------------------

    def _next(self, what: str, every_s: float) -> None:
        heapq.heappush(
            self.happenings, (self.device.now_ns + round(self.dice.expovariate(1 / every_s) * SECOND_NS) + 1, what)
        )

    def _happen(self) -> None:
        while self.happenings and self.happenings[0][0] <= self.device.now_ns:
            _, what = heapq.heappop(self.happenings)
            if what == "ask":
                self._ask()
                self._next(what, self.load.arrival_s)
            elif what == "crash":
                self._crash()
                self._next(what, self.load.engine_crash_s)
            elif what == "kill":
                self._kill()
                self._next(what, self.load.worker_kill_s)
            elif what in self.alive:
                self.engine.cancel(Cancel(what))

    def _ask(self) -> None:
        self.named += 1
        name, tenant = f"s-{self.named:032x}", self.dice.choice(TENANTS)
        prompt = [self.dice.randrange(5, 500) for _ in range(self.dice.choice((4, 30, 200, 900)))]
        answers = self.dice.choice((1, 1, 1, 3))
        self.meter.begin(name, tenant, self.device.now_ns)
        self.alive[name], self.tenants[name] = answers, tenant
        longest = self.dice.choice((1, 20, 80, 300))
        for choice in range(answers):
            sampling = Sampling(max_tokens=longest, temperature=1.0)
            self.engine.submit(Submit(name, prompt, sampling, choice, tenant, counts_prompt=choice == 0))
        if self.dice.random() < self.load.cancel_share:
            heapq.heappush(self.happenings, (self.device.now_ns + self.dice.randrange(1, 4 * SECOND_NS), name))

    def _boot(self) -> None:
        self.boots += 1
        now_ns = self.device.now_ns
        identity = Identity(
            OF.worker_uid, f"boot-{self.boots}", OF.service_key, OF.model, OF.gpu_class, "cuda", "GPU-1"
        )
        self.meter = Meter(identity, uncalibrated(Rule.KNEE, "cuda"), now_ns)
        self.port.journal = self.journal = Journal(self.folder, identity, now_ns)
        self.spans.append((f"c{self.boots}", now_ns, 0))
        self.floor_ns = now_ns
        self.flushed_ns = (0, 0)
        self.booked_ns = (0, 0)
        self.stated_unmeasured_ns = 0
        self.flush_at_ns = now_ns + CHECKPOINT_NS
        self.collect_at_ns = now_ns + 3 * SECOND_NS
        self.unconfirmed: list[tuple[int, str, int]] = []
        self.lost_unconfirmed: list[tuple[int, int]] = []
        self._load_engine()

    def _load_engine(self) -> None:
        self.alive: dict[str, int] = {}
        self.tenants: dict[str, str] = {}
        blocks = PagedBlocks(160, 16, prefix=True)  # little more than two of the longest: preemptions are common
        self.engine = Engine(self.device, self.device, Limits(12, 256, 64), frozenset({1}), 1300, blocks)
        for phase, most_ns in ((Phase.LOAD, 2), (Phase.WARMUP, 6), (Phase.SERVING, 3)):
            self.device.now_ns += self.dice.randrange(1, most_ns * SECOND_NS)
            self.meter.enter(phase, self.device.now_ns)

    def _crash(self) -> None:
        """The engine is killed in a step."""
        self.count.crashes += 1
        if self.alive:
            self.device.now_ns += self.dice.randrange(1, 50_000_000)
            from_ns = self.meter.accounts.frontier_ns
            self.lost_unconfirmed.append((from_ns, self.device.now_ns))
        self.meter.lose(self.device.now_ns)
        for name in list(self.alive):
            self._end(name, Status.FAILED)
        self.meter.enter(Phase.INIT, self.device.now_ns)
        self._load_engine()

    def _kill(self) -> None:
        """The worker is killed, and its container starts anew over the same volume."""
        self.count.kills += 1
        self.journal.close()
        self.count.lose(self.floor_ns, self.device.now_ns)
        self._close_span()
        self.device.now_ns += self.dice.randrange(1, 8 * SECOND_NS)
        self._boot()

    def _drain(self) -> None:
        self.meter.enter(Phase.DRAIN, self.device.now_ns)
        for name in list(self.alive):
            self.engine.cancel(Cancel(name))
        while self.engine.busy:
            self._take(self.engine.turn())
        self.device.now_ns += self.dice.randrange(SECOND_NS)
        self._flush(closing=True)
        self.device.now_ns += self.dice.randrange(SECOND_NS)
        self._close_span()

    def _close_span(self) -> None:
        name, begun_ns, _ = self.spans[-1]
        self.spans[-1] = (name, begun_ns, self.device.now_ns)

    # ---- what is counted twice ---------------------------------------------------------------------------------------

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, StepReport):
                self._step(event)
            elif isinstance(event, Ended) and event.session_id in self.alive:
                self.alive[event.session_id] -= 1
                if not self.alive[event.session_id]:
                    self._end(event.session_id, _STATUS.get(event.finish, Status.FAILED))

    def _step(self, step: StepReport) -> None:
        frontier_ns = self.meter.accounts.frontier_ns
        booked_ns = min(step.gpu_ns, step.ended_ns - max(frontier_ns, step.started_ns))
        shares_ns = self.meter.step(step.started_ns, step.ended_ns, step.gpu_ns, step.parts)
        self.count.steps += 1
        self.count.expect(f"step {self.count.steps}, sum of shares", sum(shares_ns), booked_ns)
        attributed_ns = 0
        for part, share_ns in zip(step.parts, shares_ns, strict=True):
            if part.recompute:
                self.count.preempted += 1
            else:
                attributed_ns += share_ns
                self.unconfirmed.append((minute_end(step.ended_ns), self.tenants[part.session_id], share_ns))
        totals = self.meter.accounts.totals_ns
        before = self.booked_ns
        self.booked_ns = (before[0] + attributed_ns, before[1] + booked_ns - attributed_ns)
        self.count.expect("attributed after a step", totals[Account.ATTRIBUTED], self.booked_ns[0])
        self.count.expect("nonbillable after a step", totals[Account.NONBILLABLE], self.booked_ns[1])

    def _end(self, name: str, status: Status) -> None:
        del self.alive[name]
        self.meter.end(name, status, self.device.now_ns)
        self.count.sessions[status.value] += 1
        self.flush_at_ns = min(self.flush_at_ns, self.device.now_ns + GROUP_NS)

    def _flush(self, *, closing: bool = False) -> None:
        flush = self.meter.cut(self.device.now_ns) or self.meter.nothing()
        self._check_flush(flush)
        self.journal.append(flush, self.meter.seal(Status.DRAINED) if closing else None)
        self.floor_ns = flush.frontier_ns
        self.flush_at_ns = self.device.now_ns + CHECKPOINT_NS
        for minute, tenant, share_ns in self.unconfirmed:
            self.count.by_minute[minute, tenant] += share_ns
        for lost in self.lost_unconfirmed:
            self.count.lose(*lost)
        self.unconfirmed, self.lost_unconfirmed = [], []
        self.count.flushes += 1

    def _check_flush(self, flush: Flush) -> None:
        of = Counter[tuple[Kind, str]]()
        for record in flush.records:
            of[record.kind, record.account] += record.gpu_ns
        attributed_ns, nonbillable_ns = (now - then for now, then in zip(self.booked_ns, self.flushed_ns, strict=True))
        where = f"flush {self.count.flushes + 1}"
        self.count.expect(f"{where}, slices", of[Kind.SESSION, "attributed"], attributed_ns)
        self.count.expect(f"{where}, attributed", of[Kind.ACCOUNT, "attributed"], attributed_ns)
        self.count.expect(f"{where}, nonbillable", of[Kind.ACCOUNT, "nonbillable"], nonbillable_ns)
        accounts_ns = sum(gpu_ns for (kind, _), gpu_ns in of.items() if kind is Kind.ACCOUNT)
        lost_ns = sum(to - since for since, to in self.lost_unconfirmed)
        self.count.expect(f"{where}, accounts", accounts_ns + lost_ns, flush.frontier_ns - self.floor_ns)
        self.flushed_ns = self.booked_ns

    async def _collect(self) -> None:
        self.collect_at_ns = self.device.now_ns + 3 * SECOND_NS
        now_ns = self.device.now_ns
        events = []
        for name, begun_ns, ended_ns in self.spans:
            events += [started(name, begun_ns), *([ended(name, ended_ns)] if ended_ns else [])]
        minute, hour = self.ledgers.values()
        for ledger in (hour, minute):  # the last one's acknowledgement trims, so the other one must have it already
            ledger.observe(OF, events, now_ns)
            port = self.port if ledger is minute else self.deaf
            assert await Collector(ledger, port, inline, lambda: now_ns).pull(OF, Target("", TOKEN))

    # ---- at the end --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        end_ns, count = self.device.now_ns, self.count
        for granularity, ledger in self.ledgers.items():
            ledger.observe(OF, [gone(end_ns)], end_ns)
            Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), end_ns + 2 * 60 * MINUTE_NS)
            count.problems += [f"{granularity}: {told}" for told in audit(ledger, (OF.namespace, OF.service))]
            count.problems += [f"{granularity}: an alarm: {alarm}" for alarm in ledger.alarms()]
            self._check_pod(f"{granularity}", ledger)
        self._check_minutes(self.ledgers[Granularity.MINUTE])

    def _check_pod(self, name: str, ledger: Ledger) -> None:
        count, frozen = self.count, [accounts for _, accounts in ledger.pod_accounts(OF.worker_uid)]
        count.allocated_ns = sum(ended_ns - begun_ns for _, begun_ns, ended_ns in self.spans)
        count.attributed_ns = sum(count.by_minute.values())
        count.unaccounted_ns = sum(accounts.unaccounted for accounts in frozen)
        count.nonbillable_ns = sum(accounts.nonbillable for accounts in frozen)
        count.expect(f"{name}: allocated", sum(accounts.allocated for accounts in frozen), count.allocated_ns)
        count.expect(f"{name}: attributed", sum(accounts.attributed for accounts in frozen), count.attributed_ns)
        count.expect(f"{name}: unaccounted", count.unaccounted_ns, count.lost_ns)
        for accounts in frozen:
            count.expect(f"{name}: a period's accounts", accounts.owned + accounts.unaccounted, accounts.allocated)

    def _check_minutes(self, ledger: Ledger) -> None:
        count, shares_ns = self.count, defaultdict[tuple[int, str], int](int)
        for _, _, _, body, booked_end_ns in ledger.bodies(OF.worker_uid):
            record = parse(body)
            count.records += 1
            if record.kind is Kind.SESSION:
                shares_ns[booked_end_ns, record.tenant] += record.gpu_ns
        for key in shares_ns.keys() | count.by_minute.keys():
            count.expect(f"minute {key}", shares_ns[key], count.by_minute[key])
        for end_ns, accounts in ledger.pod_accounts(OF.worker_uid):
            count.minutes += 1
            # What a step leaves in the minute in which it began, the next minute gives back.
            rest_ns = accounts.unaccounted - count.lost_by_minute[end_ns]
            if abs(rest_ns) > (STEP_MS_LONGEST + 10) * 1_000_000:
                count.problems.append(f"the minute until {end_ns} has {rest_ns} ns too many unaccounted")


class Deaf(Local):
    """A port whose acknowledgements do not reach the journal, for a second ledger that reads along."""

    async def acknowledge(self, target: Target, acknowledgement: Acknowledgement) -> None: ...
