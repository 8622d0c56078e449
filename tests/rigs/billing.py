"""A worker's bill without HTTP and processes: the real engine, meter and journal, joined as the worker joins them.

Owns that joining, a tiny model of random weights on a paged cache, and the way of a journal into a real ledger. What it
lends a test is what a test cannot wait for: a clock that knows of a step's end one turn later, as a device does, and a
line of UTC time that begins where the test says.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.billing.tariff import canonical_spec
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.chain import GENESIS, verify
from gpumeter_usage.period import SECOND_NS
from gpumeter_usage.record import Kind, Record, Status, parse
from gpumeter_worker.engine.blocks import Copy, KvBlocks, PagedBlocks
from gpumeter_worker.engine.loop import Engine, Runner, Sampled
from gpumeter_worker.engine.messages import Cancel, Ended, Event, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.engine.sequence import Sequence as EngineSequence
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.clock import Anchor, HostClock, StepClock, StepTime
from gpumeter_worker.metering.journal import Journal
from gpumeter_worker.metering.journalpages import Reader
from gpumeter_worker.metering.meter import Identity, Meter, Totals
from gpumeter_worker.metering.parts import Part
from rigs.ledger import START_NS, ended, gone, started, worker

BLOCK_TOKENS = 16
BLOCKS = 40
MAX_LENGTH = 200
POD = worker()
LIMITS = Limits(8, 64)
PROFILE = uncalibrated(Rule.KNEE, "host")

_STATUS = {
    Finish.STOP: Status.FINISHED,
    Finish.LENGTH: Status.FINISHED,
    Finish.CANCELLED: Status.CANCELLED,
    Finish.FAILED: Status.FAILED,
}


class LateClock(HostClock):
    """Knows of a step's end one turn later, as a device does: meanwhile the step is in flight."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[StepTime] = []

    def harvest(self) -> list[StepTime]:
        """See StepClock."""
        known, self._known = self._known, super().harvest()
        return known


@cache
def _model() -> Any:
    from rigs.paged import tiny_model  # transformers: seconds, once

    return tiny_model("llama", "cpu")


class _OnOneThread:
    """Runs a tiny model's steps on one thread: on a busy machine the other threads are what a step waits for."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner

    def run(self, plan: Sequence[Work], clock: StepClock) -> list[Sampled]:
        """See Runner."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._inner.run(plan, clock)
        finally:
            torch.set_num_threads(threads)

    def copy(self, copies: Sequence[Copy]) -> None:
        """See Runner."""
        self._inner.copy(copies)


def load_runner() -> Runner:
    """Load and warm up as an engine process does: a real model's step before anybody is served."""
    from rigs.paged import PagedRunner

    runner = _OnOneThread(PagedRunner(_model(), BLOCKS, MAX_LENGTH))
    warm = EngineSequence("", 0, "", [1] * 8, 8, Sampling(1, temperature=0.0), blocks=[0])
    clock = HostClock()
    runner.run([Work(warm, 8, samples=True, prefill=True)], clock)
    clock.harvest()
    return runner


@dataclass
class Step:
    """A reported step and what each of its parts was given of it."""

    report: StepReport
    shares_ns: list[int]

    def share_of(self, session_id: str, *, recompute: bool = False) -> int:
        """What the parts of a session got: those that it pays, or those that are computed for the second time."""
        both = zip(self.report.parts, self.shares_ns, strict=True)
        return sum(share for part, share in both if part.session_id == session_id and part.recompute is recompute)


class Books:
    """Meter and journal of one boot. `at_ns` is a reading of CLOCK_MONOTONIC throughout, as in the worker."""

    def __init__(self, folder: Path, started_ns: int, anchor: Anchor, devices: int = 1) -> None:
        self.anchor = anchor
        identity = Identity(
            POD.worker_uid, "boot-1", POD.service_key, POD.model, POD.gpu_class, "host", devices=devices
        )
        self.meter = Meter(identity, PROFILE, anchor.utc_ns(started_ns))
        self.journal = Journal(folder, identity, anchor.utc_ns(started_ns))
        self.reader = Reader(folder, POD.worker_uid, POD.service_key)
        self.steps: list[Step] = []
        self.ended: dict[str, Totals] = {}
        self.in_flight: set[str] = set()

    def enter(self, phase: Phase, at_ns: int) -> None:
        """The worker's phase changes."""
        self.meter.enter(phase, self.anchor.utc_ns(at_ns))

    def begin(self, session_id: str, tenant: str, at_ns: int) -> None:
        """A request was admitted."""
        self.meter.begin(session_id, tenant, self.anchor.utc_ns(at_ns))
        self.in_flight.add(session_id)

    def book(self, events: Iterable[Event], at_ns: int) -> None:
        """What the engine reported, in its order."""
        for event in events:
            if isinstance(event, StepReport):
                started_ns, ended_ns = self.anchor.utc_ns(event.started_ns), self.anchor.utc_ns(event.ended_ns)
                shares_ns = self.meter.step(started_ns, ended_ns, event.gpu_ns, event.parts)
                self.steps.append(Step(event, shares_ns))
            elif isinstance(event, Ended):
                self.end(event.session_id, _STATUS[event.finish], at_ns)

    def end(self, session_id: str, status: Status, at_ns: int) -> None:
        """A session left the engine, or the engine left it."""
        self.in_flight.remove(session_id)
        self.ended[session_id] = self.meter.end(session_id, status, self.anchor.utc_ns(at_ns))

    def earned_ns(self, session_id: str) -> int:
        """All that the steps gave a session to pay."""
        return sum(step.share_of(session_id) for step in self.steps)

    def flush(self, at_ns: int) -> None:
        """Journal everything up to the frontier."""
        if (flush := self.meter.cut(self.anchor.utc_ns(at_ns))) is not None:
            self.journal.append(flush)

    def seal(self, at_ns: int) -> int:
        """End the chain; when, in UTC nanoseconds."""
        self.enter(Phase.DRAIN, at_ns)
        flush = self.meter.cut(self.anchor.utc_ns(at_ns)) or self.meter.nothing()
        self.journal.append(flush, closing=self.meter.seal(Status.DRAINED))
        return flush.frontier_ns

    def records(self) -> list[Record]:
        """What the journal's file holds, read and verified as the collector does."""
        page = self.reader.page("boot-1", 0, 5000)
        assert page is not None
        verify(GENESIS, page.links)
        return [parse(link.body) for link in page.links]

    def slices(self, session_id: str) -> list[Record]:
        """The journaled slices of a session."""
        return [record for record in self.records() if record.session_id == session_id]

    def billed_ns(self, session_id: str) -> int:
        """What the journal says that a session used."""
        return sum(record.gpu_ns for record in self.slices(session_id))

    def accounts(self) -> dict[str, int]:
        """The pod's own accounts, as journaled."""
        sums: dict[str, int] = {}
        for record in self.records():
            if record.kind is Kind.ACCOUNT:
                sums[record.account] = sums.get(record.account, 0) + record.gpu_ns
        return sums

    def close(self) -> None:
        """Give the files back."""
        self.reader.close()
        self.journal.close()


class Billed:
    """Books and an engine, turned by hand. The boot begins at START_NS on the line of UTC time."""

    def __init__(
        self,
        folder: Path,
        *,
        load: Callable[[], Runner] = load_runner,
        limits: Limits = LIMITS,
        blocks: KvBlocks | None = None,
        clock: StepClock | None = None,
        devices: int = 1,
    ) -> None:
        now_ns = time.monotonic_ns()
        self.books = Books(folder, now_ns, Anchor(START_NS + 5 - now_ns), devices)
        self.books.enter(Phase.LOAD, time.monotonic_ns())
        runner = load()
        self.books.enter(Phase.WARMUP, time.monotonic_ns())
        blocks = blocks or PagedBlocks(BLOCKS, BLOCK_TOKENS, prefix=False)
        self.engine = Engine(runner, clock or HostClock(), limits, frozenset(), MAX_LENGTH, blocks)
        self.ready_ns = time.monotonic_ns()
        self.books.enter(Phase.SERVING, self.ready_ns)

    def ask(self, session_id: str, tenant: str, prompt: Sequence[int], max_tokens: int) -> None:
        """Admit a request; greedy, and never ended by the model."""
        self.books.begin(session_id, tenant, time.monotonic_ns())
        sampling = Sampling(max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(Submit(session_id, list(prompt), sampling, tenant=tenant))

    def cancel(self, session_id: str) -> None:
        """The client went away, a timeout struck, or the drain's time is over: to the engine it is one and the same."""
        self.engine.cancel(Cancel(session_id))

    def turn(self, times: int = 1) -> None:
        """Steps of the engine, booked as they are reported."""
        for _ in range(times):
            self.books.book(self.engine.turn(), time.monotonic_ns())

    def run_out(self) -> None:
        """Turn until nothing is left to do, and journal it."""
        for _ in range(2000):
            if not self.engine.busy:
                self.books.flush(time.monotonic_ns())
                return
            self.turn()
        raise AssertionError("the engine does not come to an end")

    def lose_engine(self) -> None:
        """The engine process is gone, with whatever it had not reported."""
        for session_id in sorted(self.books.in_flight):
            self.books.end(session_id, Status.FAILED, time.monotonic_ns())
        self.books.enter(Phase.INIT, time.monotonic_ns())
        self.books.flush(time.monotonic_ns())


@dataclass
class Bill:
    """What becomes of a journal: the reports of a service, by period's end and tenant."""

    reports: dict[tuple[int, str], dict[str, Any]]
    allocated_ns: int
    by_tenant_ns: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for (_, tenant), report in self.reports.items():
            stated_ns = int(report["status"]["gpuNanoseconds"])
            self.by_tenant_ns[tenant] = self.by_tenant_ns.get(tenant, 0) + stated_ns


def publish(ledger: Ledger, books: Books, *, from_ns: int, until_ns: int, per_gpu_hour: str, of: Worker = POD) -> Bill:
    """Collect a sealed journal, close every period, and return the Final reports as the ledger keeps them.

    The container ran from `from_ns` to `until_ns`, as Kubernetes would say it: in whole seconds.
    """
    assert from_ns % SECOND_NS == until_ns % SECOND_NS == 0
    later_ns = until_ns + 7200 * SECOND_NS
    ledger.observe(of, [started("c", from_ns), ended("c", until_ns), gone(until_ns)], later_ns)
    page = books.reader.page("boot-1", 0, 5000)
    assert page is not None
    ledger.take(of, page, later_ns)
    rates = [{"gpuClass": of.gpu_class, "perGpuHour": per_gpu_hour}]
    spec = canonical_spec({"currency": "USD", "rates": rates})
    Closer(ledger, SECOND_NS).close_all(
        Pricing({}, {"default": ledger.keep_plan("default", 1, spec, from_ns)}), later_ns
    )
    found = {
        (end_ns, tenant): json.loads(body) for end_ns, tenant, body in ledger.final_reports(of.namespace, of.service)
    }
    return Bill(found, (until_ns - from_ns) * of.devices)


def part_of(step: Step, session_id: str) -> Part:
    """A session's only part in a step."""
    (part,) = [part for part in step.report.parts if part.session_id == session_id]
    return part
