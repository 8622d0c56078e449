"""The collector's two rounds: look at pods and collect from them; close periods and publish them.

Owns what happens in a round, in which order, and what outlives a failed one. Knows no process, port or signal: the
command joins it to those. Every round can be repeated; nothing is lost when one is cut off anywhere.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from hashlib import sha256

from gpumeter_operator.adapters.kubernetes import Refused, Unreachable
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.rows import ContainerEvent
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.billing.facts import Pod, Worker
from gpumeter_operator.billing.tariff import canonical_spec
from gpumeter_operator.flow.close import DEFAULT_PLAN, Closer, Pricing
from gpumeter_operator.flow.collect import Collector, Execute
from gpumeter_operator.flow.discover import (
    LOST_AFTER_NS,
    Manifest,
    NotAWorker,
    at_last_sign,
    events_of,
    events_of_removed,
    is_overdue,
    last_sign_ns,
    running_of,
    runs_a_notebook,
    with_missed_ends,
    worker_of,
)
from gpumeter_operator.flow.plans import PlanTeller
from gpumeter_operator.flow.pricing import terms_of
from gpumeter_operator.flow.publish import Publisher
from gpumeter_operator.flow.service_usage import UsageTeller
from gpumeter_usage.period import SECOND_NS, rfc3339

log = logging.getLogger(__name__)

RESTORE_EVERY_NS = 30 * SECOND_NS
"""How often the published reports are compared with the cluster; one list of reports each time."""

Objects = Callable[[], Mapping[tuple[str, str], Manifest]]
Lookup = Callable[[str, str], Awaitable[Manifest | None]]
"""The pod of this namespace and name, from the API server itself. Raises Unreachable and Refused."""


class CollectRound:
    """Keeps what pods say of their containers, and starts a pull of every worker that runs.

    A pod that leaves the mirror need not be gone: whoever may edit it may take its label off, and it holds its devices
    all the same. So it is looked up by name before its end is booked, and followed that way for as long as it lives.
    """

    def __init__(
        self,
        ledger: Ledger,
        collector: Collector,
        execute: Execute,
        *,
        pods: Objects,
        services: Objects,
        lookup: Lookup,
        mine: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._mine = mine
        self._ledger = ledger
        self._collector = collector
        self._execute = execute
        self._pods = pods
        self._services = services
        self._lookup = lookup
        self._removed: dict[str, tuple[Manifest, int]] = {}
        self._astray: dict[str, Manifest] = {}  # workers without the label, by uid
        self._workers: dict[str, Worker] = {}
        self._seen: dict[str, set[tuple[str, str]]] = {}
        self._alarmed: set[tuple[str, str]] = set()

    def removed(self, pod: Manifest, now_ns: int) -> None:
        """A pod has left the mirror; its last state is kept until it is in the ledger."""
        self._removed[pod["metadata"]["uid"]] = (pod, now_ns)

    async def recover(self, now_ns: int) -> None:
        """At the start, when pods are known: remember workers, and book the end of those that went unseen.

        Their containers ended at some time since they were heard or counted as running last; that is what is booked,
        and no more, for a pod must not accrue after it is gone. Raises LedgerUnavailable, and Unreachable and Refused
        where it cannot be known whether a pod is gone; it may be called again then.
        """
        uids = {pod["metadata"]["uid"] for pod in self._pods().values()}
        for pod in await self._execute(self._ledger.not_gone):
            worker = pod.worker
            if worker.worker_uid in uids:
                self._workers[worker.worker_uid] = worker
            elif (found := await self._living(worker.namespace, worker.pod, worker.worker_uid)) is not None:
                self._workers[worker.worker_uid] = worker
                self._astray[worker.worker_uid] = found
            else:
                log.info("Pod %s/%s went while nobody watched.", worker.namespace, worker.pod)
                final_ns = await self._execute(partial(self._ledger.last_final_ns, worker.namespace, worker.service))
                events = _went_unseen(pod, final_ns, now_ns)
                await self._execute(partial(self._ledger.observe, worker, events, now_ns))

    async def run(self, token_of: Callable[[str], str], now_ns: int) -> None:
        """One round. `token_of` gives the usage token for a service's uid. Raises LedgerUnavailable.

        Anything else that goes wrong with a pod is that pod's: an alarm, and the others are collected from.
        """
        pods = {pod["metadata"]["uid"]: pod for pod in list(self._pods().values())}
        try:
            await self._find_astray(pods, now_ns)
            for uid, (pod, at_ns) in list(self._removed.items()):
                await self._apart(uid, self._keep_removed(uid, pod, at_ns, now_ns), now_ns)
        except (Unreachable, Refused) as problem:
            log.warning("Pods that left cannot be looked up now, and will be: %s", problem)
        fleet: list[tuple[Worker, Target]] = []
        for uid, pod in (pods | self._astray).items():
            await self._apart(uid, self._look_at(uid, pod, token_of, fleet, now_ns), now_ns)
        self._alarmed = {(uid, reason) for uid, reason in self._alarmed if uid in pods or uid in self._astray}
        # What pods say is kept by every collector, once; only the pulls are shared among them.
        own = [(worker, target) for worker, target in fleet if self._mine(worker.worker_uid)]
        ending = {uid for uid, pod in pods.items() if pod["metadata"].get("deletionTimestamp")}
        self._collector.start_pulls(own, ending)
        self._collector.keep_only({worker.worker_uid for worker, _ in own})

    async def _apart(self, uid: str, step: Awaitable[None], now_ns: int) -> None:
        try:
            await step
        except (LedgerUnavailable, Unreachable, Refused):
            raise
        except Exception as surprise:
            message = f"The pod of uid {uid} cannot be read: {type(surprise).__name__}: {surprise!s:.300}"
            await self._alarm(uid, NotAWorker("PodUnreadable", message), now_ns)
            self._forget(uid)

    async def _look_at(
        self,
        uid: str,
        pod: Manifest,
        token_of: Callable[[str], str],
        fleet: list[tuple[Worker, Target]],
        now_ns: int,
    ) -> None:
        worker = self._workers.get(uid) or worker_of(pod, self._services())
        if isinstance(worker, NotAWorker):
            await self._alarm(uid, worker, now_ns)
            return
        events = events_of(pod, now_ns)
        await self._keep(worker, events, now_ns)
        if _runs(events) and is_overdue(pod, now_ns):
            await self._keep_lost(worker, events, now_ns)
        if runs_a_notebook(pod):
            return  # what its containers hold is allocated and nobody's; it is never asked
        address = (pod.get("status") or {}).get("podIP")
        if address and uid in self._workers and _runs(events):
            fleet.append((worker, Target(address, token_of(worker.service_uid))))

    async def _find_astray(self, pods: Mapping[str, Manifest], now_ns: int) -> None:
        for uid, last in list(self._astray.items()):
            if uid in pods:
                del self._astray[uid]  # it has its label again
                continue
            found = await self._living(last["metadata"]["namespace"], last["metadata"]["name"], uid)
            if found is None:
                del self._astray[uid]
                self._removed[uid] = (last, now_ns)
            else:
                self._astray[uid] = found

    async def _keep_removed(self, uid: str, pod: Manifest, at_ns: int, now_ns: int) -> None:
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        worker = self._workers.get(uid) or worker_of(pod, self._services())
        if isinstance(worker, Worker):
            found = await self._living(namespace, name, uid)
            if found is not None:
                self._workers[uid] = worker
                self._astray[uid] = found
                del self._removed[uid]
                why = f"Pod {namespace}/{name} has lost its label; it holds its devices, and is followed by its name."
                await self._alarm(uid, NotAWorker("LabelRemoved", why), now_ns)
                return
            # Kept even if it was never seen alive: its containers were allocated all the same.
            events = await self._complete(uid, events_of_removed(pod, at_ns), at_ns)
            events = await self._as_last_seen(uid, events, at_ns)
            if uid in self._workers or len(events) > 1:
                # Its events have times of their own; what is written now is observed now, however long it had to wait.
                await self._execute(partial(self._ledger.observe, worker, events, now_ns))
        self._forget(uid)

    async def _keep_lost(self, worker: Worker, events: tuple[ContainerEvent, ...], now_ns: int) -> None:
        """The pod should have ended long ago and its node says nothing: it is not allocated for ever."""
        vanished = tuple(ContainerEvent(each.container_id, "vanished", now_ns) for each in running_of(events))
        lost = await self._as_last_seen(worker.worker_uid, vanished, now_ns)
        if lost == vanished:
            return  # its worker was heard a moment ago: whatever holds the pod, it is no lost node
        await self._keep(worker, (*events, *lost), now_ns)
        why = (
            f"Pod {worker.namespace}/{worker.pod} should have ended and its node does not say that it has; it counts "
            f"as allocated until {rfc3339(lost[0].at_ns)}, when it was heard last."
        )
        await self._alarm(worker.worker_uid, NotAWorker("NodeLost", why), now_ns)

    async def _complete(self, uid: str, events: tuple[ContainerEvent, ...], now_ns: int) -> tuple[ContainerEvent, ...]:
        """The same, and the ends of earlier containers that nobody will ever tell."""
        known = await self._execute(partial(self._ledger.pod, uid))
        return events if known is None else with_missed_ends(events, known, now_ns)

    async def _as_last_seen(
        self, uid: str, events: tuple[ContainerEvent, ...], now_ns: int
    ) -> tuple[ContainerEvent, ...]:
        """The same, but a container that vanished unseen did so when its worker was heard last, if that is long ago."""
        pod = await self._execute(partial(self._ledger.pod, uid))
        if pod is None or not pod.settled_ns or now_ns - pod.settled_ns <= LOST_AFTER_NS:
            return events
        worker = pod.worker
        final_ns = await self._execute(partial(self._ledger.last_final_ns, worker.namespace, worker.service))
        return at_last_sign(events, pod, last_sign_ns(pod, final_ns, now_ns))

    def _forget(self, uid: str) -> None:
        if self._removed.pop(uid, None) is not None:
            self._workers.pop(uid, None)
            self._seen.pop(uid, None)
            self._collector.forget(uid)

    async def _living(self, namespace: str, name: str, uid: str) -> Manifest | None:
        found = await self._lookup(namespace, name)
        return found if found is not None and found["metadata"]["uid"] == uid else None

    async def _keep(self, worker: Worker, events: tuple[ContainerEvent, ...], now_ns: int) -> None:
        keys = {(event.container_id, event.event) for event in events}
        if keys - self._seen.get(worker.worker_uid, set()):
            events = await self._complete(worker.worker_uid, events, now_ns)
            await self._execute(partial(self._ledger.observe, worker, events, now_ns))
            self._workers[worker.worker_uid] = worker
            self._seen[worker.worker_uid] = keys | self._seen.get(worker.worker_uid, set())

    async def _alarm(self, uid: str, why: NotAWorker, now_ns: int) -> None:
        if (uid, why.reason) not in self._alarmed:
            await self._execute(partial(self._ledger.raise_alarm, why.reason, uid, why.message, now_ns))
            log.warning("%s: %s", why.reason, why.message)
            self._alarmed.add((uid, why.reason))


class CloseRound:
    """Closes what can be closed and publishes what changed."""

    def __init__(
        self,
        ledger: Ledger,
        closer: Closer,
        publisher: Publisher,
        execute: Execute,
        *,
        services: Objects,
        plans: Objects,
        teller: PlanTeller | None = None,
        usage: UsageTeller | None = None,
        restore_every_ns: int = RESTORE_EVERY_NS,
    ) -> None:
        self._ledger = ledger
        self._closer = closer
        self._publisher = publisher
        self._execute = execute
        self._services = services
        self._plans = plans
        self._teller = teller
        self._usage = usage
        self._restore_every_ns = restore_every_ns
        self._restore_at_ns = 0

    async def run(self, now_ns: int) -> None:
        """One round. Raises LedgerUnavailable; a cluster that does not answer is tried again in the next round."""
        pricing = await self._pricing(now_ns)
        manifests = await self._execute(partial(self._closer.close_all, pricing, now_ns))
        try:
            if now_ns >= self._restore_at_ns and await self._publisher.restore(now_ns):
                self._restore_at_ns = now_ns + self._restore_every_ns
            await self._publisher.publish(manifests, now_ns)
            if self._teller is not None:
                await self._teller.tell(list(self._plans().values()), now_ns)
            if self._usage is not None:
                await self._usage.tell(manifests, now_ns)
        except (Unreachable, Refused) as problem:
            log.warning("Reports are not published now, and will be: %s", problem)

    async def _pricing(self, now_ns: int) -> Pricing:
        plans = {plan["metadata"]["name"]: plan for plan in list(self._plans().values())}
        # The ledger is asked, and nothing remembered: another collector may have led since the last round.
        known = await self._execute(self._ledger.newest_plans)
        if any(digest and name not in plans for name, digest in known.items()):
            await self._execute(partial(self._ledger.note_plans, set(plans), now_ns))
        hashes: dict[str, str] = {}
        for name, plan in plans.items():
            spec = canonical_spec(plan.get("spec") or {})
            hashes[name] = sha256(spec).hexdigest()
            if known.get(name) != hashes[name]:
                version = int(plan["metadata"].get("generation", 1))
                await self._execute(partial(self._ledger.keep_plan, name, version, spec, now_ns))
        names = {
            key: ((service.get("spec", {}).get("pricing") or {}).get("planRef") or {}).get("name") or DEFAULT_PLAN
            for key, service in self._services().items()
        }
        return Pricing(names, hashes, {key: terms_of(service) for key, service in self._services().items()})


def _runs(events: tuple[ContainerEvent, ...]) -> bool:
    return bool(running_of(events))


def _went_unseen(pod: Pod, final_ns: int, now_ns: int) -> tuple[ContainerEvent, ...]:
    # A ledger of an earlier version may hold several lives of a pod without an end: only the last ran to its last sign.
    ends = with_missed_ends([ContainerEvent("", "gone", now_ns)], pod, now_ns)
    return at_last_sign(ends, pod, last_sign_ns(pod, final_ns, now_ns))
