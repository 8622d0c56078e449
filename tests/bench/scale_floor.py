"""What the same control plane takes without an operator: the floor of bench.scale's time until all are Ready.

Owns the plain objects, who makes them, and their clock: for each service the Deployment and the Services that the
operator would make, or all that it would make, from the product's own manifests, without an owner. They are created
side by side by one client that looks at nothing and tells nothing, and the clock ends when every Deployment has its
worker ready. So what remains to the operator's figure is what custom resources cost: their finalizer, their status and
events, and the operator's own work on the same cores.
"""

import asyncio
import time
from contextlib import aclosing
from typing import Any

from bench.scale_processes import cpu_by_name, cpu_since
from bench.scale_world import PARALLEL, World, world
from gpumeter_operator.adapters.kubernetes import DEPLOYMENTS, Cluster
from gpumeter_operator.decide.access import Peers
from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Installation, build
from operatorrun import MASTER_KEY, PEERS

Manifest = dict[str, Any]

BARE = ("Service", "Deployment")
# As OperatorProcess is told by its environment.
INSTALLATION = Installation(
    worker_image="localhost/gpumeter-worker:test",
    worker_image_pull_policy="IfNotPresent",
    gateway_url="http://gpumeter-gateway.gpumeter-system.svc",
    peers=Peers(tuple(PEERS["http"]), tuple(PEERS["usage"])),
)


def floors(services: list[Manifest]) -> dict[str, dict[str, Any]]:
    """Seconds and CPU for Deployments and Services alone (`bare`), and for all that services own (`owned`).

    Each in a cluster of its own. `services` are the InferenceServices that the operator is given.
    """
    return {name: _floor(services, bare=name == "bare") for name in ("bare", "owned")}


def _floor(services: list[Manifest], *, bare: bool) -> dict[str, Any]:
    with world(len(services)) as one:
        made = [_plain(each, number, bare=bare) for number, each in enumerate(services)]
        before, begun_s = cpu_by_name(), time.monotonic()
        asyncio.run(_make_and_wait(one, made))
        return {"ready_s": time.monotonic() - begun_s, "cpu_s": cpu_since(before), "objects": len(made[0])}


def _plain(service: Manifest, number: int, *, bare: bool) -> list[Manifest]:
    """The objects of one service, the Deployment last."""
    spec, problems = read({**service, "metadata": {**service["metadata"], "uid": f"plain-{number}", "generation": 1}})
    assert not problems, problems
    workload = build(spec, 1, INSTALLATION, credentials_of(MASTER_KEY, spec.uid), monitored=False)
    found = []
    for manifest in (*workload.secrets, *workload.others):
        if bare and manifest["kind"] not in BARE:
            continue
        # An owner that is not there would have them collected.
        metadata = {name: value for name, value in manifest["metadata"].items() if name != "ownerReferences"}
        found.append({**manifest, "metadata": metadata})
    if bare:
        found[-1]["spec"]["template"]["spec"]["serviceAccountName"] = "default"
    return found


async def _make_and_wait(one: World, made: list[list[Manifest]]) -> None:
    cluster = Cluster.connect(one.kubeconfig)
    waiting = iter(made)

    async def some() -> None:
        for manifests in waiting:
            for manifest in manifests:
                await cluster.create(manifest)

    _, version = await cluster.list_at(DEPLOYMENTS)
    async with asyncio.TaskGroup() as group:
        group.create_task(_all_ready(cluster, version, len(made)))
        for _ in range(PARALLEL):
            group.create_task(some())
    await cluster.close()


async def _all_ready(cluster: Cluster, version: str, number: int) -> None:
    ready: set[tuple[str, str]] = set()
    async with asyncio.timeout(60 + number), aclosing(cluster.watch(DEPLOYMENTS, None, None, version)) as changes:  # type: ignore[type-var]
        async for _, item in changes:
            if ((item.get("status") or {}).get("readyReplicas") or 0) >= 1:
                ready.add((item["metadata"]["namespace"], item["metadata"]["name"]))
            if len(ready) == number:
                return
