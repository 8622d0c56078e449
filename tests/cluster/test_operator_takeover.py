"""Two operators on a real API server, as real processes with the chart's rights: who acts, and who takes over.

`make bench-takeover` measures how long that takes; here it only has to happen, and in order.
"""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from apiserver import Run
from gpumeter_operator.adapters.kubernetes import (
    DEPLOYMENTS,
    EVENTS,
    INFERENCE_SERVICES,
    LEASES,
    POD_DISRUPTION_BUDGETS,
    PODS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Cluster,
    Manifest,
)
from gpumeter_operator.decide.names import SERVICE_LABEL
from operatorrun import (
    NAMESPACE,
    OperatorProcess,
    eventually,
    identity_of_the_chart,
    let_controllers_work,
    service,
    status_of,
)
from rigs.cutline import CutLine, address_of

LEASE = "gpumeter-operator"
NAME = "smollm2"
KILLS = 5
OWNED = {DEPLOYMENTS: 1, SERVICES: 2, SERVICE_ACCOUNTS: 1, POD_DISRUPTION_BUDGETS: 1, SECRETS: 1}


@pytest.fixture(scope="module")
def line(plane: Path) -> Iterator[CutLine]:
    one = CutLine(address_of(plane))
    yield one
    one.cut()


@pytest.fixture(scope="module")
def rights(server: object, kubectl: Run, helm: Run, plane: Path, line: CutLine) -> Iterator[Path]:
    """The operator's own kubeconfig, over the line that can be cut."""
    with TemporaryDirectory() as folder:
        yield line.kubeconfig(_identity(kubectl, helm, plane, Path(folder)), Path(folder) / "over-the-line")


def _identity(kubectl: Run, helm: Run, plane: Path, folder: Path) -> Path:
    let_controllers_work(kubectl)
    return identity_of_the_chart(kubectl, helm, plane, folder)


@pytest.fixture
def crew(rights: Path, tmp_path: Path) -> Iterator["Crew"]:
    with ExitStack() as ends:
        yield Crew(rights, tmp_path, ends)


@pytest.fixture
async def cluster(server: object, plane: Path) -> AsyncIterator[Cluster]:
    one = Cluster.connect(plane)
    yield one
    await one.close()


class Crew:
    """Operators of this test; all of them have ended afterwards."""

    def __init__(self, rights: Path, folder: Path, ends: ExitStack) -> None:
        self._rights, self._folder, self._ends = rights, folder, ends

    def start(self, *, acts: bool = False) -> OperatorProcess:
        one = self.begin()
        one.start(acts=acts)
        return one

    def begin(self) -> OperatorProcess:
        one = OperatorProcess(self._rights, self._folder)
        self._ends.callback(lambda: one.runs and one.stop(signal.SIGKILL))
        return one


async def holder(cluster: Cluster) -> str:
    lease = await cluster.get(LEASES, LEASE, NAMESPACE)
    return str(((lease or {}).get("spec") or {}).get("holderIdentity") or "")


async def give_back(cluster: Cluster) -> None:
    """What the passing of seven seconds does, without waiting for them."""
    if await cluster.get(LEASES, LEASE, NAMESPACE) is not None:
        await cluster.patch(LEASES, LEASE, NAMESPACE, {"spec": {"holderIdentity": ""}})


async def acts(operator: OperatorProcess, within_s: float) -> float:
    begun_s = time.monotonic()

    async def so() -> bool:
        return await asyncio.to_thread(lambda: operator.acts)

    await eventually(so, within_s)
    return time.monotonic() - begun_s


async def applied(cluster: Cluster, namespace: str, replicas: int, within_s: float = 20) -> None:
    async def so() -> bool:
        deployment = await cluster.get(DEPLOYMENTS, NAME, namespace)
        return deployment is not None and deployment["spec"]["replicas"] == replicas

    await eventually(so, within_s)


async def edit(cluster: Cluster, namespace: str, replicas: int) -> Manifest:
    return await cluster.apply(service(namespace, NAME, replicas=replicas), field_manager="a-user")


async def gone(cluster: Cluster, namespace: str) -> None:
    async def so() -> bool:
        for pod in await cluster.list(PODS, namespace):  # no kubelet ends them
            await cluster.delete(PODS, pod["metadata"]["name"], namespace)
        return await cluster.get(INFERENCE_SERVICES, NAME, namespace) is None

    await eventually(so)


async def test_who_stands_by_is_ready_and_writes_nothing_and_after_a_clean_stop_it_acts_at_once(
    crew: Crew, cluster: Cluster, namespace: str
) -> None:
    await give_back(cluster)
    first = crew.start(acts=True)
    second = crew.start()
    assert second.answer("/healthz") == (200, "ok\n")
    assert second.answer("/readyz") == (200, "ok\n"), "or helm --wait would wait for ever"
    assert not second.acts
    await edit(cluster, namespace, 1)
    await applied(cluster, namespace, 1)
    assert second.metric("gpumeter_operator_reconciles_total") == 0
    first.signal(signal.SIGTERM)
    assert await acts(second, 5) < 5, "the lease lasts 7 s: it was given back"
    assert await asyncio.to_thread(first.ended) == 0
    assert "LeaseReleased" in first.said
    assert "Traceback" not in first.said, first.said
    await edit(cluster, namespace, 2)
    await applied(cluster, namespace, 2)
    await cluster.delete(INFERENCE_SERVICES, NAME, namespace)
    await gone(cluster, namespace)
    assert await asyncio.to_thread(second.stop) == 0


async def test_killed_at_random_moments_nothing_is_lost_or_doubled(
    crew: Crew, cluster: Cluster, namespace: str
) -> None:
    chance = random.Random(6)
    await give_back(cluster)
    acting, spare = crew.start(acts=True), crew.start()
    for number in range(1, KILLS + 1):
        applied_by = await edit(cluster, namespace, number)
        await asyncio.sleep(chance.random() * 0.4)
        acting.stop(signal.SIGKILL)
        if number == 1:
            assert await acts(spare, 15) <= 10, "nobody helped: the lease ran out"
        else:
            await give_back(cluster)
        acting, spare = spare, crew.start()
        await applied(cluster, namespace, number)
    uid = applied_by["metadata"]["uid"]

    async def told() -> bool:
        return (await status_of(cluster, namespace)).get("observedGeneration") == applied_by["metadata"]["generation"]

    await eventually(told)
    for resource, count in OWNED.items():
        owned = await cluster.list(resource, namespace, {SERVICE_LABEL: NAME})
        assert len(owned) == count, resource.kind
        assert {one["metadata"]["ownerReferences"][0]["uid"] for one in owned} == {uid}

    async def all_pods() -> bool:
        return len(await cluster.list(PODS, namespace)) == KILLS

    await eventually(all_pods)
    events = [one for one in await cluster.list(EVENTS, namespace) if one["involvedObject"].get("uid") == uid]
    reasons = [(one["reason"], one["message"]) for one in events]
    assert sorted(reasons) == sorted(set(reasons)), "an event is not repeated"
    await cluster.delete(INFERENCE_SERVICES, NAME, namespace)
    await asyncio.sleep(chance.random() * 0.4)
    acting.stop(signal.SIGKILL)
    await give_back(cluster)
    await gone(cluster, namespace)
    assert await asyncio.to_thread(spare.stop) == 0


async def test_while_the_api_server_is_away_nobody_writes_who_stands_by_waits_and_then_acts(
    crew: Crew, cluster: Cluster, namespace: str, line: CutLine
) -> None:
    await give_back(cluster)
    first = crew.start(acts=True)
    second = crew.start()
    await edit(cluster, namespace, 1)
    await applied(cluster, namespace, 1)
    line.cut()
    try:
        assert await asyncio.to_thread(first.ended, 10) == 1
        assert "LeaseNotRenewed: The lease gpumeter-system/gpumeter-operator could not be renewed" in first.said
        await edit(cluster, namespace, 2)
        again = crew.begin()
        again.begin()  # as the kubelet starts it again
        assert second.answer("/healthz") == (200, "ok\n"), "a restart would cure nothing"
        assert again.runs
    finally:
        line.mend()
    await applied(cluster, namespace, 2, within_s=10)
    assert second.acts != again.acts
    for one in (again, second):
        assert await asyncio.to_thread(one.stop) == 0
    assert await holder(cluster) == "", "both have stopped"
