"""A cluster on a made-up clock under the real autoscaler: Deployment, ReplicaSet, scheduler, workers and a gateway.

Owns how pods come and go (a ReplicaSet deletes as Kubernetes ranks: not ready, lowest deletion cost, youngest), how
long they take, who gets which request, and what may go wrong. The autoscaler is flow.scale.Scaler as the operator runs
it; the reconciler is a few lines, for all that it does here is to write what it is told.
"""

import asyncio
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from gpumeter_operator.adapters.kubernetes import Manifest, Refused, Resource, Unreachable
from gpumeter_operator.decide.conditions import timestamp
from gpumeter_operator.decide.crew import Load
from gpumeter_operator.decide.replicas import Replicas, hindered
from gpumeter_operator.decide.spec import Problem, is_stopped, read
from gpumeter_operator.flow.scale import Scaler

BEGUN = datetime(2026, 11, 21, 10, 0, 0, tzinfo=UTC)
REFERENCE = "team-a/m"


@dataclass
class AtDoor:
    waiting: int = 0
    in_flight: int = 0


@dataclass
class Pod:
    """One worker: its manifest, and the ends of what it computes."""

    manifest: Manifest
    ready_at_s: float
    ends_s: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)  # durations
    ended: int = 0
    silent: bool = False

    @property
    def name(self) -> str:
        name: str = self.manifest["metadata"]["name"]
        return name

    @property
    def ready(self) -> bool:
        return any(one["type"] == "Ready" and one["status"] == "True" for one in self.manifest["status"]["conditions"])

    @property
    def drains(self) -> bool:
        return bool(self.manifest["metadata"]["labels"]["gpumeter.io/draining"] == "true")

    @property
    def in_flight(self) -> int:
        return len(self.ends_s) + len(self.waiting)


class ScalingWorld:
    """One that scales: `spec` is its spec.scaling, `gpus` what the cluster has, `start_s` how long a worker loads."""

    def __init__(self, seed: int = 0, *, gpus: int = 20, start_s: float = 20, batch: int = 4, **spec: Any) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.gpus, self.start_s, self.batch, self.quota = gpus, start_s, batch, 1_000
        self.pods: list[Pod] = []
        self.at_door: list[float] = []
        self.others: dict[tuple[str, str], Manifest] = {}  # services beside it, which come first
        self.away = False  # the API server
        self.failure: Exception | None = None  # that nobody thought of, in the reconciler
        self.failures = 0
        self.problem: Problem | None = None  # why the reconciler does not write the Deployment
        self.problem_is_told = True
        self.answers: asyncio.Event | None = None  # until it is set, workers that are asked say nothing
        self.written: asyncio.Event | None = None  # until it is set, the reconciler's write takes
        self.gateway_silent = False
        self.asked_from_s = 0.0  # until then thousands of other workers are asked before ours
        self.events: list[tuple[str, str]] = []
        self.told_s: list[float] = []
        self.counted: list[str] = []
        self.cut: list[tuple[str, int]] = []  # a pod that was deleted with requests in it
        self.routed_to_marked = 0
        self.made = 0
        self.version = 0
        metadata = {"namespace": "team-a", "name": "m", "uid": "s-1", "generation": 1}
        scaling = {"minReplicas": 1, "maxReplicas": 8, **spec}
        self.service: Manifest = {
            "metadata": metadata,
            "spec": {"model": {"uri": "hf://o/n"}, "engine": {"maxBatchSize": batch}, "scaling": scaling},
        }
        self.replicas = max(int(scaling["minReplicas"]), 1)
        self.scaler = self._scaler()

    # What the autoscaler is given.

    @property
    def objects(self) -> Mapping[tuple[str, str], Manifest]:
        return {**self.others, ("team-a", "m"): self.service}

    def pods_of(self, namespace: str, name: str) -> list[Manifest]:
        return [pod.manifest for pod in self.pods]

    def deployment(self, namespace: str, name: str) -> Manifest:
        made = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: gpus"}
        short = len(self.pods) < self.replicas and len(self.pods) >= self.quota
        return {"spec": {"replicas": self.replicas}, "status": {"conditions": [made] if short else []}}

    async def ask(self, workers: Mapping[str, str], within_s: float) -> None:
        if self.answers is not None:
            await self.answers.wait()
        self._asked = {pod.manifest["metadata"]["uid"]: pod for pod in self.pods}

    def load(self, uid: str) -> Load | None:
        pod = next((one for one in self.pods if one.manifest["metadata"]["uid"] == uid), None)
        if pod is None or pod.silent or self.now_s < self.asked_from_s or not pod.ready:
            return None
        return Load(int(self.now_s * 1_000), len(pod.waiting), len(pod.ends_s), None, pod.ended)

    def silent_since(self, uid: str) -> int | None:
        return None if self.now_s < self.asked_from_s else int(self.asked_from_s * 1_000)

    def asked(self) -> Mapping[str, AtDoor]:
        in_flight = sum(pod.in_flight for pod in self.pods)
        return {REFERENCE: AtDoor(len(self.at_door), in_flight)} if self.at_door or in_flight else {}

    def silent(self) -> tuple[str, ...]:
        return ("A gateway has not answered.",) if self.gateway_silent else ()

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest, *, subresource: str | None = None
    ) -> Manifest | None:
        self._reach()
        pod = next((one for one in self.pods if one.name == name), None)
        if pod is None:
            return None
        for kind in ("labels", "annotations"):
            merged = {**pod.manifest["metadata"][kind], **patch["metadata"].get(kind, {})}
            pod.manifest["metadata"][kind] = {key: value for key, value in merged.items() if value is not None}
        self._touch(pod)
        return pod.manifest

    async def reconcile(self, service: Manifest) -> None:
        self._reach()
        if self.written is not None:
            await self.written.wait()
        if self.failure is not None:
            raise self.failure
        decided = self.scaler.replicas(service, read(service)[0])
        if decided is None:
            fixed = (service["spec"].get("replicas", 1), True, "FixedReplicas", "spec.replicas says it.")
            decided = Replicas(*((0, False, "Stopped", "It is stopped.") if is_stopped(service) else fixed))
        if self.problem is None:
            self.replicas = decided.wanted
        elif self.problem_is_told:
            decided = hindered(decided, self.problem)
        figures = self.scaler.figures(service)
        ready = {
            "type": "ScalingReady",
            "status": str(decided.followed),
            "reason": decided.reason,
            "message": decided.message,
        }
        service["status"] = {"conditions": [ready], "scalingHistory": list(figures.history) if figures else []}
        if figures is not None and figures.queue_length is not None:
            service["status"]["queueLength"] = figures.queue_length

    async def tell(self, service: Manifest, told: Problem, normal: bool, now: datetime) -> None:
        self.events.append((told.reason, told.message))
        self.told_s.append(self.now_s)

    # What happens.

    def restart(self) -> None:
        """The operator ends and another one begins, which knows nothing."""
        self.scaler = self._scaler()

    def arrive(self, durations_s: Iterable[float]) -> None:
        self.at_door.extend(durations_s)
        self._route()
        if self.at_door:
            self.scaler.wake([REFERENCE])

    async def step(self, seconds: float = 2.0) -> None:
        """Time passes for everybody, and then the autoscaler looks."""
        self.now_s += seconds
        for pod in self.pods:
            self._work(pod)
            if not pod.ready and self._is_placed(pod) and self.now_s >= pod.ready_at_s:
                self._set_ready(pod, True)
        self._control()
        self._route()
        await self.scaler.tick()
        await self.scaler.settle()
        self._control()

    async def run(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            await self.step()

    def ready(self) -> list[Pod]:
        return [pod for pod in self.pods if pod.ready]

    def mark_by_hand(self, pod: Pod) -> None:
        pod.manifest["metadata"]["labels"]["gpumeter.io/draining"] = "true"
        self._touch(pod)

    def flap(self, pod: Pod, ready: bool) -> None:
        self._set_ready(pod, ready)

    def _scaler(self) -> Scaler:
        return Scaler(
            self,
            self,  # type: ignore[arg-type]
            self,
            self,  # type: ignore[arg-type]
            self,
            reconcile=self.reconcile,
            tell=self.tell,
            problem=lambda service: self.problem if self.problem_is_told else None,
            count=self.counted.append,
            on_failure=self._count_failure,
            clock=lambda: BEGUN + timedelta(seconds=self.now_s),
            clock_ms=lambda: int(self.now_s * 1_000),
        )

    def _count_failure(self) -> None:
        self.failures += 1

    def _reach(self) -> None:
        if self.away:
            raise self.random.choice([Unreachable("no answer"), Refused(500, "InternalError", "etcd is away")])

    def _control(self) -> None:
        """The ReplicaSet's and the scheduler's part."""
        while len(self.pods) > self.replicas:
            self.pods.sort(key=self._rank)
            gone = self.pods.pop(0)
            if gone.in_flight:
                self.cut.append((gone.name, gone.in_flight))
        while len(self.pods) < min(self.replicas, self.quota):
            self._make()
        for pod in self.pods:
            if not self._is_placed(pod) and sum(map(self._is_placed, self.pods)) < self.gpus:
                pod.manifest["spec"]["nodeName"] = "node"
                pod.manifest["status"]["conditions"] = []
                pod.ready_at_s = self.now_s + self.start_s
                self._touch(pod)

    @staticmethod
    def _rank(pod: Pod) -> tuple[bool, bool, int, float]:
        cost = int(pod.manifest["metadata"]["annotations"].get("controller.kubernetes.io/pod-deletion-cost", 0))
        return "nodeName" in pod.manifest["spec"], pod.ready, cost, -int(pod.name[1:])

    def _make(self) -> None:
        self.made += 1
        message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
        unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        manifest = {
            "metadata": {
                "name": f"w{self.made}",
                "namespace": "team-a",
                "uid": f"u{self.made}",
                "labels": {"gpumeter.io/inferenceservice": "m", "gpumeter.io/draining": "false"},
                "annotations": {"gpumeter.io/service-uid": "s-1"},
                "creationTimestamp": timestamp(BEGUN + timedelta(seconds=self.now_s)),
            },
            "spec": {},
            "status": {"phase": "Pending", "podIP": "10.0.0.1", "conditions": [unplaced]},
        }
        pod = Pod(manifest, 0)
        self._touch(pod)
        self.pods.append(pod)

    def _set_ready(self, pod: Pod, ready: bool) -> None:
        pod.manifest["status"] = {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "conditions": [{"type": "Ready", "status": str(ready)}],
        }
        self._touch(pod)

    def _touch(self, pod: Pod) -> None:
        self.version += 1
        pod.manifest["metadata"]["resourceVersion"] = str(self.version)

    @staticmethod
    def _is_placed(pod: Pod) -> bool:
        return "nodeName" in pod.manifest["spec"]

    def _work(self, pod: Pod) -> None:
        before = len(pod.ends_s)
        pod.ends_s = [end for end in pod.ends_s if end > self.now_s]
        pod.ended += before - len(pod.ends_s)
        while pod.waiting and len(pod.ends_s) < self.batch:
            pod.ends_s.append(self.now_s + pod.waiting.pop(0))

    def _route(self) -> None:
        routed = [pod for pod in self.pods if pod.ready and not pod.drains]
        while routed and self.at_door:
            pod = min(routed, key=lambda one: one.in_flight)
            self.routed_to_marked += pod.drains
            pod.waiting.append(self.at_door.pop(0))
            self._work(pod)


def run(world: ScalingWorld, seconds: float) -> None:
    """For tests without a loop of their own."""
    asyncio.run(world.run(seconds))
