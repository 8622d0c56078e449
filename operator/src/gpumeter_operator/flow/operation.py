"""The running operator: its parts, put together, and their health.

Owns start, stop and what alive and ready mean. Does not know kopf, which calls `look` and `leave`.
"""

import logging
from datetime import timedelta

from gpumeter_operator.adapters.health import HealthServer
from gpumeter_operator.adapters.kubernetes import Cluster, Manifest, Refused, Unreachable
from gpumeter_operator.adapters.operator_metrics import OperatorMetrics
from gpumeter_operator.adapters.starting import StartingWorkers
from gpumeter_operator.decide.workload import Installation
from gpumeter_operator.flow.fleet import Fleet
from gpumeter_operator.flow.reconcile import Reconciler
from gpumeter_operator.flow.release import Releaser

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
    ) -> None:
        self._cluster = cluster
        self._http = http
        self._overdue_s = max(OVERDUE_MIN_S, 20 * interval_s)
        metrics = OperatorMetrics()
        self._fleet = Fleet(cluster)
        self._starting = StartingWorkers()
        self._reconciler = Reconciler(cluster, self._fleet, installation, master_key, metrics, told=self._starting.told)
        self._releaser = Releaser(cluster, self._fleet, deletion_margin)
        self._health = HealthServer(self._wrong, self._fleet.unsynced, metrics.render)

    async def start(self) -> None:
        """Serve probes, then wait for the first lists: to decide with half a picture would delete and double."""
        await self._health.start(*self._http)
        await self._fleet.start()

    async def stop(self) -> None:
        """End watches, server and connections."""
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
        self._reconciler.forget(service)
        try:
            await self._releaser.release(service)
        except (Refused, Unreachable) as problem:
            return f"cannot be released yet: {problem}"
        return None

    def _wrong(self) -> str | None:
        return self._fleet.silent() or self._reconciler.overdue(self._overdue_s)
