"""The autoscaler of the real operator, with the chart's own rights, against a real API server and controller manager.

Kubelet and workers are stand-ins (rigs.standins): the queue is a number that the test sets.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from apiserver import Run, Server
from gpumeter_operator.adapters.kubernetes import DEPLOYMENTS, EVENTS, INFERENCE_SERVICES, PODS, SERVICES, Cluster
from gpumeter_operator.decide.crew import COST_DRAINING
from operatorrun import (
    OperatorProcess,
    condition,
    eventually,
    identity_of_the_chart,
    let_controllers_work,
    running_operator,
    service,
    status_of,
)
from rigs.standins import StandInKubelet, StandInWorkers

ADDRESS = "127.77.0.9"
NAME = "smollm2"


@pytest.fixture(scope="module")
def operator(
    server: object, plane: Path, kubectl: Run, helm: Run, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    folder = tmp_path_factory.mktemp("operator")
    let_controllers_work(kubectl)
    with running_operator(identity_of_the_chart(kubectl, helm, plane, folder), folder) as one:
        yield one
        assert "Traceback" not in one.log.read_text(), one.log.read_text()


@pytest.fixture
async def cluster(operator: OperatorProcess, plane: Path) -> AsyncIterator[Cluster]:
    one = Cluster.connect(plane)
    yield one
    await one.close()


@pytest.fixture
async def workers() -> AsyncIterator[StandInWorkers]:
    one = StandInWorkers(ADDRESS, 8000)
    await one.start()
    yield one
    await one.close()


@pytest.fixture
async def kubelet(server: Server, cluster: Cluster) -> AsyncIterator[StandInKubelet]:
    one = StandInKubelet(server, cluster, lambda name: ADDRESS, ready_max=4)
    task = asyncio.create_task(one.run())
    yield one
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_queue_makes_workers_and_its_end_drains_them_one_by_one_before_they_go(
    cluster: Cluster, namespace: str, workers: StandInWorkers, kubelet: StandInKubelet
) -> None:
    behavior = {"scaleDown": {"stabilizationWindowSeconds": 0}}
    scaling = {"minReplicas": 1, "maxReplicas": 2, "targetQueueLength": 4, "behavior": behavior}
    await cluster.apply(service(namespace, NAME, scaling=scaling), field_manager="a-user")

    async def replicas() -> int:
        found = await cluster.get(DEPLOYMENTS, NAME, namespace)
        return int(found["spec"]["replicas"]) if found else -1

    async def ready(number: int) -> bool:
        return (await status_of(cluster, namespace)).get("readyReplicas") == number

    await eventually(lambda: ready(1), timeout_s=30)
    workers.waiting, workers.running = 20, 64

    async def two() -> bool:
        return await replicas() == 2 and await ready(2)

    await eventually(two, timeout_s=15)
    workers.waiting, workers.running = 0, 3  # each still computes, so the one that is to go has to wait

    async def marked() -> str | None:
        for pod in await cluster.list(PODS, namespace):
            if pod["metadata"]["labels"]["gpumeter.io/draining"] == "true":
                cost = pod["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"]
                assert cost == str(COST_DRAINING)
                return str(pod["metadata"]["name"])
        return None

    name = await eventually(marked, timeout_s=15)
    found = await cluster.get(SERVICES, NAME, namespace)
    assert found is not None and found["spec"]["selector"]["gpumeter.io/draining"] == "false"
    assert await replicas() == 2, "nothing is deleted while requests run"
    workers.running = 0

    async def gone() -> bool:
        left = [pod["metadata"]["name"] for pod in await cluster.list(PODS, namespace)]
        return await replicas() == 1 and len(left) == 1 and name not in left

    await eventually(gone, timeout_s=15)

    async def told() -> bool:
        status = await status_of(cluster, namespace)
        history = status.get("scalingHistory") or []
        return len(history) == 2 and condition(status, "ScalingReady")["message"] == history[0]["message"]

    await eventually(told, timeout_s=10)
    history = (await status_of(cluster, namespace))["scalingHistory"]
    assert [(one["from"], one["to"], one["reason"]) for one in history] == [
        (2, 1, "QueueBelowTarget"),
        (1, 2, "QueueAboveTarget"),
    ]
    events = {(one["reason"], one["message"]) for one in await cluster.list(EVENTS, namespace)}
    assert {(one["reason"], one["message"]) for one in history} <= events
    await cluster.delete(INFERENCE_SERVICES, NAME, namespace)
