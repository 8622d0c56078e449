"""The running operator: its parts, put together, and their health.

Owns start, stop and what alive and ready mean. Does not know kopf, which calls `look` and `leave`.
"""

import asyncio
import logging
from collections.abc import Iterable
from datetime import timedelta
from functools import partial

from gpumeter_operator.adapters.health import HealthServer
from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, Cluster, Manifest, Refused, Unreachable
from gpumeter_operator.adapters.mirror import Mirror
from gpumeter_operator.adapters.operator_metrics import OperatorMetrics
from gpumeter_operator.adapters.signals import Signals
from gpumeter_operator.adapters.starting import StartingWorkers
from gpumeter_operator.decide.names import HTTP_PORT
from gpumeter_operator.decide.workload import Installation
from gpumeter_operator.flow.fleet import Fleet
from gpumeter_operator.flow.looks import Looks
from gpumeter_operator.flow.reconcile import Reconciler, tell_event
from gpumeter_operator.flow.release import Releaser
from gpumeter_operator.flow.scale import Scaler
from gpumeter_operator.flow.scale_ports import NoDoors, OpenDoors

log = logging.getLogger(__name__)

OVERDUE_MIN_S = 60.0  # a service is looked at every few seconds; a minute without is a frozen loop


class Operation:
    """Everything that runs beside kopf."""

    def __init__(
        self,
        cluster: Cluster,
        installation: Installation,
        master_key: bytes,
        *,
        interval_s: float,
        deletion_margin: timedelta,
        http: tuple[str, int],
        open_doors: OpenDoors = NoDoors,
        worker_port: int = HTTP_PORT,
    ) -> None:
        self._cluster = cluster
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
            count=lambda reason: metrics.scalings.labels(reason=reason).inc(),
        )
        self._reconciler = Reconciler(
            cluster,
            self._fleet,
            installation,
            master_key,
            metrics,
            told=self._starting.told,
            autoscaler=self._scaler,
        )
        self._looks = Looks(lambda: self._services.objects, self._reconciler.is_due, self.look, interval_s=interval_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._releaser = Releaser(cluster, self._fleet, deletion_margin)
        self._health = HealthServer(self._wrong, self._fleet.unsynced, metrics.render)

    async def start(self) -> None:
        """Serve probes, then wait for the first lists: to decide with half a picture would delete and double."""
        await self._health.start(*self._http)
        await self._fleet.start()
        self._tasks = [
            asyncio.create_task(self._services.run(), name="mirror of services"),
            asyncio.create_task(self._scale(), name="autoscaler"),
            asyncio.create_task(self._doors.run(), name="gateways"),
            asyncio.create_task(self._looks.run(), name="looks"),
        ]

    async def stop(self) -> None:
        """End watches, server and connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._scaler.settle()
        await self._signals.close()
        await self._fleet.stop()
        await self._starting.close()
        await self._health.close()
        await self._cluster.close()

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
        self._reconciler.forget(service)
        try:
            await self._releaser.release(service)
        except (Refused, Unreachable) as problem:
            return f"cannot be released yet: {problem}"
        return None

    async def _bring(self, service: Manifest) -> None:
        await self._reconciler.reconcile(service)

    def _wake(self, references: Iterable[str]) -> None:
        self._scaler.wake(references)

    async def _scale(self) -> None:
        await self._services.synced()
        await self._scaler.run()

    def _wrong(self) -> str | None:
        return (
            self._fleet.silent()
            or self._services.silence()
            or self._reconciler.overdue(self._overdue_s)
            or (self._scaler.overdue() if self._tasks else None)
        )
