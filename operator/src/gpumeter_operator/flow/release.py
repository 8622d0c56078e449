"""The end of an InferenceService: its workers hand over their last usage, then it may go.

Owns the wait between the deletion and the removal of the finalizer, and its limit. While the service exists the
collector knows its credentials, so workers can drain, seal and be acknowledged. Does not know kopf.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from gpumeter_operator.adapters.kubernetes import DEPLOYMENTS, INFERENCE_SERVICES, PODS, Manifest, Refused
from gpumeter_operator.decide.conditions import timestamp
from gpumeter_operator.decide.names import SERVICE_LABEL
from gpumeter_operator.decide.pods import belongs, exists
from gpumeter_operator.decide.spec import Problem, ServiceSpec
from gpumeter_operator.decide.status import changes, decide_leaving
from gpumeter_operator.flow.api import Api
from gpumeter_operator.flow.fleet import Fleet, controller_uid
from gpumeter_operator.flow.reconcile import announce, identity, tell_event, write_status

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5


class Releaser:
    """Ends services; waits in memory, reads the mirror, and asks the API server itself only before the last word."""

    def __init__(
        self,
        cluster: Api,
        fleet: Fleet,
        margin: timedelta,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster = cluster
        self._fleet = fleet
        self._margin = margin
        self._clock = clock
        # By uid, when something of a deleted service was first seen that nobody had deleted yet. Kept from one try to
        # the next: a deletion that is refused at every try still has its limit.
        self._begun: dict[str, datetime] = {}

    async def release(self, service: Manifest) -> None:
        """Return once no worker of the service is left, or once the limit has passed, which is then said."""
        spec = identity(service)
        deadline = datetime.fromisoformat(service["metadata"]["deletionTimestamp"])
        told: int | None = None
        while True:
            now, left, refused = self._clock(), self._pods(spec), ""
            deadline = max(deadline, self._deadline(service, spec, left, now))
            try:
                await self._delete_deployment(spec)
                if await self._is_over(spec):
                    log.info("%s: every worker has ended; the service may go.", spec.reference)
                    self._begun.pop(spec.uid, None)
                    return
                if now < deadline and told != len(left) and await self._tell(service, len(left), deadline, now):
                    told = len(left)
            except Refused as refusal:
                # Whoever refuses it, for whatever reason: a deletion that only hangs has no end and no explanation.
                if now < deadline:
                    raise
                refused = f" The API server refuses a part of it: {refusal.message.rstrip('.')}."
            if now >= deadline:
                await self._give_up(service, left, deadline, refused)
                self._begun.pop(spec.uid, None)
                return
            await asyncio.sleep(LOOK_EVERY_S)

    async def _delete_deployment(self, spec: ServiceSpec) -> None:
        if (deployment := self._undeleted(spec)) is not None:
            # In the background: the garbage collector ends its ReplicaSets and pods, each with its full grace period.
            await self._cluster.delete(DEPLOYMENTS, spec.name, spec.namespace, uid=deployment["metadata"]["uid"])

    def _undeleted(self, spec: ServiceSpec) -> Manifest | None:
        deployment = self._fleet.deployment(spec.namespace, spec.name)
        if deployment is None or "deletionTimestamp" in deployment["metadata"]:
            return None
        if controller_uid(deployment) not in (None, spec.uid):
            return None  # a namesake's
        return deployment

    def _pods(self, spec: ServiceSpec) -> list[Manifest]:
        return [pod for pod in self._fleet.pods_of(spec.namespace, spec.name) if belongs(pod, spec.uid) and exists(pod)]

    async def _is_over(self, spec: ServiceSpec) -> bool:
        """Whether nothing of the service runs any more."""
        if self._pods(spec) or self._fleet.deployment(spec.namespace, spec.name) is not None:
            return False
        # The API server itself is asked: a mirror may be a moment behind, the finalizer may not.
        pods = await self._cluster.list(PODS, spec.namespace, {SERVICE_LABEL: spec.name})
        return not any(belongs(pod, spec.uid) and exists(pod) for pod in pods)

    def _deadline(self, service: Manifest, spec: ServiceSpec, pods: list[Manifest], now: datetime) -> datetime:
        """Until when workers may take to hand over their usage; later than before where they were told later.

        A worker's time begins when its pod is deleted, not the service: an operator that was away tells it late. A
        pod's deletionTimestamp is the end of its grace period (k8s.io/apiserver, registry/rest/delete.go), and lasts
        over a restart of the operator. What nobody has deleted yet counts from when this operator first saw it.
        """
        if self._undeleted(spec) is not None or any("deletionTimestamp" not in pod["metadata"] for pod in pods):
            self._begun.setdefault(spec.uid, now)
        deleted = datetime.fromisoformat(service["metadata"]["deletionTimestamp"])
        # Pods made before an edit keep the grace period that they were made with.
        graces_s = [pod["spec"].get("terminationGracePeriodSeconds", 0) for pod in pods]
        ends = max(self._begun.get(spec.uid, deleted), deleted) + timedelta(
            seconds=max([spec.termination_grace_s, *graces_s])
        )
        marked = [pod["metadata"]["deletionTimestamp"] for pod in pods if "deletionTimestamp" in pod["metadata"]]
        return max([ends, *map(datetime.fromisoformat, marked)]) + self._margin

    async def _tell(self, service: Manifest, left: int, deadline: datetime, now: datetime) -> bool:
        """Write how many are left; False when the object changed meanwhile and the next look tells it."""
        metadata = service["metadata"]
        current = await self._cluster.get(INFERENCE_SERVICES, metadata["name"], metadata["namespace"])
        if current is None:
            return True
        former: dict[str, Any] = current.get("status") or {}
        generation = int(current["metadata"].get("generation", 0))
        status = decide_leaving(former, generation, left, timestamp(deadline), now)
        if not await write_status(self._cluster, current, status):
            return not changes(former, status)
        await announce(self._cluster, current, former, status["conditions"][0], now)
        return True

    async def _give_up(self, service: Manifest, left: list[Manifest], deadline: datetime, refused: str) -> None:
        names = ", ".join(sorted(pod["metadata"]["name"] for pod in left)) or "its Deployment"
        told = Problem(
            "ReleaseForced",
            f"At {timestamp(deadline)} the time to hand over usage was over, but {names} had not ended. The service "
            "goes all the same; usage that was not collected by then is booked as unaccounted and billed to nobody."
            f"{refused}",
        )
        await tell_event(self._cluster, service, told, False, self._clock())
