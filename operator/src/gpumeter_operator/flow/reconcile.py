"""One InferenceService: gather, decide, act.

Owns the order of things and what is told: status first, then log and event with the same reason. Level-based: every
call looks at the world anew and writes only the difference. Does not know kopf, nor how anything is decided.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, Manifest, Refused
from gpumeter_operator.adapters.mirror import version_of
from gpumeter_operator.adapters.operator_metrics import OperatorMetrics
from gpumeter_operator.adapters.packed import packed_workload, unpacked_workload
from gpumeter_operator.adapters.starting import Answer
from gpumeter_operator.decide import status as decide
from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.crew import is_marked
from gpumeter_operator.decide.development import development_problems
from gpumeter_operator.decide.events import event
from gpumeter_operator.decide.placement import placement_problems
from gpumeter_operator.decide.pods import PodState, belongs, describe, exists
from gpumeter_operator.decide.reasons import ORDINARY
from gpumeter_operator.decide.replicas import Replicas, decide_replicas, hindered
from gpumeter_operator.decide.spec import Problem, ServiceSpec, price_plan, read
from gpumeter_operator.decide.workload import Installation, Workload, build
from gpumeter_operator.flow.api import Api
from gpumeter_operator.flow.children import FIELD_MANAGER, Children
from gpumeter_operator.flow.fleet import Fleet

log = logging.getLogger(__name__)

# Looks at the same time. A thousand services created at once would queue in the API server, where each request's
# timeout runs; here they wait without one.
_PARALLEL_LOOKS = 16

# A service that was found well and of which nothing has changed is looked at again after this time all the same: what a
# worker says of itself, and what nobody thought of, are seen then.
CALM_NS = 60_000_000_000
GONE_NS = 3_600_000_000_000  # no mirror lags for an hour


@dataclass(slots=True)
class Known:
    """What is kept in memory of one service between two looks; losing it costs time, never truth."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    looked_ns: int = field(default_factory=time.monotonic_ns)
    waits: bool = False  # for its turn: others are being looked at
    ready: str | None = None  # status of Ready; None before it was decided
    well: bool = False  # the last look found the wanted workers, and all of them ready
    calm: tuple[Any, ...] | None = None  # what there was to see when a look found all well and nothing to write
    calm_ns: int = 0
    held_ns: int | None = None  # since when a status that only tells of progress waits
    workload: tuple[tuple[Any, ...], bytes] | None = None  # packed, with what it was built from
    version: int = 0  # of the newest copy of the service that was looked at
    problem: Problem | None = None  # why the last look could not write the Deployment


class Autoscaler(Protocol):
    """What a look at a service takes from the autoscaler: flow.scale.Scaler."""

    def replicas(self, service: Manifest, spec: ServiceSpec) -> Replicas | None:
        """How many workers the Deployment has; None where others say it."""
        ...

    def signs(self, service: Manifest) -> object:
        """What `replicas` goes by: equal as long as it says the same of the same spec."""
        ...

    def figures(self, service: Manifest) -> decide.Figures | None:
        """What the status shows of it; None before the workers were asked."""
        ...


class Reconciler:
    """Brings services to what their specs say, one look at a time."""

    def __init__(
        self,
        cluster: Api,
        fleet: Fleet,
        installation: Installation,
        master_key: bytes,
        metrics: OperatorMetrics,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        told: Callable[[str, str, bool], Answer] = lambda pod, address, serves: Answer(),
        autoscaler: Autoscaler | None = None,
        hold_ns: int = 0,
    ) -> None:
        """`told` gives what a worker last said of itself, by pod, address and whether it serves.

        `hold_ns` is how long a status waits for something better to tell, where it only tells how far a start is.
        """
        self._cluster = cluster
        self._fleet = fleet
        self._installation = installation
        self._master_key = master_key
        self._metrics = metrics
        self._clock = clock
        self._told = told
        self._autoscaler = autoscaler
        self._children = Children(cluster, fleet, on_write=lambda kind: metrics.writes.labels(kind=kind).inc())
        self.calm_ns = CALM_NS
        self.hold_ns = hold_ns
        self._known: dict[str, Known] = {}
        self._gone: dict[str, int] = {}  # uid of a service that was let go, and since when
        for value in ("True", "False", "Unknown"):
            metrics.services.labels(ready=value).set(0)
        self._turn = asyncio.Semaphore(_PARALLEL_LOOKS)
        self._progress_ns = time.monotonic_ns()  # when the last look at any service ended

    async def reconcile(self, service: Manifest) -> None:
        """Look at one service and write what differs. Raises Unreachable, or Refused for what should be tried again.

        A copy that is older than one that was looked at already is replaced by what the API server has now.
        """
        uid = service["metadata"]["uid"]
        if uid in self._gone:
            return
        known = self._known.setdefault(uid, Known())
        async with known.lock, self._its_turn(known):
            if uid in self._gone:
                return
            result, known.calm = "failed", None
            try:
                with self._metrics.reconcile_seconds.time():
                    current = await self._newest(service, known)
                    if current is None:
                        result = "settled"
                        return
                    seen = self._signs(current)
                    result = "changed" if await self._look(current, known) else "settled"
                if result == "settled" and known.well:
                    known.calm, known.calm_ns = seen, time.monotonic_ns()
                    known.workload = None  # not needed for a minute, and a tenth of what all objects of it take
            finally:
                self._metrics.reconciles.labels(result=result).inc()
                # Also after a failure: this age tells a frozen loop, which a restart cures; an API server that is away
                # is cured by waiting.
                known.looked_ns = self._progress_ns = time.monotonic_ns()

    async def _newest(self, service: Manifest, known: Known) -> Manifest | None:
        """What to look at; None where the service is gone, or goes.

        kopf's watch, the mirror and the autoscaler bring the same service, each by a way of its own, and wait for their
        turn: whoever comes with an older copy would write back what a user has edited since.
        """
        version = version_of(service)
        if version is None or version >= known.version:
            known.version = version or known.version
            return service
        metadata = service["metadata"]
        found = await self._cluster.get(INFERENCE_SERVICES, metadata["name"], metadata["namespace"])
        if found is None or found["metadata"]["uid"] != metadata["uid"] or "deletionTimestamp" in found["metadata"]:
            return None
        known.version = max(known.version, version_of(found) or 0)
        return found

    @asynccontextmanager
    async def _its_turn(self, known: Known) -> AsyncIterator[None]:
        known.waits = True
        try:
            await self._turn.acquire()
        finally:
            known.waits = False
        try:
            known.looked_ns = time.monotonic_ns()  # who waited long is not late the moment its look begins
            yield
        finally:
            self._turn.release()

    def is_due(self, service: Manifest) -> bool:
        """Whether a look may find something: not while all that it goes by is as it was when all was well."""
        known = self._known.get(service["metadata"]["uid"])
        if known is None or known.calm is None:
            return True
        now_ns = time.monotonic_ns()
        if now_ns - known.calm_ns > self.calm_ns or known.calm != self._signs(service):
            return True
        known.looked_ns = now_ns
        return False

    def problem(self, service: Manifest) -> Problem | None:
        """Why the last look at it could not write the Deployment; None where it could, or before there was one."""
        known = self._known.get(service["metadata"]["uid"])
        return None if known is None else known.problem

    async def leave(self, service: Manifest) -> None:
        """Look at a service no more, and return when the look under way has ended.

        A mirror that lags may still show it as it was before its deletion; a look at that would make it anew.
        """
        uid, now_ns = service["metadata"]["uid"], time.monotonic_ns()
        self._gone = {one: at_ns for one, at_ns in self._gone.items() if now_ns - at_ns < GONE_NS} | {uid: now_ns}
        async with self._known.get(uid, Known()).lock:
            self.drop(service["metadata"])

    def drop(self, metadata: Mapping[str, Any]) -> None:
        """Drop what is remembered of a service that is no more, by its metadata."""
        self._children.forget(identity({"metadata": metadata}))
        known = self._known.pop(metadata["uid"], None)
        if known is not None:
            self._count(known.ready, None)

    def overdue(self, limit_s: float) -> str | None:
        """A sentence when a service has not been looked at for too long.

        Thousands that wait for their turn, as after a takeover, are no frozen loop as long as looks at others end.
        """
        now_ns = time.monotonic_ns()
        late = [known for known in self._known.values() if (now_ns - self._counted_from_ns(known)) / 1e9 > limit_s]
        return f"{len(late)} services were not looked at for more than {limit_s:.0f} s." if late else None

    def _counted_from_ns(self, known: Known) -> int:
        return max(known.looked_ns, self._progress_ns) if known.waits else known.looked_ns

    def _signs(self, service: Manifest) -> tuple[Any, ...]:
        """All that a look goes by, except the time and what workers say of themselves."""
        metadata = service["metadata"]
        decided: tuple[Any, ...] = ()
        if self._autoscaler is not None:
            decided = self._autoscaler.signs(service), self._autoscaler.figures(service)
        mirrored = self._fleet.version(metadata["namespace"], metadata["name"]), self._fleet.has_pod_monitors
        return metadata["resourceVersion"], *mirrored, self._fleet.has_plan(price_plan(service)), *decided

    async def _look(self, service: Manifest, known: Known) -> bool:
        spec, problems = read(service)
        problems += placement_problems(spec, self._installation.gpu_classes)
        problems += development_problems(spec, self._installation.development_image)
        now = self._clock()
        pods = [pod for pod in self._fleet.pods_of(spec.namespace, spec.name) if belongs(pod, spec.uid) and exists(pod)]
        described = tuple(self._with_answer(describe(pod, spec.gpu_resource_name, now)) for pod in pods)
        replicas = decide_replicas(spec, self._autoscaler.replicas(service, spec) if self._autoscaler else None)
        template_hash, written = "", False
        if not problems:
            workload = self._workload(spec, replicas, known, marked=all(map(is_marked, pods)))
            template_hash = workload.template_hash
            stuck = any(pod.stuck for pod in described)  # a deleted Secret is one of the things that pods wait for
            written, problems = await self._children.bring(spec, workload, stuck=stuck, now_ns=time.monotonic_ns())
        elif spec.stopped:
            written = await self._children.stop(spec)
        known.problem = problems[0] if problems else None
        if problems and spec.scaling is not None and not spec.stopped:
            replicas = hindered(replicas, problems[0])
        seen = decide.Seen(
            spec=spec,
            replicas=replicas,
            problems=problems,
            template_hash=template_hash,
            deployment=self._fleet.deployment(spec.namespace, spec.name),
            pods=described,
            figures=self._autoscaler.figures(service) if self._autoscaler else None,
            has_plan=self._fleet.has_plan(spec.price_plan),
        )
        return await self._tell(service, seen, known, now) or written

    def _with_answer(self, pod: PodState) -> PodState:
        if not pod.address:
            return pod
        answer = self._told(pod.name, pod.address, pod.ready)
        if pod.ready:
            stand_in = Problem(*answer.stand_in) if answer.stand_in else None
            return replace(pod, stand_in=stand_in, capacity=answer.capacity)
        return replace(pod, loading=answer.progress)

    def _workload(self, spec: ServiceSpec, replicas: Replicas, known: Known, *, marked: bool) -> Workload:
        """Manifests are built once per generation: they are the costly part of a look that finds nothing to do.

        What of them stays until the next look is packed. As dicts of thousands that start they lie among what is kept
        for good, and the memory of neither can be given back when they are dropped.
        """
        monitored = self._fleet.has_pod_monitors
        key = (spec.generation, replicas.wanted, marked, monitored)
        if known.workload is not None and known.workload[0] == key:
            return unpacked_workload(known.workload[1])
        credentials = credentials_of(self._master_key, spec.uid)
        built = build(spec, replicas.wanted, self._installation, credentials, marked=marked, monitored=monitored)
        known.workload = key, packed_workload(built)
        return built

    async def _tell(self, service: Manifest, seen: decide.Seen, known: Known, now: datetime) -> bool:
        former = service.get("status") or {}
        status = decide.decide_status(seen, former, now)
        ready = status["conditions"][0]
        self._count(known.ready, ready["status"])
        known.ready = ready["status"]
        known.well = any((one["type"], one["status"]) == ("WorkloadsReady", "True") for one in status["conditions"])
        if self._waits(known, former, status) or not await write_status(self._cluster, service, status):
            return False
        self._metrics.writes.labels(kind="InferenceService").inc()
        await announce(self._cluster, service, former, ready, now)
        if (missing := decide.plan_missing(seen.spec, former, status)) is not None:
            await tell_event(self._cluster, service, missing, False, now)
        return True

    def _waits(self, known: Known, former: Manifest, status: dict[str, Any]) -> bool:
        """Whether a status may wait for the next look, which may have something better to tell.

        Such a service is not well, so the next round looks at it again; what comes in between is told at once.
        """
        now_ns = time.monotonic_ns()
        if decide.changes(former, status) and decide.is_only_progress(former, status):
            known.held_ns = known.held_ns or now_ns
            if now_ns - known.held_ns < self.hold_ns:
                return True
        known.held_ns = None
        return False

    def _count(self, former: str | None, now: str | None) -> None:
        if former != now:
            if former is not None:
                self._metrics.services.labels(ready=former).dec()
            if now is not None:
                self._metrics.services.labels(ready=now).inc()


def identity(service: Mapping[str, Any]) -> ServiceSpec:
    """Whose it is and how long its workers drain; the rest is as if the spec were empty.

    For a service that goes: whatever its spec has become, it must not keep the service from going.
    """
    drain = (service.get("spec") or {}).get("drain")
    return read({"metadata": service["metadata"], "spec": {"drain": drain}})[0]


async def write_status(cluster: Api, service: Manifest, status: dict[str, Any]) -> bool:
    """Patch what differs from the status that was read; False when nothing did, or when someone was faster.

    The resource version travels along: a status decided from an outdated object is refused and decided again from the
    next one, instead of overwriting what is newer.
    """
    patch = decide.changes(service.get("status") or {}, status)
    if not patch:
        return False
    metadata = service["metadata"]
    locked = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": patch}
    try:
        patched = await cluster.patch_status(INFERENCE_SERVICES, metadata["name"], metadata["namespace"], locked)
    except Refused as refusal:
        if refusal.status == 409:
            return False
        raise
    return patched is not None


async def announce(cluster: Api, service: Manifest, former: Manifest, ready: dict[str, Any], now: datetime) -> None:
    """Log and event, when Ready got another status or reason: the same words as in the condition."""
    before: Manifest = next((one for one in former.get("conditions") or [] if one["type"] == "Ready"), {})
    if (before.get("status"), before.get("reason")) == (ready["status"], ready["reason"]):
        return
    await tell_event(cluster, service, Problem(ready["reason"], ready["message"]), is_normal(ready), now)


async def tell_event(cluster: Api, service: Manifest, told: Problem, normal: bool, now: datetime) -> None:
    """One log line and one event. An event that is refused (a namespace that ends) is no reason to fail."""
    metadata = service["metadata"]
    level = logging.INFO if normal else logging.WARNING
    log.log(level, "%s/%s: %s: %s", metadata["namespace"], metadata["name"], told.reason, told.message)
    kind = "Normal" if normal else "Warning"
    try:
        await cluster.apply(event(service, kind, told.reason, told.message, now), field_manager=FIELD_MANAGER)
    except Refused as refusal:
        log.warning("%s/%s: no event: %s", metadata["namespace"], metadata["name"], refusal)


def is_normal(ready: dict[str, Any]) -> bool:
    """Whether a Ready condition is part of an ordinary life, so that no one need be warned."""
    return ready["reason"] in ORDINARY
