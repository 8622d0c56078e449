"""The autoscaler's loop: asks all workers every two seconds, decides about every service, and acts.

Owns the order (gather, decide, act), what is held of a service between two looks, and when something is told. One loop
over mirrors for all services: a thousand timers would cost more than a thousand decisions. It writes marks on pods and
nothing else: the Deployment has one writer, the reconciler, which asks here for the number and is called when it
changes. Does not know how loads and waiting rooms are read, and decides nothing itself.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from gpumeter_operator.adapters.kubernetes import PODS, Manifest, Refused, Unreachable
from gpumeter_operator.decide.autoscale import AT_ZERO, STEADY, Decision, Memory, Sight, Worker, decide
from gpumeter_operator.decide.conditions import timestamp
from gpumeter_operator.decide.crew import COST_DRAINING, COST_LEAVING, Door, Load, Replica, is_former, replica_of
from gpumeter_operator.decide.drain import Plan, plan
from gpumeter_operator.decide.names import (
    DELETION_COST_ANNOTATION,
    DRAINING_LABEL,
    DRAINING_SINCE_ANNOTATION,
    TEMPLATE_ANNOTATION,
)
from gpumeter_operator.decide.pods import belongs, describe
from gpumeter_operator.decide.replicas import Replicas, at_first
from gpumeter_operator.decide.spec import Problem, ServiceSpec, is_stopped, read
from gpumeter_operator.decide.status import Figures, replica_failure
from gpumeter_operator.flow.fleet import Fleet
from gpumeter_operator.flow.scale_ports import Doors, Loads, Marks, Services

log = logging.getLogger(__name__)

EVERY_S = 2.0
ANSWERS_WITHIN_S = 1.0  # of the two seconds; who takes longer is heard at the next look
AT_ONCE = 50  # decisions without a pause for others in the event loop, 5 ms
HOLDS_MS = 10_000  # a reason that changes nothing is told when it has lasted: most pass with the next look
FIGURES_EVERY_MS = 10_000  # every change of a status is a write: a thousand busy services are a hundred a second
HISTORY_MAX = 5
OVERDUE_S = 30.0
_NOT_OURS = ("FixedReplicas", "Stopped", "NotSupported")


Reconcile = Callable[[Manifest], Awaitable[None]]
Tell = Callable[[Manifest, Problem, bool, datetime], Awaitable[None]]


@dataclass(slots=True)
class _Held:
    """What is kept of one service between two looks; after a restart it is read from the cluster again."""

    generation: tuple[int, bool]
    spec: ServiceSpec
    memory: Memory = field(default_factory=Memory)
    wanted: int | None = None  # workers that should serve; None while others say the number
    deployed: int = 0  # replicas of the Deployment: those, and what still drains
    told: Problem | None = None
    able: bool = True
    words: Problem | None = None  # of the last decision that changed the number
    holding: tuple[str, int] | None = None  # a reason that changes nothing, and since when
    history: tuple[Mapping[str, Any], ...] = ()
    figures: Figures | None = None
    figures_ms: int = 0
    news: list[tuple[Problem, bool, datetime]] = field(default_factory=list)  # to be told; bounded by scaling's pace
    behind: bool = False  # the reconciler has still to write `deployed`
    acting: asyncio.Task[None] | None = None


class Scaler:
    """Autoscales all services that have spec.scaling, and measures the others for their status."""

    def __init__(
        self,
        services: Services,
        fleet: Fleet,
        loads: Loads,
        doors: Doors,
        marks: Marks,
        *,
        reconcile: Reconcile,
        tell: Tell,
        count: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        """`reconcile` brings a service to what is decided here; `tell` writes log and event, `count` a reason."""
        self._services = services
        self._fleet = fleet
        self._loads = loads
        self._doors = doors
        self._marks = marks
        self._reconcile = reconcile
        self._tell = tell
        self._count = count
        self._clock = clock
        self._clock_ms = clock_ms
        self._held: dict[str, _Held] = {}
        self._gone: set[str] = set()
        self._crews: dict[str, tuple[str, Replica | None]] = {}
        self._woken: set[str] = set()
        self._wake = asyncio.Event()
        self._ticked_ns = time.monotonic_ns()

    async def run(self) -> None:
        """Look at all services every two seconds, and at those that a gateway tells of at once."""
        next_s = time.monotonic()
        self._ticked_ns = time.monotonic_ns()
        while True:
            try:
                if time.monotonic() >= next_s:
                    next_s = max(next_s + EVERY_S, time.monotonic())
                    await self.tick()
                else:
                    self.look_at(self._take_woken())
            except Exception:  # one service that nobody thought of must not end scaling for all the others
                log.exception("A round of the autoscaler failed; the next one follows.")
            self._ticked_ns = time.monotonic_ns()
            try:
                async with asyncio.timeout(max(0.0, next_s - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def tick(self) -> None:
        """One round: ask every ready worker, then decide about every service."""
        services = [one for one in self._services.objects.values() if "deletionTimestamp" not in one["metadata"]]
        self._forget(services)
        asked: dict[str, str] = {}
        for service in services:
            asked.update((one.uid, one.address) for one in self._crew(service) if one.ready and one.address)
        await self._loads.ask(asked, ANSWERS_WITHIN_S)
        for number, service in enumerate(services, start=1):
            self._look(service)
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)

    def wake(self, references: Iterable[str]) -> None:
        """Look at these services (NAMESPACE/NAME) now: a gateway's waiting room changed."""
        self._woken.update(references)
        self._wake.set()

    def look_at(self, references: Iterable[str]) -> None:
        """Decide about these services with what is known."""
        for reference in references:
            namespace, _, name = reference.partition("/")
            service = self._services.objects.get((namespace, name))
            if service is not None and "deletionTimestamp" not in service["metadata"]:
                self._look(service)

    def replicas(self, service: Manifest, spec: ServiceSpec) -> Replicas | None:
        """For the reconciler: the Deployment's replicas and the words of ScalingReady."""
        if spec.scaling is None:
            return None
        held = self._hold(service)
        if held.wanted is None:
            return at_first(spec.scaling, None)
        told = held.told or Problem(STEADY, at_first(spec.scaling, None).message)
        return Replicas(held.deployed, held.able, told.reason, told.message)

    def signs(self, service: Manifest) -> object:
        """For the reconciler: equal as long as `replicas` says the same of the same spec."""
        held = self._held.get(service["metadata"]["uid"])
        return None if held is None else (held.wanted, held.deployed, held.told, held.able)

    def figures(self, service: Manifest) -> Figures | None:
        """For the reconciler: what the status shows; at most every ten seconds something else."""
        held = self._held.get(service["metadata"]["uid"])
        if held is None or held.figures is None:
            return None
        return replace(held.figures, history=held.history)

    async def release(self, service: Manifest) -> None:
        """Never touch this service again: it is being deleted."""
        uid = service["metadata"]["uid"]
        self._gone.add(uid)
        held = self._held.pop(uid, None)
        if held is not None and held.acting is not None:
            held.acting.cancel()
            await asyncio.gather(held.acting, return_exceptions=True)

    async def settle(self) -> None:
        """Wait for everything that is being written."""
        acting = [held.acting for held in self._held.values() if held.acting is not None]
        await asyncio.gather(*acting, return_exceptions=True)

    def overdue(self) -> str | None:
        """A sentence when the loop has not come round for too long."""
        age_s = (time.monotonic_ns() - self._ticked_ns) / 1e9
        return f"The autoscaler's last round was {age_s:.0f} s ago." if age_s > OVERDUE_S else None

    # Gather.

    def _take_woken(self) -> set[str]:
        woken, self._woken = self._woken, set()
        self._wake.clear()
        return woken

    def _forget(self, services: Iterable[Manifest]) -> None:
        present = {one["metadata"]["uid"] for one in services}
        for uid in self._held.keys() - present:
            del self._held[uid]
        self._gone &= {one["metadata"]["uid"] for one in self._services.objects.values()}

    def _hold(self, service: Manifest) -> _Held:
        """What is held of a service, begun or brought up to its present spec."""
        metadata = service["metadata"]
        generation = (int(metadata.get("generation", 0)), is_stopped(service))
        held = self._held.get(metadata["uid"])
        if held is None:
            held = self._held[metadata["uid"]] = _Held(generation, read(service)[0])
            _recall(held, service.get("status") or {})
        elif held.generation != generation:
            held.generation, held.spec = generation, read(service)[0]
        if held.spec.scaling is None or held.spec.stopped:
            held.wanted, held.told, held.words, held.memory, held.able = None, None, None, Memory(), True
        elif held.wanted is None:
            self._begin(held, service)
        return held

    def _begin(self, held: _Held, service: Manifest) -> None:
        """Start from what the cluster has: who drains already goes on draining."""
        spec = held.spec
        deployment = self._fleet.deployment(spec.namespace, spec.name)
        if deployment is None or spec.scaling is None:
            return
        held.deployed = at_first(spec.scaling, int((deployment.get("spec") or {}).get("replicas", 1))).wanted
        draining = sum(one.draining and not one.leaving for one in self._crew(service))
        held.wanted = max(held.deployed - draining, 0)

    def _crew(self, service: Manifest) -> list[Replica]:
        metadata = service["metadata"]
        crew = []
        for pod in self._fleet.pods_of(metadata["namespace"], metadata["name"]):
            if belongs(pod, metadata["uid"]) and (one := self._replica(pod)) is not None:
                crew.append(one)
        return crew

    def _replica(self, pod: Manifest) -> Replica | None:
        uid, version = pod["metadata"]["uid"], pod["metadata"].get("resourceVersion", "")
        known = self._crews.get(uid)
        if known is None or known[0] != version:
            if len(self._crews) > 20_000:  # pods that went; rather read again than looked for
                self._crews.clear()
            known = self._crews[uid] = version, replica_of(pod)
        return known[1]

    def _sight(self, held: _Held, crew: list[Replica], loads: Mapping[str, Load]) -> Sight:
        spec = held.spec
        serving = [one for one in crew if not one.draining]
        template = self._template(spec)
        blocked = replica_failure(self._fleet.deployment(spec.namespace, spec.name))
        if blocked is None and any(not one.placed for one in serving):
            blocked = self._unplaced(spec)
        return Sight(
            replicas=held.wanted or 0,
            workers=tuple(Worker(one.ready, one.placed, loads.get(one.uid)) for one in serving),
            door=self._door(spec),
            batch=spec.max_batch_size,
            blocked=blocked,
            rolling=any(one.ready and is_former(one, template) for one in serving),
        )

    def _template(self, spec: ServiceSpec) -> str:
        """The hash of the template that the Deployment makes pods from; empty before there is one."""
        deployment = (self._fleet.deployment(spec.namespace, spec.name) or {}).get("spec") or {}
        annotations = ((deployment.get("template") or {}).get("metadata") or {}).get("annotations") or {}
        return str(annotations.get(TEMPLATE_ANNOTATION, ""))

    def _door(self, spec: ServiceSpec) -> Door:
        one, known = self._doors.asked().get(spec.reference), not self._doors.silent()
        return Door(known=known) if one is None else Door(one.waiting, one.in_flight, known)

    def _unplaced(self, spec: ServiceSpec) -> Problem | None:
        """The scheduler's words about a pod that has no node."""
        for pod in self._fleet.pods_of(spec.namespace, spec.name):
            if belongs(pod, spec.uid) and not (pod.get("spec") or {}).get("nodeName"):
                problem = describe(pod, spec.gpu_resource_name, self._clock()).problem
                if problem is not None and problem.reason in ("InsufficientCapacity", "Unschedulable"):
                    return problem
        return None

    # Decide.

    def _look(self, service: Manifest) -> None:
        uid = service["metadata"]["uid"]
        if uid in self._gone:
            return
        held = self._hold(service)
        crew = self._crew(service)
        loads = {one.uid: load for one in crew if (load := self._loads.load(one.uid)) is not None}
        self._measure(held, crew, loads)
        if held.wanted is None or held.spec.scaling is None or (held.acting is not None and not held.acting.done()):
            return
        now, now_ms = self._clock(), self._clock_ms()
        sight = self._sight(held, crew, loads)
        decision, held.memory = decide(held.spec.scaling, sight, held.memory, now_ms)
        if (news := _note(held, decision, now, now_ms)) is not None:
            held.news.append((news, decision.able, now))
        if decision.changes:
            self._count(decision.reason)
        to_do = plan(
            held.wanted,
            held.deployed,
            crew,
            loads,
            timeout_ms=held.spec.drain_timeout_ms,
            now=now,
            now_ms=now_ms,
            template=self._template(held.spec),
        )
        if held.news or held.behind or to_do.patches or to_do.replicas != held.deployed:
            held.acting = asyncio.create_task(self._act(service, held, to_do, now))

    def _measure(self, held: _Held, crew: list[Replica], loads: Mapping[str, Load]) -> None:
        now_ms = self._clock_ms()
        if held.figures is not None and now_ms - held.figures_ms < FIGURES_EVERY_MS:
            return
        door = self._door(held.spec)
        told = [loads[one.uid] for one in crew if one.ready and one.uid in loads]
        unknown = not told and not door.waiting and held.wanted != 0
        gpus = [load.gpu_percent for load in told if load.gpu_percent is not None]
        held.figures_ms = now_ms
        held.figures = Figures(
            None if unknown else sum(load.waiting for load in told) + door.waiting,
            round(sum(gpus) / len(gpus)) if gpus else None,
            held.history,
        )

    # Act.

    async def _act(self, service: Manifest, held: _Held, to_do: Plan, now: datetime) -> None:
        spec = held.spec
        try:
            for name in to_do.unmark:
                await self._mark(spec, name, "false", None, None)
            for name in to_do.mark:
                log.info("%s: %s gets no new requests and finishes what it has.", spec.reference, name)
                await self._mark(spec, name, "true", COST_DRAINING, timestamp(now))
            for name in to_do.leave:
                await self._mark(spec, name, "true", COST_LEAVING, ...)
            held.deployed, held.behind = to_do.replicas, True
            await self._reconcile(service)
            held.behind = False
            while held.news:
                news, normal, at = held.news[0]
                await self._tell(service, news, normal, at)
                held.news.pop(0)
        except (Refused, Unreachable) as problem:
            log.warning("%s: what the autoscaler decided is tried again: %s", spec.reference, problem)

    async def _mark(self, spec: ServiceSpec, name: str, draining: str, cost: int | None, since: Any) -> None:
        """Label a pod; `since` may be ... where it stays as it is."""
        annotations: Manifest = {DELETION_COST_ANNOTATION: None if cost is None else str(cost)}
        if since is not ...:
            annotations[DRAINING_SINCE_ANNOTATION] = since
        patch: Manifest = {"metadata": {"labels": {DRAINING_LABEL: draining}, "annotations": annotations}}
        await self._marks.patch(PODS, name, spec.namespace, patch)


def _recall(held: _Held, status: Mapping[str, Any]) -> None:
    """What was told before a restart is told still, so that a restart rewrites no status."""
    held.history = tuple(status.get("scalingHistory") or ())[:HISTORY_MAX]
    if held.history:
        held.words = Problem(held.history[0]["reason"], held.history[0].get("message", ""))
    for condition in status.get("conditions") or ():
        if condition.get("type") == "ScalingReady" and condition.get("reason") not in _NOT_OURS:
            held.told = Problem(condition["reason"], condition.get("message", ""))
            held.able = condition.get("status") == "True"


def _note(held: _Held, decision: Decision, now: datetime, now_ms: int) -> Problem | None:
    """Take a decision over; what of it is news: a change, or that something keeps the autoscaler from one.

    The other reasons that change nothing stand in the condition alone.
    """
    said = Problem(decision.reason, decision.message)
    if decision.changes:
        held.wanted = decision.replicas
        entry = {
            "time": timestamp(now),
            "from": decision.former,
            "to": decision.replicas,
            "reason": decision.reason,
            "message": decision.message,
        }
        held.history = (entry, *held.history)[:HISTORY_MAX]
        held.told, held.words, held.able, held.holding = said, said, True, None
        return said
    calm = decision.reason in (STEADY, AT_ZERO)
    if held.holding is None or held.holding[0] != decision.reason:
        held.holding = decision.reason, now_ms
    if calm and held.words is not None:
        said = held.words
    if said == held.told or (held.told is not None and now_ms - held.holding[1] < HOLDS_MS):
        return None
    held.told, held.able = said, decision.able
    return None if decision.able else said
