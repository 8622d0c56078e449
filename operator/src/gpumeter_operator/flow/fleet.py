"""What the cluster holds of our services, mirrored in memory.

Owns the mirrors of pods and owned objects, the index from a service to them, and which PricePlans there are. Does not
decide and does not write.
"""

import asyncio
from typing import Any

from gpumeter_operator.adapters.kubernetes import (
    DEPLOYMENTS,
    NETWORK_POLICIES,
    POD_DISRUPTION_BUDGETS,
    POD_MONITORS,
    PODS,
    PRICE_PLANS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Labels,
    Manifest,
)
from gpumeter_operator.adapters.mirror import Mirror, Source
from gpumeter_operator.adapters.packed import packed, unpacked, without_bulk
from gpumeter_operator.decide.names import MANAGED_BY, MANAGED_BY_LABEL, SERVICE_LABEL
from gpumeter_operator.flow.optional import OptionalMirror

Reference = tuple[str, str]  # namespace and name of a service

OWNED = (SERVICE_ACCOUNTS, SERVICES, POD_DISRUPTION_BUDGETS, NETWORK_POLICIES, DEPLOYMENTS)


class Fleet:
    """Pods and owned objects of all services, kept up to date by one watch per kind."""

    def __init__(self, source: Source) -> None:
        managed: Labels = {MANAGED_BY_LABEL: MANAGED_BY, SERVICE_LABEL: None}
        self._pods = Mirror(source, PODS, labels={SERVICE_LABEL: None}, on_item=self._take_pod, pack=without_bulk)
        self._owned = {one.kind: Mirror(source, one, labels=managed, on_item=self._count, pack=packed) for one in OWNED}
        self._index: dict[Reference, dict[str, Manifest]] = {}
        self._changes: dict[Reference, tuple[int, int]] = {}  # number of the last change, and of the objects
        self._change = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._monitors = OptionalMirror(source, POD_MONITORS, managed, on_item=self._count)
        # Nobody waits for them either: without prices everything is served and metered all the same.
        self._plans = OptionalMirror(source, PRICE_PLANS, {}, on_item=lambda former, now: None)

    async def start(self) -> None:
        """Start all watches and wait until each has its first list."""
        mirrors = self._mirrors()
        self._tasks = [asyncio.create_task(mirror.run(), name=f"mirror of {name}") for name, mirror in mirrors.items()]
        self._tasks.append(asyncio.create_task(self._monitors.run(), name="mirror of PodMonitor objects, if any"))
        self._tasks.append(asyncio.create_task(self._plans.run(), name="mirror of PricePlan objects"))
        await asyncio.gather(*(mirror.synced() for mirror in mirrors.values()))

    async def stop(self) -> None:
        """End all watches."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def has_pod_monitors(self) -> bool:
        """Whether the cluster has PodMonitors."""
        return self._monitors.mirror is not None

    def has_plan(self, name: str) -> bool | None:
        """Whether there is a PricePlan of this name; None while that cannot be told."""
        mirror = self._plans.mirror
        return None if mirror is None else ("", name) in mirror.objects

    def pods_of(self, namespace: str, service: str) -> list[Manifest]:
        """The pods labelled as this service's, of former namesakes too."""
        return list(self._index.get((namespace, service), {}).values())

    def version(self, namespace: str, service: str) -> int:
        """A number that grows whenever a pod or an owned object of this service has changed; 0 while it has none.

        The numbers are of one sequence for all services, so that one that comes again never shows a former number.
        """
        return self._changes.get((namespace, service), (0, 0))[0]

    def owned(self, manifest: Manifest) -> Manifest | None:
        """The observed object that a manifest is about."""
        metadata = manifest["metadata"]
        mirror = self._mirror(manifest["kind"])
        found = mirror.objects.get((metadata["namespace"], metadata["name"])) if mirror else None
        return None if found is None else unpacked(found)

    def learn(self, observed: Manifest) -> None:
        """Take what a write returned."""
        if mirror := self._mirror(observed["kind"]):
            mirror.learn(observed)

    def deployment(self, namespace: str, name: str) -> Manifest | None:
        """The Deployment of a service: identity, replicas and status."""
        return self._owned[DEPLOYMENTS.kind].objects.get((namespace, name))

    def unsynced(self) -> str | None:
        """A sentence while a first list is missing."""
        missing = [name for name, mirror in self._mirrors().items() if not mirror.is_synced]
        return f"The first list is missing of: {', '.join(missing)}." if missing else None

    def silent(self) -> str | None:
        """A sentence when a mirror is not fed any more."""
        sentences = (mirror.silence() for mirror in self._mirrors().values())
        return next((sentence for sentence in sentences if sentence is not None), None)

    def _mirror(self, kind: str) -> Mirror | None:
        return self._owned.get(kind) or self._monitors.mirror

    def _mirrors(self) -> dict[str, Mirror]:
        return {"pods": self._pods, **{f"{kind} objects": mirror for kind, mirror in self._owned.items()}}

    def _take_pod(self, former: Manifest | None, now: Manifest | None) -> None:
        """Kept pod by pod: an index that is made anew with each change costs their square while thousands start."""
        if former is not None:
            pods = self._index.get(_reference(former), {})
            pods.pop(former["metadata"]["name"], None)
            if not pods:
                self._index.pop(_reference(former), None)
        if now is not None:
            self._index.setdefault(_reference(now), {})[now["metadata"]["name"]] = now
        self._count(former, now)

    def _count(self, former: Manifest | None, now: Manifest | None) -> None:
        touched = [(_reference(one), more) for one, more in ((former, -1), (now, 1)) if one is not None]
        for reference, more in touched:
            self._change += 1
            self._changes[reference] = self._change, self._changes.get(reference, (0, 0))[1] + more
        for reference, _ in touched:
            if self._changes.get(reference, (0, 1))[1] == 0:
                del self._changes[reference]


def _reference(item: Manifest) -> Reference:
    metadata = item["metadata"]
    return metadata["namespace"], metadata["labels"][SERVICE_LABEL]


def controller_uid(observed: Manifest) -> str | None:
    """uid of the object that controls this one."""
    owners: list[dict[str, Any]] = observed["metadata"].get("ownerReferences") or []
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)
