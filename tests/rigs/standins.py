"""Stand-ins beside a real API server without nodes: a kubelet that makes pods ready at once, workers that tell a load
which the caller sets, and a gateway whose waiting room is a number.

Owns only what the real ones would tell the operator. Does not compute anything.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from apiserver import Server
from gpumeter_operator.adapters.kubernetes import PODS, Cluster
from gpumeter_operator.adapters.mirror import Mirror
from gpumeter_operator.decide.names import SERVICE_LABEL

NODE = "stand-in"


@dataclass
class AtDoor:
    waiting: int
    in_flight: int = 0


class StandInDoors:
    """What the gateways hold; `put` changes it and tells the operator, as a long poll that returns does."""

    def __init__(self, on_change: Callable[[Iterable[str]], None]) -> None:
        self._on_change = on_change
        self._asked: dict[str, AtDoor] = {}

    def asked(self) -> Mapping[str, AtDoor]:
        return self._asked

    def silent(self) -> tuple[str, ...]:
        return ()

    def overdue(self) -> str | None:
        return None

    async def run(self) -> None:
        await asyncio.Event().wait()

    def put(self, reference: str, waiting: int) -> None:
        if waiting:
            self._asked[reference] = AtDoor(waiting)
        else:
            self._asked.pop(reference, None)
        self._on_change([reference])


class StandInWorkers:
    """One HTTP server that answers for all workers on one address; the load is the same for all of them."""

    def __init__(self, address: str, port: int) -> None:
        self.address, self.port, self.waiting, self.running = address, port, 0, 0
        self.asked = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.address, self.port).start()

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        self.asked += 1
        # As long as a worker's own answer, whose histograms nobody reads here.
        filler = "".join(f'gpumeter_step_duration_seconds_bucket{{le="{one}"}} 0.0\n' for one in range(150))
        told = f"vllm:num_requests_waiting {self.waiting}\nvllm:num_requests_running {self.running}\n"
        return web.Response(text=filler + told)


class StandInKubelet:
    """Puts every pod on one made-up node and makes it ready, up to `ready_max` pods of a service."""

    def __init__(self, server: Server, cluster: Cluster, address_of: Callable[[str], str], ready_max: int = 1) -> None:
        self._server, self._cluster = server, cluster
        self._address_of, self._ready_max = address_of, ready_max
        self._changed = asyncio.Event()
        self.pods = Mirror(cluster, PODS, labels={SERVICE_LABEL: None}, on_change=self._changed.set)
        self._done: set[str] = set()

    async def run(self) -> None:
        await asyncio.gather(self.pods.run(), self._serve(), self._beat())

    async def _serve(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            for pod in list(self.pods.objects.values()):
                uid = pod["metadata"]["uid"]
                if uid in self._done or "deletionTimestamp" in pod["metadata"]:
                    continue
                if len(self._ready_of(pod)) < self._ready_max:
                    self._done.add(uid)
                    await asyncio.to_thread(self._make_ready, pod)

    def _ready_of(self, pod: dict[str, Any]) -> list[str]:
        name = pod["metadata"]["labels"][SERVICE_LABEL]
        return [
            one["metadata"]["uid"]
            for one in self.pods.objects.values()
            if one["metadata"]["labels"][SERVICE_LABEL] == name
            and one["metadata"]["uid"] in self._done
            and "deletionTimestamp" not in one["metadata"]
        ]

    def _make_ready(self, pod: dict[str, Any]) -> None:
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"name": NODE}}
        self._server.call("POST", f"{path}/binding", binding)
        now = self._server.call("GET", path).body
        if "status" not in now or "metadata" not in now or "spec" not in now:
            return
        now["status"] = {
            "phase": "Running",
            "podIP": self._address_of(now["metadata"]["labels"][SERVICE_LABEL]),
            "podIPs": [{"ip": self._address_of(now["metadata"]["labels"][SERVICE_LABEL])}],
            "conditions": [{"type": kind, "status": "True"} for kind in ("PodScheduled", "ContainersReady", "Ready")],
        }
        self._server.call("PUT", f"{path}/status", now)

    async def _beat(self) -> None:
        """A node that says nothing for 40 s is taken for dead, and its pods with it. A dead kubelet also ends pods."""
        await asyncio.to_thread(self._server.call, "POST", "/api/v1/nodes", {"metadata": {"name": NODE}})
        lease: dict[str, Any] = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": NODE, "namespace": "kube-node-lease"},
            "spec": {"holderIdentity": NODE, "leaseDurationSeconds": 3600},
        }
        await asyncio.to_thread(
            self._server.call, "POST", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", lease
        )
        while True:
            for pod in list(self.pods.objects.values()):
                if "deletionTimestamp" in pod["metadata"]:
                    metadata = pod["metadata"]
                    path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
                    await asyncio.to_thread(self._server.call, "DELETE", path, {"gracePeriodSeconds": 0})
            await asyncio.to_thread(self._renew)
            await asyncio.sleep(1)

    def _renew(self) -> None:
        path = f"/api/v1/nodes/{NODE}"
        node = self._server.call("GET", path).body
        if "metadata" not in node:
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        node["status"] = {
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "StandIn", "message": "", "lastHeartbeatTime": now}
            ]
        }
        self._server.call("PUT", f"{path}/status", node)
