"""The autoscaler's loop: asks all workers every two seconds, decides about every service, and acts.

Owns the order (gather, decide, act), and that trouble with one service is no other's. One loop over mirrors for all
services: a thousand timers would cost more than a thousand decisions. It writes marks on pods and nothing else: the
Deployment has one writer, the reconciler, which asks here for the number and is called when it changes. Does not know
how loads and waiting rooms are read, and decides nothing itself.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from gpumeter_operator.adapters.kubernetes import PODS, Manifest, Refused, Unreachable
from gpumeter_operator.decide.autoscale import STEADY, Memory, decide
from gpumeter_operator.decide.conditions import timestamp
from gpumeter_operator.decide.crew import Load, Replica
from gpumeter_operator.decide.drain import Plan, plan
from gpumeter_operator.decide.marks import draining, leaving, serving
from gpumeter_operator.decide.replicas import Replicas, at_first, decide_replicas
from gpumeter_operator.decide.spec import Problem, ServiceSpec, is_stopped, read
from gpumeter_operator.decide.status import Figures
from gpumeter_operator.flow.fleet import Fleet
from gpumeter_operator.flow.scale_held import Held, note, recall
from gpumeter_operator.flow.scale_ports import Doors, Loads, Marks, Services
from gpumeter_operator.flow.scale_sight import Sights

log = logging.getLogger(__name__)

EVERY_S = 2.0
ANSWERS_WITHIN_S = 1.0  # of the two seconds; who takes longer is heard at the next look
AT_ONCE = 50  # decisions without a pause for others in the event loop, 5 ms
FIGURES_EVERY_MS = 10_000  # every change of a status is a write: a thousand busy services are a hundred a second
UNKNOWN_AFTER_MS = 2 * FIGURES_EVERY_MS
OVERDUE_S = 30.0


Reconcile = Callable[[Manifest], Awaitable[None]]
Tell = Callable[[Manifest, Problem, bool, datetime], Awaitable[None]]


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
        problem: Callable[[Manifest], Problem | None] = lambda service: None,
        count: Callable[[str], None] = lambda reason: None,
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        """`reconcile` brings a service to what is decided here; `tell` writes log and event, `count` a reason.

        `problem` is why the last `reconcile` of a service, whoever called it, could not write its Deployment.
        `on_failure` hears of each look at a service that failed for a reason that nobody thought of.
        """
        self._services = services
        self._fleet = fleet
        self._loads = loads
        self._marks = marks
        self._reconcile = reconcile
        self._tell = tell
        self._problem = problem
        self._count = count
        self._on_failure = on_failure
        self._clock = clock
        self._clock_ms = clock_ms
        self._held: dict[str, Held] = {}
        self._gone: set[str] = set()
        self._failed: dict[str, str] = {}  # by uid, why the last look failed that did
        self._sights = Sights(fleet, doors, clock)
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
            with self._alone(service):
                asked.update((one.uid, one.address) for one in self._sights.crew(service) if one.ready and one.address)
        await self._ask(asked)
        for number, service in enumerate(services, start=1):
            with self._alone(service):
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
                with self._alone(service):
                    self._look(service)

    def replicas(self, service: Manifest, spec: ServiceSpec) -> Replicas | None:
        """For the reconciler: the Deployment's replicas and the words of ScalingReady."""
        if spec.scaling is None:
            return None
        held = self._hold(service)
        if held.wanted is None:
            return at_first(spec.scaling, self._sights.deployed(spec))
        told = held.told or Problem(STEADY, at_first(spec.scaling, None).message)
        return Replicas(held.asked, held.able, told.reason, told.message)

    def signs(self, service: Manifest) -> object:
        """For the reconciler: equal as long as `replicas` says the same of the same spec."""
        held = self._held.get(service["metadata"]["uid"])
        return None if held is None else (held.wanted, held.asked, held.told, held.able)

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

    @contextmanager
    def _alone(self, service: Manifest) -> Iterator[None]:
        """What goes wrong with one service stops no other: told once in the log, and counted each time."""
        try:
            yield
        except Exception as failure:
            self._fail(service, failure)

    def _fail(self, service: Manifest, failure: Exception) -> None:
        self._on_failure()
        metadata = service["metadata"]
        words = f"{metadata.get('generation')}: {failure!r}"
        if self._failed.get(metadata["uid"]) != words:
            self._failed[metadata["uid"]] = words
            log.error(
                "%s/%s: a look of the autoscaler failed, so the number of workers stays; it is tried again at each.",
                metadata["namespace"],
                metadata["name"],
                exc_info=failure,
            )

    # Gather.

    async def _ask(self, workers: Mapping[str, str]) -> None:
        """Ask all of them. Whom a gateway wakes for meanwhile does not wait for one that hangs."""
        asking = asyncio.create_task(self._loads.ask(workers, ANSWERS_WITHIN_S))
        try:
            while not asking.done():
                woken = asyncio.create_task(self._wake.wait())
                await asyncio.wait({asking, woken}, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
                if not asking.done():
                    self.look_at(self._take_woken())
            asking.result()
        finally:
            asking.cancel()

    def _take_woken(self) -> set[str]:
        woken, self._woken = self._woken, set()
        self._wake.clear()
        return woken

    def _forget(self, services: Iterable[Manifest]) -> None:
        present = {one["metadata"]["uid"] for one in services}
        for uid in self._held.keys() - present:
            del self._held[uid]
        for uid in self._failed.keys() - present:
            del self._failed[uid]
        self._gone &= {one["metadata"]["uid"] for one in self._services.objects.values()}

    def _hold(self, service: Manifest) -> Held:
        """What is held of a service, begun or brought up to its present spec."""
        metadata = service["metadata"]
        generation = (int(metadata.get("generation", 0)), is_stopped(service))
        held = self._held.get(metadata["uid"])
        if held is None:
            held = self._held[metadata["uid"]] = Held(generation, *read(service))
            recall(held, service.get("status") or {}, self._clock_ms())
        elif held.generation != generation and held.generation[0] <= generation[0]:  # not an older copy of it
            (held.spec, held.problems), held.generation = read(service), generation
        if held.spec.scaling is None or held.spec.stopped:
            held.aside = True
            held.wanted, held.told, held.words, held.memory, held.able = None, None, None, Memory(), True
        elif self._is_hindered(service, held):
            # What is decided could not be done. When it can again, much may have happened that nobody took note of.
            held.wanted, held.memory = None, Memory()
        elif held.wanted is None:
            self._begin(held, service)
        return held

    def _begin(self, held: Held, service: Manifest) -> None:
        """Start from what the cluster has: who drains already goes on draining.

        Not from a zero that the autoscaler did not decide (the stop annotation, spec.replicas 0, a mark by hand): it is
        to be seen that nothing is asked, as with a new service.
        """
        deployed, scaling = self._sights.deployed(held.spec), held.spec.scaling
        if deployed is None or scaling is None:
            return
        held.asked = at_first(scaling, deployed).wanted
        drained = sum(one.draining and not one.leaving for one in self._sights.crew(service))
        held.wanted = max(held.asked - drained, 0)
        if held.wanted == 0 and not held.decided_zero:
            held.wanted = at_first(scaling, None).wanted
            held.asked = max(held.asked, held.wanted)
            held.behind = held.asked != deployed
        held.aside = False

    def _is_hindered(self, service: Manifest, held: Held) -> bool:
        return bool(held.problems) or self._problem(service) is not None

    # Decide.

    def _look(self, service: Manifest) -> None:
        uid = service["metadata"]["uid"]
        if uid in self._gone:
            return
        held = self._hold(service)
        crew = self._sights.crew(service)
        loads = {one.uid: load for one in crew if (load := self._loads.load(one.uid)) is not None}
        silent_since_ms = self._silent_since(crew, loads)
        self._measure(held, crew, loads, silent_since_ms)
        if held.acting is not None and not held.acting.done():
            held.again = True
            return
        if held.wanted is None or held.spec.scaling is None:
            self._stand_aside(service, held, crew)
            return
        now, now_ms = self._clock(), self._clock_ms()
        sight = self._sights.sight(held, crew, loads)
        decision, held.memory = decide(held.spec.scaling, sight, held.memory, now_ms)
        if (news := note(held, decision, now, now_ms, silent_since_ms)) is not None:
            held.news.append((news, decision.able, now))
        if decision.changes:
            self._count(decision.reason)
        deployed = self._sights.deployed(held.spec)
        to_do = plan(
            held.wanted,
            held.asked if deployed is None else deployed,
            crew,
            loads,
            timeout_ms=held.spec.drain_timeout_ms,
            now=now,
            now_ms=now_ms,
            template=self._sights.template(held.spec),
        )
        if held.news or held.behind or to_do.patches or to_do.replicas != held.asked:
            held.acting = asyncio.create_task(self._act(service, held, to_do, now))

    def _stand_aside(self, service: Manifest, held: Held, crew: list[Replica]) -> None:
        """Where nobody drains, nobody may be left marked: such a worker would get no request for ever."""
        spec, deployed = held.spec, self._sights.deployed(held.spec)
        if deployed is None or spec.stopped or spec.jupyter:
            return
        if spec.scaling is None and deployed != decide_replicas(spec).wanted and not self._is_hindered(service, held):
            return  # first the Deployment gets its number: where that is lower, it is the marked ones that go
        now = self._clock()
        to_do = plan(deployed, deployed, crew, {}, timeout_ms=spec.drain_timeout_ms, now=now, now_ms=self._clock_ms())
        if to_do.unmark:
            held.acting = asyncio.create_task(self._act(service, held, to_do, now))

    def _silent_since(self, crew: list[Replica], loads: Mapping[str, Load]) -> int | None:
        """Since when all ready workers without a load are silent; None while one of them had no chance to tell."""
        since_ms = 0
        for one in crew:
            if one.ready and one.uid not in loads:
                if (one_ms := self._loads.silent_since(one.uid)) is None:
                    return None
                since_ms = max(since_ms, one_ms)
        return since_ms

    def _measure(self, held: Held, crew: list[Replica], loads: Mapping[str, Load], silent_since_ms: int | None) -> None:
        now_ms = self._clock_ms()
        if held.figures is not None and now_ms - held.figures_ms < FIGURES_EVERY_MS:
            return
        door = self._sights.door(held.spec)
        told = [loads[one.uid] for one in crew if one.ready and one.uid in loads]
        unknown = not told and not door.waiting and held.wanted != 0
        recent = now_ms - held.figures_ms < UNKNOWN_AFTER_MS or silent_since_ms is None
        if unknown and held.is_queue_known and recent:
            return  # who answers late once is not silent, nor who was not asked yet
        gpus = [load.gpu_percent for load in told if load.gpu_percent is not None]
        held.figures_ms = now_ms
        held.figures = Figures(
            None if unknown else sum(load.waiting for load in told) + door.waiting,
            round(sum(gpus) / len(gpus)) if gpus else None,
            held.history,
        )

    # Act.

    async def _act(self, service: Manifest, held: Held, to_do: Plan, now: datetime) -> None:
        spec = held.spec
        pods = {pod["metadata"]["name"]: pod for pod in self._fleet.pods_of(spec.namespace, spec.name)}
        try:
            for name in to_do.unmark:
                await self._mark(spec, pods.get(name), serving)
            for name in to_do.mark:
                log.info("%s: %s gets no new requests and finishes what it has.", spec.reference, name)
                await self._mark(spec, pods.get(name), lambda pod: draining(pod, timestamp(now)))
            for name in to_do.leave:
                await self._mark(spec, pods.get(name), leaving)
            held.asked, held.behind = to_do.replicas, True
            await self._reconcile(service)
            held.behind = False
            while held.news:
                news, normal, at = held.news[0]
                await self._tell(service, news, normal, at)
                held.news.pop(0)
        except (Refused, Unreachable) as problem:
            log.warning("%s: what the autoscaler decided is tried again: %s", spec.reference, problem)
        except Exception as failure:
            self._fail(service, failure)
        finally:
            if held.again:
                held.again = False
                self.wake([spec.reference])

    async def _mark(self, spec: ServiceSpec, pod: Manifest | None, patch: Callable[[Manifest], Manifest]) -> None:
        if pod is not None:  # else it has gone meanwhile
            await self._marks.patch(PODS, pod["metadata"]["name"], spec.namespace, patch(pod))
