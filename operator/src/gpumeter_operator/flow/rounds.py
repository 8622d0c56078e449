"""The collector's two rounds: look at pods and collect from them; close periods and publish them.

Owns what happens in a round, in which order, and what outlives a failed one. Knows no process, port or signal: the
command joins it to those. Every round can be repeated; nothing is lost when one is cut off anywhere.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial

from gpumeter_operator.adapters.kubernetes import Refused, Unreachable
from gpumeter_operator.adapters.ledger.rows import ContainerEvent
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.billing.facts import Pod, Worker
from gpumeter_operator.billing.tariff import canonical_spec
from gpumeter_operator.flow.close import DEFAULT_PLAN, Closer, Pricing
from gpumeter_operator.flow.collect import Collector, Execute
from gpumeter_operator.flow.discover import Manifest, NotAWorker, events_of, events_of_removed, worker_of
from gpumeter_operator.flow.publish import Publisher
from gpumeter_usage.period import SECOND_NS

log = logging.getLogger(__name__)

RESTORE_EVERY_NS = 30 * SECOND_NS
"""How often the published reports are compared with the cluster; one list of reports each time."""

Objects = Callable[[], Mapping[tuple[str, str], Manifest]]


class CollectRound:
    """Keeps what pods say of their containers, and starts a pull of every worker that runs."""

    def __init__(
        self, ledger: Ledger, collector: Collector, execute: Execute, *, pods: Objects, services: Objects
    ) -> None:
        self._ledger = ledger
        self._collector = collector
        self._execute = execute
        self._pods = pods
        self._services = services
        self._removed: list[tuple[Manifest, int]] = []
        self._workers: dict[str, Worker] = {}
        self._seen: dict[str, set[tuple[str, str]]] = {}
        self._alarmed: set[str] = set()

    def removed(self, pod: Manifest, now_ns: int) -> None:
        """A pod is gone; its last state is kept until it is in the ledger."""
        self._removed.append((pod, now_ns))

    async def recover(self, now_ns: int) -> None:
        """At the start, when pods are known: remember workers, and book the end of those that went unseen.

        Their containers ended at some time since they were heard last; that is what is booked, and no more, for a pod
        must not accrue after it is gone.
        """
        uids = {pod["metadata"]["uid"] for pod in self._pods().values()}
        for pod in await self._execute(self._ledger.not_gone):
            uid = pod.worker.worker_uid
            if uid in uids:
                self._workers[uid] = pod.worker
            else:
                log.info("Pod %s/%s went while nobody watched.", pod.worker.namespace, pod.worker.pod)
                await self._execute(partial(self._ledger.observe, pod.worker, _went_unseen(pod, now_ns), now_ns))

    async def run(self, token_of: Callable[[str], str], now_ns: int) -> None:
        """One round. `token_of` gives the usage token for a service's uid. Raises LedgerUnavailable."""
        await self._keep_removed()
        fleet: list[tuple[Worker, Target]] = []
        uids = set()
        for pod in list(self._pods().values()):
            uid = pod["metadata"]["uid"]
            uids.add(uid)
            worker = self._workers.get(uid) or worker_of(pod, self._services())
            if isinstance(worker, NotAWorker):
                await self._alarm(uid, worker, now_ns)
                continue
            events = events_of(pod, now_ns)
            await self._keep(worker, events, now_ns)
            address = (pod.get("status") or {}).get("podIP")
            if address and uid in self._workers and _runs(events):
                fleet.append((worker, Target(address, token_of(worker.service_uid))))
        self._alarmed &= uids
        self._collector.start_pulls(fleet)

    async def _keep_removed(self) -> None:
        while self._removed:
            pod, at_ns = self._removed[0]
            uid = pod["metadata"]["uid"]
            worker = self._workers.get(uid) or worker_of(pod, self._services())
            if isinstance(worker, Worker):
                # Kept even if it was never seen alive: its containers were allocated all the same.
                events = events_of_removed(pod, at_ns)
                if uid in self._workers or len(events) > 1:
                    await self._execute(partial(self._ledger.observe, worker, events, at_ns))
            self._removed.pop(0)
            self._workers.pop(uid, None)
            self._seen.pop(uid, None)
            self._collector.forget(uid)

    async def _keep(self, worker: Worker, events: tuple[ContainerEvent, ...], now_ns: int) -> None:
        keys = {(event.container_id, event.event) for event in events}
        if keys - self._seen.get(worker.worker_uid, set()):
            await self._execute(partial(self._ledger.observe, worker, events, now_ns))
            self._workers[worker.worker_uid] = worker
            self._seen[worker.worker_uid] = keys | self._seen.get(worker.worker_uid, set())

    async def _alarm(self, uid: str, why: NotAWorker, now_ns: int) -> None:
        if uid not in self._alarmed:
            await self._execute(partial(self._ledger.raise_alarm, why.reason, uid, why.message, now_ns))
            log.warning("%s: %s", why.reason, why.message)
            self._alarmed.add(uid)


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
        restore_every_ns: int = RESTORE_EVERY_NS,
    ) -> None:
        self._ledger = ledger
        self._closer = closer
        self._publisher = publisher
        self._execute = execute
        self._services = services
        self._plans = plans
        self._restore_every_ns = restore_every_ns
        self._restore_at_ns = 0
        self._hashes: dict[tuple[str, bytes], str] = {}

    async def run(self, now_ns: int) -> None:
        """One round. Raises LedgerUnavailable; a cluster that does not answer is tried again in the next round."""
        pricing = await self._pricing(now_ns)
        manifests = await self._execute(partial(self._closer.close_all, pricing, now_ns))
        try:
            if now_ns >= self._restore_at_ns:
                await self._publisher.restore(now_ns)
                self._restore_at_ns = now_ns + self._restore_every_ns
            await self._publisher.publish(manifests, now_ns)
        except (Unreachable, Refused) as problem:
            log.warning("Reports are not published now, and will be: %s", problem)

    async def _pricing(self, now_ns: int) -> Pricing:
        hashes: dict[str, str] = {}
        for plan in list(self._plans().values()):
            spec, metadata = canonical_spec(plan["spec"]), plan["metadata"]
            if (metadata["name"], spec) not in self._hashes:
                version = int(metadata.get("generation", 1))
                self._hashes[metadata["name"], spec] = await self._execute(
                    partial(self._ledger.keep_plan, metadata["name"], version, spec, now_ns)
                )
            hashes[metadata["name"]] = self._hashes[metadata["name"], spec]
        names = {
            key: ((service.get("spec", {}).get("pricing") or {}).get("planRef") or {}).get("name") or DEFAULT_PLAN
            for key, service in self._services().items()
        }
        return Pricing(names, hashes)


def _runs(events: tuple[ContainerEvent, ...]) -> bool:
    started = {event.container_id for event in events if event.event == "started"}
    over = {event.container_id for event in events if event.event in ("ended", "vanished", "gone")}
    return bool(started - over)


def _went_unseen(pod: Pod, now_ns: int) -> list[ContainerEvent]:
    signs = [pod.settled_ns, *(boot.sealed_ns for boot in pod.boots), *(boot.started_ns for boot in pod.boots)]
    last_sign_ns = min(now_ns, max(signs))
    vanished = [
        ContainerEvent(span.container_id, "vanished", max(span.started_ns, last_sign_ns))
        for span in pod.spans
        if span.ended_ns is None
    ]
    return [*vanished, ContainerEvent("", "gone", now_ns)]
