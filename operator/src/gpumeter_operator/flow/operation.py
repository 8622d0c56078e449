"""The running operator: its parts, put together, and their health.

Owns start, stop and what alive and ready mean, for who stands by too. Does not know kopf, which calls `look` and
`leave`, nor when it is its turn to act.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from gpumeter_operator.adapters.health import HealthServer
from gpumeter_operator.adapters.heap import give_back_for_ever
from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, Manifest, Refused, Unreachable
from gpumeter_operator.adapters.mirror import Mirror
from gpumeter_operator.adapters.operator_metrics import OperatorMetrics
from gpumeter_operator.adapters.signals import Signals
from gpumeter_operator.adapters.starting import StartingWorkers
from gpumeter_operator.decide.names import HTTP_PORT
from gpumeter_operator.decide.spec import Problem
from gpumeter_operator.decide.workload import Installation
from gpumeter_operator.flow.election import Election
from gpumeter_operator.flow.fleet import Fleet
from gpumeter_operator.flow.liveness import Deliveries
from gpumeter_operator.flow.looks import Looks
from gpumeter_operator.flow.reconcile import Reconciler, tell_event
from gpumeter_operator.flow.release import Releaser
from gpumeter_operator.flow.scale import Scaler
from gpumeter_operator.flow.scale_ports import NoDoors, OpenDoors
from gpumeter_operator.flow.tenure import Kubernetes

log = logging.getLogger(__name__)

SETTLE_S = 1.0
OVERDUE_MIN_S = 60.0  # a service is looked at every few seconds; a minute without is a frozen loop


class Operation:
    """Everything that runs beside kopf."""

    def __init__(
        self,
        cluster: Kubernetes,
        installation: Installation,
        master_key: bytes,
        *,
        interval_s: float,
        hold_s: float = 0.0,
        deletion_margin: timedelta,
        http: tuple[str, int],
        open_doors: OpenDoors = NoDoors,
        worker_port: int = HTTP_PORT,
        election: Election | None = None,
    ) -> None:
        self._cluster = cluster
        self._election = election
        self._acts = self._serves = self._scales = False
        self._http = http
        self._overdue_s = max(OVERDUE_MIN_S, 20 * interval_s)
        metrics = OperatorMetrics()
        self._fleet = Fleet(cluster)
        self._starting = StartingWorkers()
        self._services = Mirror(cluster, INFERENCE_SERVICES)
        self._signals = Signals(worker_port)
        self._doors = open_doors(self._wake)
        self._scaler = Scaler(
            self._services,
            self._fleet,
            self._signals,
            self._doors,
            cluster,
            reconcile=self._bring,
            tell=partial(tell_event, cluster),
            problem=self._problem,
            count=lambda reason: metrics.scalings.labels(reason=reason).inc(),
            on_failure=metrics.scaling_failures.inc,
        )
        self._reconciler = Reconciler(
            cluster,
            self._fleet,
            installation,
            master_key,
            metrics,
            told=self._starting.told,
            autoscaler=self._scaler,
            hold_ns=int(hold_s * 1_000_000_000),
        )
        self._deliveries = Deliveries()
        self._looks = Looks(lambda: self._services.objects, self._reconciler.is_due, self.look, interval_s=interval_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._releaser = Releaser(cluster, self._fleet, deletion_margin)
        self._metrics = metrics
        self._health = HealthServer(self._wrong, self._unready, metrics.render)

    async def serve(self) -> None:
        """Answer probes, also while standing by."""
        if not self._serves:
            self._serves = True
            await self._health.start(*self._http)

    async def start(self) -> None:
        """Act: wait for the first lists, for to decide with half a picture would delete and double."""
        await self.serve()
        self._acts = True
        self._metrics.active.set(1)
        await self._fleet.start()
        self._tasks = [
            asyncio.create_task(self._services.run(), name="mirror of services"),
            asyncio.create_task(self._scale(), name="autoscaler"),
            asyncio.create_task(self._doors.run(), name="gateways"),
            asyncio.create_task(self._looks.run(), name="looks"),
            asyncio.create_task(give_back_for_ever(), name="memory"),
        ]

    async def rest(self) -> None:
        """End all that acts; probes are still answered."""
        self._acts = self._scales = False
        self._metrics.active.set(0)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(SETTLE_S):
                await self._scaler.settle()
        except TimeoutError:
            log.info("The autoscaler's last writes are left to the next operator.")
        await self._signals.close()
        await self._fleet.stop()
        await self._starting.close()

    async def stop(self) -> None:
        """End everything: what acts, the server and the connections."""
        await self.rest()
        await self._health.close()
        await self._cluster.close()

    def hear(self, metadata: Mapping[str, Any], *, gone: bool) -> None:
        """The watch of services has brought one."""
        self._deliveries.hear(metadata["uid"], None if gone else int(metadata.get("generation", 0)))
        if gone:  # also where somebody took the finalizer away by hand, and nobody let it go
            self._reconciler.drop(metadata)

    async def look(self, service: Manifest) -> None:
        """Reconcile once; what the API server keeps from being done is told in the log and done at the next look."""
        try:
            await self._reconciler.reconcile(service)
        except (Refused, Unreachable) as problem:
            metadata = service["metadata"]
            log.warning("%s/%s will be looked at again: %s", metadata["namespace"], metadata["name"], problem)

    async def leave(self, service: Manifest) -> str | None:
        """Let a deleted service end; a sentence when it has to be tried again."""
        await self._scaler.release(service)
        await self._reconciler.leave(service)
        try:
            await self._releaser.release(service)
        except (Refused, Unreachable) as problem:
            return f"cannot be released yet: {problem}"
        return None

    async def _bring(self, service: Manifest) -> None:
        await self._reconciler.reconcile(service)

    def _problem(self, service: Manifest) -> Problem | None:
        return self._reconciler.problem(service)

    def _wake(self, references: Iterable[str]) -> None:
        self._scaler.wake(references)

    async def _scale(self) -> None:
        await self._services.synced()
        self._scales = True
        await self._scaler.run()

    def _wrong(self) -> str | None:
        """The loop that stands still, by the age of its last tick. An API server that is away is no such loop."""
        standing = self._election.overdue() if self._election else None
        if standing is not None or not self._acts:
            return standing
        return self._fleet.silent() or self._reconciler.overdue(self._overdue_s) or self._stuck()

    def _stuck(self) -> str | None:
        """The loops that begin after the first lists."""
        if not self._tasks:
            return None
        ended = next((task for task in self._tasks if task.done()), None)
        if ended is not None:
            return f"The loop '{ended.get_name()}' has ended, though it never should."
        return (
            self._services.silence()
            or self._deliveries.late(self._services.objects.values(), OVERDUE_MIN_S)
            or (self._scaler.overdue() if self._scales else None)
            or self._doors.overdue()
        )

    def _unready(self) -> str | None:
        """Who stands by is ready when it could take over: a rollout waits for that, and for no more."""
        if self._acts:
            return self._fleet.unsynced()
        return self._election.blind() if self._election else self._fleet.unsynced()
