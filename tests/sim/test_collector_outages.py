"""Worker, collector, API server and database each away for ten minutes: nothing lost, nothing doubled, the same bill,
and the status says who is missing."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from gpumeter_operator.adapters.kubernetes import Unreachable
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.collect import Collector
from gpumeter_operator.flow.rounds import CollectRound
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from rigs.ledger import (
    START_NS,
    TOKEN,
    Clock,
    FakeNetwork,
    FakeWorker,
    finals,
    inline,
    live,
    open_ledger,
    pod_manifest,
    service_manifest,
    worker,
)

TICK_NS = 20 * SECOND_NS
GRACE_NS = 12 * MINUTE_NS  # beyond every outage: all that comes late still comes in time
AWAY_NS = 10 * MINUTE_NS
END_NS = START_NS + 15 * MINUTE_NS


class Town:
    """Three workers, their pods, and a collector, on a virtual clock. What the workers do never depends on the rest."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock, self.network = path, Clock(), FakeNetwork(page_limit=50)
        self.fakes = [FakeWorker(worker(number), START_NS + SECOND_NS) for number in (1, 2, 3)]
        self.randoms = [random.Random(number) for number in (1, 2, 3)]
        self.pods: dict[tuple[str, str], dict[str, Any]] = {}
        for number, fake in enumerate(self.fakes):
            self.network.add(f"10.0.0.{number}", fake)
            self.pods["team-a", fake.identity.pod] = pod_manifest(
                fake.identity, f"10.0.0.{number}", (f"c{number}", START_NS, None)
            )
        self.services = {("team-a", "smollm2"): service_manifest(self.fakes[0].identity)}
        self.away, self.told, self.problems = "", set[str](), set[str]()
        self.reports: list[dict[str, Any]] = []
        self.removed: list[dict[str, Any]] = []
        self.recovered = False
        self.begin()

    def begin(self) -> None:
        """A collector's process starts."""
        self.ledger = open_ledger(self.path, Granularity.FIVE_MINUTES)
        event.listen(self.ledger.engine, "before_cursor_execute", self.database)
        self.collector = Collector(self.ledger, self.network, inline, self.clock)
        self.closer = Closer(self.ledger, GRACE_NS)
        self.round = CollectRound(
            self.ledger,
            self.collector,
            inline,
            pods=lambda: self.pods,
            services=lambda: self.services,
            lookup=self.lookup,
        )
        self.recovered = False

    def database(self, *_: object) -> None:
        if self.away == "database":
            raise OperationalError("", {}, Exception("the connection was refused"))

    async def lookup(self, namespace: str, name: str) -> dict[str, Any] | None:
        if self.away == "API server":
            raise Unreachable("the API server did not answer")
        return self.pods.get((namespace, name))

    async def tick(self) -> None:
        self.clock.now_ns += TICK_NS
        for fake, random_ in zip(self.fakes, self.randoms, strict=True):
            if not fake.boot.sealed:
                live(fake, random_, self.clock() - SECOND_NS)
        self.network.workers.pop("10.0.0.0", None)
        if self.away != "worker":
            self.network.workers["10.0.0.0"] = self.fakes[0]
        if self.away == "collector":
            return
        try:
            if not self.recovered:
                await self.round.recover(self.clock())
                self.recovered = True
            while self.removed:
                self.round.removed(self.removed.pop(), self.clock())
            await self.round.run(lambda _: TOKEN, self.clock())
            await self.collector.finish()
            if self.clock() % (3 * TICK_NS) == 0:
                self.reports = self.closer.close_all(Pricing({}, {}), self.clock())
        except LedgerUnavailable as problem:
            self.told.add(str(problem))
        except Unreachable as problem:
            self.told.add(str(problem))
        self.problems.add(self.collector.counters.ledger_problem)

    async def leave(self) -> None:
        """Every worker drains; its pod goes when its seal is acknowledged, as after a grace period that suffices."""
        for number, fake in enumerate(self.fakes):
            live(fake, self.randoms[number], self.clock())
            fake.seal()
        await self.tick()
        for number, fake in enumerate(self.fakes):
            assert fake.boot.acknowledged_seq == len(fake.boot.links)
            lives = (f"c{number}", START_NS, self.clock())
            self.removed.append(pod_manifest(fake.identity, "", lives))
            del self.pods["team-a", fake.identity.pod]
        while self.clock() < END_NS + GRACE_NS:
            await self.tick()


async def history(path: Path, who: str, during: Callable[[Town], None] | None = None) -> Town:
    town = Town(path)
    away_from_ns = START_NS + 2 * MINUTE_NS + 20 * SECOND_NS
    while town.clock() < END_NS:
        was, town.away = town.away, who if away_from_ns <= town.clock() < away_from_ns + AWAY_NS else ""
        if was == "collector" and not town.away:
            town.ledger.close()
            town.begin()
        await town.tick()
        if during and town.clock() == away_from_ns + AWAY_NS:
            during(town)
    await town.leave()
    return town


def the_worker_is_named(town: Town) -> None:
    fake = town.fakes[0]
    assert list(town.collector.silent) == [fake.identity.worker_uid]
    assert town.collector.silent[fake.identity.worker_uid].since_ns < town.clock() - 9 * MINUTE_NS
    closing = [one for one in town.reports if one["status"]["phase"] == Phase.CLOSING]
    assert closing, "a period that a worker is missing from was closed"
    missing = [each for one in closing for each in one["status"]["completeness"]["missing"]]
    assert {each["pod"] for each in missing} == {fake.identity.pod}
    assert "cannot be reached" in missing[0]["message"]
    assert all(other.boot.acknowledged_seq == len(other.boot.links) for other in town.fakes[1:])


def the_journals_wait(town: Town) -> None:
    assert all(fake.boot.acknowledged_seq < len(fake.boot.links) for fake in town.fakes)


def the_others_go_on(town: Town) -> None:
    assert all(fake.boot.acknowledged_seq == len(fake.boot.links) for fake in town.fakes)


def the_database_is_named(town: Town) -> None:
    the_journals_wait(town)
    assert any("the connection was refused" in told for told in town.told | town.problems)


async def test_everybody_may_be_away_for_ten_minutes_and_the_bill_is_the_same(tmp_path: Path) -> None:
    undisturbed = await history(tmp_path / "whole.db", "nobody")
    bill = finals(undisturbed.ledger)
    assert len({end_ns for end_ns, _ in bill}) == 4
    assert not any(report["status"]["completeness"]["missing"] for report in bill.values())
    for who, during in (
        ("worker", the_worker_is_named),
        ("collector", the_journals_wait),
        ("API server", the_others_go_on),
        ("database", the_database_is_named),
    ):
        town = await history(tmp_path / f"{who}.db", who, during)
        assert finals(town.ledger) == bill, who
        for fake in town.fakes:
            held = [(seq, digest) for _, seq, digest, *_ in town.ledger.bodies(fake.identity.worker_uid)]
            assert held == [(seq, link.hash) for seq, link in enumerate(fake.boot.links, start=1)]
        assert town.ledger.alarms() == [], who


async def test_a_pod_that_terminates_is_pulled_until_its_seal_is_committed_and_before_all_others(
    tmp_path: Path,
) -> None:
    town = Town(tmp_path / "ledger.db")
    await town.tick()
    asked: list[str] = []
    last = town.fakes[2]
    town.pods["team-a", last.identity.pod]["metadata"]["deletionTimestamp"] = "2026-11-21T10:10:00Z"

    class Watched(FakeNetwork):
        async def status(self, target: Target):  # type: ignore[no-untyped-def]
            asked.append(target.host)
            return await town.network.status(target)

    watched = Watched()
    watched.workers = town.network.workers
    town.collector._workers = watched
    last.seal()
    await town.tick()
    assert asked[0] == "10.0.0.2"
    assert last.boot.acknowledged_seq == len(last.boot.links)


def on_a_lost_node(town: Town) -> None:
    """Kubernetes has marked the pod, and its node never says that it ended."""
    town.pods["team-a", "smollm2-1"]["metadata"]["deletionTimestamp"] = "2026-11-21T10:04:00Z"


def node_deleted(town: Town) -> None:
    """The pod collector removes the pod while its container seems to run."""
    pod = town.pods.pop(("team-a", "smollm2-1"))
    town.removed.append(pod)


@pytest.mark.parametrize("loss", [on_a_lost_node, node_deleted])
async def test_a_pod_whose_node_is_lost_is_allocated_until_it_was_heard_last_and_not_for_ever(
    loss: Callable[[Town], None], tmp_path: Path
) -> None:
    town = Town(tmp_path / "ledger.db")
    while town.clock() < START_NS + 2 * MINUTE_NS:
        await town.tick()
    heard_ns = town.fakes[0].frontier_ns
    town.away = "worker"
    while town.clock() < START_NS + 10 * MINUTE_NS:
        await town.tick()
    loss(town)
    for _ in range(3):
        await town.tick()
    pod = town.ledger.pod("pod-uid-1")
    assert pod is not None
    assert (pod.spans[0].ended_ns, pod.spans[0].end_known) == (heard_ns, False)
    others = [town.ledger.pod(f"pod-uid-{number}") for number in (2, 3)]
    assert all(other and other.spans[0].ended_ns is None for other in others)


async def test_a_pod_that_ends_slowly_while_its_worker_answers_is_no_lost_node(tmp_path: Path) -> None:
    town = Town(tmp_path / "ledger.db")
    on_a_lost_node(town)
    while town.clock() < START_NS + 10 * MINUTE_NS:
        await town.tick()
    pod = town.ledger.pod("pod-uid-1")
    assert pod is not None and pod.spans[0].ended_ns is None
    assert town.ledger.alarms() == []
