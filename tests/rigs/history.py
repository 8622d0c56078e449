"""A day in the life of a cluster, made up from a seed: journals of many pods, and the ledger that is made of them.

Owns the history and the two ways in which it reaches a ledger: in order, and as bad networks and restarts have it. What
both must give is the same bytes of every report.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from gpumeter_operator.adapters.ledger import rollups
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.accept import PageRefused
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.page import Page
from gpumeter_usage.period import DAY_NS, MINUTE_NS, SECOND_NS, Granularity, day_of, month_of
from gpumeter_usage.record import Account, Status
from rigs.ledger import START_NS, FakeWorker, ended, gone, open_ledger, started

HOUR_NS = 60 * MINUTE_NS
DAY_NS_START = day_of(START_NS).start_ns
END_NS = DAY_NS_START + DAY_NS
SPEC = b'{"currency":"USD","rates":[{"gpuClass":"h100","perGpuHour":"1.234567"}]}'
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Life:
    """A pod of the history, with its container's times."""

    fake: FakeWorker
    started_ns: int
    ended_ns: int

    @property
    def identity(self) -> Worker:
        return self.fake.identity


def history(seed: int, *, services: int, tenants: int, sessions_per_hour: int = 12) -> list[Life]:
    """24 hours from midnight UTC: of each service a pod that lives all day and crashes once, and one of some hours."""
    random_, lives = random.Random(seed), []
    for number in range(services):
        for kind in range(2):
            lives.append(_life(random_, number, kind, tenants, sessions_per_hour))
    return lives


def _life(random_: random.Random, service: int, kind: int, tenants: int, sessions_per_hour: int) -> Life:
    name = f"model-{service:02d}"
    identity = Worker(f"uid-{service}-{kind}", "team-a", name, "svc", name, "h100", 1, f"{name}-{kind}")
    begin_ns = DAY_NS_START + (0 if kind == 0 else random_.randrange(20) * HOUR_NS + 17 * SECOND_NS)
    end_ns = END_NS if kind == 0 else begin_ns + random_.randrange(1, 4) * HOUR_NS
    fake = FakeWorker(identity, begin_ns + random_.randrange(SECOND_NS))
    crash_ns = begin_ns + random_.randrange(end_ns - begin_ns) if kind == 0 else end_ns
    session = 0
    while fake.frontier_ns < end_ns:
        idle_ns = random_.randrange(1, 2 * HOUR_NS // sessions_per_hour)
        fake.spend(Account.IDLE, min(end_ns, fake.frontier_ns + idle_ns))
        if fake.frontier_ns >= crash_ns:
            fake.restart("boot-2", min(end_ns, fake.frontier_ns + 3 * SECOND_NS))
            crash_ns = END_NS + 1
        until_ns = min(end_ns, fake.frontier_ns + random_.randrange(1, 30 * SECOND_NS))
        session += 1
        status = random_.choice((Status.FINISHED, Status.CANCELLED, Status.FAILED))
        tenant = f"tenant-{random_.randrange(tenants):02d}"
        fake.serve(f"s-{session}", tenant, until_ns, status, random_.randrange(1, 9))
    fake.seal()
    return Life(fake, begin_ns, end_ns)


def ledger_of(path: Path, lives: list[Life], chaos: random.Random | None, tell: Tell = lambda _: None) -> str:
    """A digest of all reports that a ledger makes of this history: hours, days and months of all services.

    With `chaos` the pages come shuffled, cut anywhere and a third of them twice, and the collector starts anew between
    its rounds, which are at times of their own.
    """
    ledger = open_ledger(path, Granularity.HOUR)
    ledger.keep_plan("default", 1, SPEC, DAY_NS_START)
    for life in chaos.sample(lives, k=len(lives)) if chaos else lives:
        events = [started("c", life.started_ns), ended("c", life.ended_ns), gone(life.ended_ns)]
        ledger.observe(life.identity, chaos.sample(events, k=3) if chaos else events, life.ended_ns)
    pages = [(life.identity, page) for life in lives for page in _pages(life.fake, chaos)]
    if chaos:
        pages += chaos.sample(pages, k=len(pages) // 3)
        chaos.shuffle(pages)
    _deliver(ledger, pages)
    tell(f"{path.stem}: {len(pages)} pages are in the ledger")
    closer = Closer(ledger, 10 * MINUTE_NS)
    for now_ns in _rounds(chaos):
        closer.close_all(Pricing({}, {}), now_ns)
        if chaos:
            closer = Closer(ledger, 10 * MINUTE_NS)
    tell(f"{path.stem}: closed")
    digest = sha256()
    for service in ledger.services():
        for rows in (
            ledger.final_reports(*service),
            rollups.rollup_bodies(ledger.engine, service, Granularity.DAY, 0),
            rollups.rollup_bodies(ledger.engine, service, Granularity.MONTH, 0),
        ):
            assert rows, "nothing was closed"
            for _, _, body in rows:
                digest.update(body)
    assert ledger.alarms() == []
    ledger.close()
    return digest.hexdigest()


def _rounds(chaos: random.Random | None) -> Iterable[int]:
    last_ns = month_of(END_NS).end_ns + HOUR_NS
    if chaos is None:
        return [last_ns]
    return [*sorted(chaos.randrange(DAY_NS_START, END_NS + 4 * HOUR_NS) for _ in range(12)), last_ns]


def _pages(fake: FakeWorker, chaos: random.Random | None) -> list[Page]:
    pages = []
    for boot in fake.boots:
        after = 0
        while after < len(boot.links):
            size = chaos.randrange(1, 900) if chaos else 5000
            pages.append(fake.page(boot.boot_id, after, size))
            after += size
    return pages


def _deliver(ledger: Ledger, waiting: list[tuple[Worker, Page]]) -> None:
    while waiting:
        early = []
        for identity, page in waiting:
            try:
                ledger.take(identity, page, END_NS)
            except PageRefused as refusal:
                assert refusal.reason == "SequenceGap", refusal
                early.append((identity, page))
        assert len(early) < len(waiting)
        waiting = early
