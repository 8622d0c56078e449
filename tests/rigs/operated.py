"""An operator that is killed before or after any of its requests, and the cluster that it leaves behind.

Owns the kills, one incarnation of the operator (the real flows on a cluster in memory, in the order in which kopf calls
them: the finalizer, the look; at the end the release, then the finalizer's removal), and what
controllers and kubelets do meanwhile. Time is made up.
"""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, Keep, Labels, Manifest, Manifests, Resource, whole
from gpumeter_operator.adapters.mirror import Mirror
from gpumeter_operator.adapters.operator_metrics import OperatorMetrics
from gpumeter_operator.decide.conditions import timestamp
from gpumeter_operator.decide.crew import Load
from gpumeter_operator.decide.names import DRAINING_LABEL, FINALIZER, SERVICE_LABEL
from gpumeter_operator.decide.spec import Problem
from gpumeter_operator.decide.workload import Installation
from gpumeter_operator.flow.fleet import Fleet
from gpumeter_operator.flow.reconcile import Reconciler, tell_event
from gpumeter_operator.flow.release import Releaser
from gpumeter_operator.flow.scale import Scaler
from rigs.sharedapi import BOOKKEEPING, SharedApi
from rigs.standins import AtDoor
from rigs.virtualtime import now_s

BEGUN = datetime(2026, 11, 21, 10, 0, 0, tzinfo=UTC)
INSTALLATION = Installation("worker:1", "IfNotPresent", "http://gateway")
KEY = b"k" * 32
NAMESPACE, NAME = "team-a", "smollm2"
READY_AFTER_S, DRAIN_S = 3.0, 4.0

T = TypeVar("T")


class Killed(BaseException):
    """kill -9: nothing that catches errors sees it."""


class Doomed:
    """A connection whose process dies before (`2 * n`) or after (`2 * n + 1`) its n-th request; None: it lives."""

    def __init__(self, api: SharedApi, point: int | None) -> None:
        self._api, self._point = api, point
        self.calls: list[str] = []
        self.dead = False

    async def _call(self, name: str, act: Callable[[], Awaitable[T]]) -> T:
        number = len(self.calls)
        self.calls.append(name)
        self._die(2 * number)
        done = await act()
        self._die(2 * number + 1)
        return done

    def _die(self, now: int | None = None) -> None:
        self.dead = self.dead or (now is not None and now == self._point)
        if self.dead:
            raise Killed

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest | None:
        return await self._call(f"get {resource.kind}", lambda: self._api.get(resource, name, namespace))

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Manifests:
        return await self._call(f"list {resource.kind}", lambda: self._api.list(resource, namespace, labels))

    async def list_at(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Labels | None = None,
        keep: Keep = whole,
    ) -> tuple[Manifests, str]:
        self._die()
        return await self._api.list_at(resource, namespace, labels, keep)

    async def watch(self, resource: Resource, namespace: str | None, labels: Labels | None, version: str) -> Any:
        async for change in self._api.watch(resource, namespace, labels, version):
            self._die()
            yield change

    async def apply(
        self, manifest: Manifest, *, field_manager: str, subresource: str | None = None, only_new: bool = False
    ) -> Manifest:
        return await self._call(
            f"apply {manifest['kind']}",
            lambda: self._api.apply(manifest, field_manager=field_manager, only_new=only_new),
        )

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest, *, subresource: str | None = None
    ) -> Manifest | None:
        return await self._call(
            f"patch {resource.kind}",
            lambda: self._api.patch(resource, name, namespace, patch, subresource=subresource),
        )

    async def patch_status(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest
    ) -> Manifest | None:
        return await self._call(
            f"patch status of {resource.kind}", lambda: self._api.patch_status(resource, name, namespace, patch)
        )

    async def delete(
        self, resource: Resource, name: str, namespace: str | None = None, *, uid: str | None = None
    ) -> None:
        await self._call(f"delete {resource.kind}", lambda: self._api.delete(resource, name, namespace, uid=uid))


class World:
    """The cluster with one service, its controllers and kubelets, and what its workers and gateway tell."""

    def __init__(self) -> None:
        self.api = SharedApi(lambda: timestamp(self.clock()))
        self.api.on_removed = self._removed
        self.waiting = 0
        self.wrongs: list[str] = []
        self.pods_max = 0
        self._made = 0

    def clock(self) -> datetime:
        return BEGUN + timedelta(seconds=now_s())

    def pods(self) -> Manifests:
        return [one for (kind, _, _), one in self.api.objects.items() if kind == "Pod"]

    def service(self) -> Manifest:
        return copy.deepcopy(self.api.objects["InferenceService", NAMESPACE, NAME])

    async def create(self, **spec: Any) -> None:
        whole = {"model": {"uri": "hf://o/n"}, **spec}
        metadata = {"namespace": NAMESPACE, "name": NAME, "uid": "u-1"}
        await self.api.put(
            {"apiVersion": "gpumeter.io/v1alpha1", "kind": "InferenceService", "metadata": metadata, "spec": whole}
        )

    async def edit(self, **spec: Any) -> None:
        await self.api.patch(INFERENCE_SERVICES, NAME, NAMESPACE, {"spec": spec})

    # What the autoscaler is told (flow.scale_ports.Loads and Doors).

    async def ask(self, workers: Mapping[str, str], within_s: float) -> None:
        pass

    def load(self, uid: str) -> Load | None:
        return Load(int(now_s() * 1_000), 0, 0)

    def silent_since(self, uid: str) -> int | None:
        return None

    def asked(self) -> Mapping[str, AtDoor]:
        return {f"{NAMESPACE}/{NAME}": AtDoor(self.waiting)} if self.waiting else {}

    def silent(self) -> tuple[str, ...]:
        return ()

    # What controllers and kubelets do.

    async def control(self) -> None:
        """Until cancelled."""
        while True:
            await self._step()
            await asyncio.sleep(0.5)

    async def _step(self) -> None:
        deployment = self.api.objects.get(("Deployment", NAMESPACE, NAME))
        for pod in [one for one in self.pods() if "deletionTimestamp" in one["metadata"]]:
            if self._age_s(pod, "deletionTimestamp") >= DRAIN_S:
                await self.api._drop(("Pod", NAMESPACE, pod["metadata"]["name"]))
        there = [one for one in self.pods() if "deletionTimestamp" not in one["metadata"]]
        wanted = int(deployment["spec"]["replicas"]) if deployment else 0
        for pod in sorted(there, key=_rank)[: max(0, len(there) - wanted)]:
            if deployment and _is_ready(pod) and pod["metadata"]["labels"].get(DRAINING_LABEL) != "true":
                self.wrongs.append(f"{pod['metadata']['name']} was deleted with requests in it")
            pod["metadata"]["deletionTimestamp"] = timestamp(self.clock())
            await self.api.put(pod)
        for _ in range(wanted - len(there)):
            await self._make(deployment or {})
        self.pods_max = max(self.pods_max, len(self.pods()))
        for pod in self.pods():
            if not _is_ready(pod) and self._age_s(pod, "creationTimestamp") >= READY_AFTER_S:
                conditions = [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}]
                running = [{"name": "main", "state": {"running": {}}, "ready": True}]
                status = {"phase": "Running", "conditions": conditions, "containerStatuses": running}
                await self.api.put({**pod, "status": status})

    async def _make(self, deployment: Manifest) -> None:
        self._made += 1
        template = copy.deepcopy(deployment["spec"]["template"])
        metadata = {**template["metadata"], "namespace": NAMESPACE, "name": f"w{self._made}"}
        spec = {**template["spec"], "nodeName": "node"}
        await self.api.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": {}})

    def _age_s(self, pod: Manifest, since: str) -> float:
        return (self.clock() - datetime.fromisoformat(pod["metadata"][since])).total_seconds()

    def _removed(self, item: Manifest) -> None:
        left = [one["metadata"]["name"] for one in self.pods()]
        if item["kind"] == "InferenceService" and left:
            self.wrongs.append(f"the service went before its workers {left}, with their last usage")


class Operator:
    """One incarnation; `round` raises Killed at its point."""

    def __init__(self, world: World, point: int | None = None) -> None:
        self.api = Doomed(world.api, point)
        self._fleet = Fleet(self.api)
        self._services = Mirror(self.api, INFERENCE_SERVICES)
        self._scaler = Scaler(
            self._services,
            self._fleet,
            world,
            world,  # type: ignore[arg-type]
            self.api,
            reconcile=self._reconcile,
            tell=partial(tell_event, self.api),
            problem=self._problem,
            clock=world.clock,
            clock_ms=lambda: int(now_s() * 1_000),
        )
        self._reconciler = Reconciler(
            self.api, self._fleet, INSTALLATION, KEY, OperatorMetrics(), clock=world.clock, autoscaler=self._scaler
        )
        self._releaser = Releaser(self.api, self._fleet, timedelta(seconds=60), clock=world.clock)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._services.run())
        await self._fleet.start()
        await self._services.synced()

    async def round(self) -> None:
        """Two seconds: kopf brings every service, the autoscaler looks."""
        await asyncio.sleep(2)
        for service in list(self._services.objects.values()):
            await self._bring(copy.deepcopy(service))
        await self._scaler.tick()
        await self._scaler.settle()
        if self.api.dead:  # in a task of the autoscaler's
            raise Killed

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._fleet.stop()

    async def _reconcile(self, service: Manifest) -> None:
        await self._reconciler.reconcile(service)

    def _problem(self, service: Manifest) -> Problem | None:
        return self._reconciler.problem(service)

    async def _bring(self, service: Manifest) -> None:
        metadata = service["metadata"]
        finalizers = metadata.get("finalizers") or []
        if "deletionTimestamp" in metadata:
            await self._scaler.release(service)
            await self._reconciler.leave(service)
            await self._releaser.release(service)
            await self.api.patch(INFERENCE_SERVICES, NAME, NAMESPACE, {"metadata": {"finalizers": []}})
        elif FINALIZER not in finalizers:
            await self.api.patch(INFERENCE_SERVICES, NAME, NAMESPACE, {"metadata": {"finalizers": [FINALIZER]}})
        else:
            await self._reconciler.reconcile(service)


async def settled(world: World, operator: Operator, rounds_max: int = 100) -> None:
    """Rounds until nothing was written for six of them: figures of a status change every ten seconds at most."""
    quiet, version = 0, -1
    for _ in range(rounds_max):
        await operator.round()
        quiet = quiet + 1 if world.api.version == version else 0
        version = world.api.version
        if quiet == 6:
            return
    raise AssertionError(f"not settled after {rounds_max} rounds")


def picture(world: World) -> dict[str, Any]:
    """All that is there, less what a restart may change: versions, times, and what the autoscaler told last."""
    found: dict[str, Any] = {}
    for (kind, namespace, name), item in world.api.objects.items():
        if kind == "Event":
            continue
        if kind == "Pod":
            labels = item["metadata"]["labels"]
            found.setdefault("pods", []).append((labels[SERVICE_LABEL], labels.get(DRAINING_LABEL), _is_ready(item)))
            continue
        metadata = {key: value for key, value in item["metadata"].items() if key not in BOOKKEEPING}
        status = dict(item.get("status") or {})
        status.pop("scalingHistory", None)
        if "conditions" in status:
            status["conditions"] = [_words(one) for one in status["conditions"]]
        found[f"{kind} {namespace}/{name}"] = {**item, "metadata": metadata, "status": status}
    return found


def _words(condition: Manifest) -> Manifest:
    silent = ("reason", "message") if condition["type"] == "ScalingReady" else ()
    return {key: value for key, value in condition.items() if key not in ("lastTransitionTime", *silent)}


def _is_ready(pod: Manifest) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _rank(pod: Manifest) -> tuple[bool, int, int]:
    """As a ReplicaSet deletes: not ready, lowest deletion cost, youngest."""
    annotations = pod["metadata"].get("annotations") or {}
    cost = int(annotations.get("controller.kubernetes.io/pod-deletion-cost", 0))
    return _is_ready(pod), cost, -int(pod["metadata"]["name"][1:])
