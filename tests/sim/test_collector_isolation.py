"""One boot, one pod or one write that goes wrong is that one's trouble, and nobody else's."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpumeter_operator.adapters.kubernetes import Unreachable
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.collect import Collector
from gpumeter_operator.flow.publish import Publisher
from gpumeter_operator.flow.rounds import CollectRound
from gpumeter_usage.page import JournalStatus
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import Account
from rigs.ledger import (
    START_NS,
    TOKEN,
    Clock,
    FakeNetwork,
    FakeWorker,
    inline,
    open_ledger,
    pod_manifest,
    service_manifest,
    started,
    worker,
)

NOW_NS = START_NS + 50 * SECOND_NS
Manifest = dict[str, Any]


def a_worker(number: int = 1) -> FakeWorker:
    fake = FakeWorker(worker(number), START_NS)
    fake.spend(Account.LOAD, START_NS + 10 * SECOND_NS)
    fake.serve(f"s-{number}", "acme", START_NS + 30 * SECOND_NS)
    return fake


def reasons(ledger: Ledger) -> list[str]:
    return [reason for reason, *_ in ledger.alarms()]


class Cluster:
    """Pods as a mirror shows them and as the API server knows them, and a collector that looks at both."""

    def __init__(self, path: Path) -> None:
        self.ledger = open_ledger(path)
        self.network = FakeNetwork()
        self.clock = Clock(NOW_NS)
        self.mirrored: dict[tuple[str, str], Manifest] = {}
        self.known: dict[tuple[str, str], Manifest] = {}
        self.reachable = True
        self.services: dict[tuple[str, str], Manifest] = {}
        self.restart()

    def restart(self) -> None:
        self.collector = Collector(self.ledger, self.network, inline, self.clock)
        self.round = CollectRound(
            self.ledger,
            self.collector,
            inline,
            pods=lambda: self.mirrored,
            services=lambda: self.services,
            lookup=self.lookup,
        )

    async def lookup(self, namespace: str, name: str) -> Manifest | None:
        if not self.reachable:
            raise Unreachable("the API server did not answer")
        return self.known.get((namespace, name))

    def add(self, fake: FakeWorker) -> Manifest:
        of, address = fake.identity, f"10.0.0.{len(self.known) + 1}"
        pod = pod_manifest(of, address, (f"c-{of.pod}", START_NS, None))
        self.mirrored["team-a", of.pod] = self.known["team-a", of.pod] = pod
        self.services["team-a", of.service] = service_manifest(of)
        self.network.add(address, fake)
        return pod

    async def look(self) -> None:
        await self.round.run(lambda _: TOKEN, self.clock())
        await self.collector.finish()

    def is_gone(self, fake: FakeWorker) -> bool:
        pods = {pod.worker.worker_uid: pod for pod in self.ledger.pods("team-a", "smollm2", 0)}
        return pods[fake.identity.worker_uid].gone


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "ledger.db")


def poisoned(fake: FakeWorker) -> str:
    fake.serve("s-x", "Not A Tenant", fake.frontier_ns + SECOND_NS)
    return "TenantInvalid"


def trimmed(fake: FakeWorker) -> str:
    """The ledger was restored from an older backup, and the worker is of a build that does not tell what goes on."""
    fake.tells_acknowledged = False
    fake.boot.trimmed = fake.boot.acknowledged_seq = 2
    return "AcknowledgedAhead"


@pytest.mark.parametrize("harm", [poisoned, trimmed])
async def test_a_boot_that_is_refused_leaves_the_next_one_collected_and_acknowledged(
    cluster: Cluster, harm: Callable[[FakeWorker], str]
) -> None:
    fake = a_worker()
    reason = harm(fake)
    fake.restart("boot-2", fake.frontier_ns + SECOND_NS)
    fake.spend(Account.IDLE, START_NS + 45 * SECOND_NS)
    cluster.add(fake)
    for _ in range(2):
        await cluster.look()
    assert [boot.boot_id for boot in cluster.ledger.boots(fake.identity.worker_uid)] == ["boot-2"]
    assert fake.boot.acknowledged_seq == len(fake.boot.links), "its lease would run out"
    assert reasons(cluster.ledger) == [reason]
    pod = cluster.ledger.not_gone()[0]
    assert pod.settled_ns == 0, "what the refused boot did is not known"
    assert "boot-1" in pod.problem or "410" in pod.problem


async def test_a_head_that_differs_holds_the_period_for_its_whole_grace(tmp_path: Path) -> None:
    ledger, fake = open_ledger(tmp_path / "ledger.db"), a_worker()
    fake.spend(Account.IDLE, NOW_NS)

    class Forked(FakeNetwork):
        async def status(self, target: Target) -> JournalStatus:
            status = await super().status(target)
            return replace(status, boots=tuple(replace(boot, head_hash="f" * 64) for boot in status.boots))

    network = Forked()
    target = network.add("10.0.0.1", fake)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    for _ in range(2):
        assert not await Collector(ledger, network, inline, Clock(NOW_NS)).pull(fake.identity, target)
    assert reasons(ledger) == ["ChainForked"], "one trouble is one alarm"
    ledger.settle(fake.identity.worker_uid, START_NS + 5 * MINUTE_NS)  # complete as it may seem otherwise
    reports = Closer(ledger, 10 * MINUTE_NS).close_all(Pricing({}, {}), START_NS + 70 * SECOND_NS)
    held = next(report for report in reports if report["spec"]["period"]["start"].endswith("10:00:00Z"))
    assert held["status"]["phase"] == Phase.CLOSING
    assert held["status"]["completeness"]["missing"][0]["reason"] == "ChainForked"


def with_endless_devices(pod: Manifest) -> None:
    pod["metadata"]["annotations"]["gpumeter.io/devices"] = "1" * 5000


def from_another_millennium(pod: Manifest) -> None:
    pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] = "9999-12-31T23:59:59Z"


def without_a_shape(pod: Manifest) -> None:
    pod["status"]["containerStatuses"] = ["main"]


@pytest.mark.parametrize("harm", [with_endless_devices, from_another_millennium, without_a_shape])
async def test_a_malformed_pod_among_good_ones_is_an_alarm_alive_and_removed(
    cluster: Cluster, harm: Callable[[Manifest], None]
) -> None:
    fakes = [a_worker(number) for number in (1, 2, 3)]
    pods = [cluster.add(fake) for fake in fakes]
    harm(pods[1])
    for _ in range(2):
        await cluster.look()
    assert [len(fake.acknowledgements) > 0 for fake in fakes] == [True, False, True]
    assert len(cluster.ledger.alarms()) == 1
    for fake, pod in zip(fakes, pods, strict=True):
        cluster.mirrored.pop(("team-a", fake.identity.pod))
        cluster.known.pop(("team-a", fake.identity.pod))
        cluster.round.removed(pod, NOW_NS)
    await cluster.look()
    assert cluster.is_gone(fakes[0]) and cluster.is_gone(fakes[2])


async def test_a_pod_that_lost_its_label_is_followed_until_it_is_gone(cluster: Cluster) -> None:
    fake = a_worker()
    pod = cluster.add(fake)
    await cluster.look()
    cluster.round.removed(cluster.mirrored.pop(("team-a", fake.identity.pod)), NOW_NS)
    fake.spend(Account.IDLE, NOW_NS)
    await cluster.look()
    assert not cluster.is_gone(fake)
    assert fake.boot.acknowledged_seq == len(fake.boot.links), "it is still collected from"
    assert reasons(cluster.ledger) == ["LabelRemoved"]

    cluster.restart()  # and so it is by a collector that starts anew
    await cluster.round.recover(NOW_NS)
    fake.spend(Account.IDLE, NOW_NS + SECOND_NS)
    await cluster.look()
    assert not cluster.is_gone(fake) and fake.boot.acknowledged_seq == len(fake.boot.links)

    cluster.known["team-a", fake.identity.pod] = {**pod, "metadata": {**pod["metadata"], "uid": "a namesake"}}
    cluster.clock.now_ns += 5 * SECOND_NS
    await cluster.look()
    assert cluster.is_gone(fake)
    assert cluster.ledger.pods("team-a", "smollm2", 0)[0].spans[0].ended_ns == NOW_NS + 5 * SECOND_NS


async def test_a_pod_that_cannot_be_looked_up_is_not_booked_as_gone_before_it_can(cluster: Cluster) -> None:
    fakes = [a_worker(1), a_worker(2)]
    for fake in fakes:
        cluster.add(fake)
    await cluster.look()
    cluster.round.removed(cluster.mirrored.pop(("team-a", fakes[0].identity.pod)), NOW_NS)
    del cluster.known["team-a", fakes[0].identity.pod]
    cluster.reachable = False
    fakes[1].spend(Account.IDLE, NOW_NS)
    await cluster.look()
    assert not cluster.is_gone(fakes[0])
    assert fakes[1].boot.acknowledged_seq == len(fakes[1].boot.links), "the others are collected from meanwhile"
    cluster.restart()
    with pytest.raises(Unreachable):
        await cluster.round.recover(NOW_NS)
    cluster.reachable = True
    await cluster.round.recover(NOW_NS)
    assert cluster.is_gone(fakes[0])


async def test_a_write_that_fails_leaves_no_other_running_into_the_next_round(tmp_path: Path) -> None:
    running: set[str] = set()
    release = asyncio.Event()

    class Reports:
        async def list(self, *_: object) -> list[Manifest]:
            return []

        async def apply(self, manifest: Manifest, *, field_manager: str, subresource: str | None = None) -> Manifest:
            name = manifest["metadata"]["name"]
            if name == "fails":
                release.set()
                raise Unreachable("the API server did not answer")
            running.add(name)
            await release.wait()
            await asyncio.sleep(0)
            running.discard(name)
            return manifest

    def report(name: str) -> Manifest:
        metadata = {"name": name, "namespace": "team-a"}
        return {"apiVersion": "v", "kind": "UsageReport", "metadata": metadata, "status": {"phase": "Open"}}

    publisher = Publisher(Reports(), open_ledger(tmp_path / "ledger.db"), inline)
    with pytest.raises(Unreachable):
        await publisher.publish([report("slow"), report("fails"), report("slower")], NOW_NS)
    assert running == set()
    assert publisher.written == 2
