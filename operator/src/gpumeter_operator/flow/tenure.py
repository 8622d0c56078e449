"""The right to write, as long as the Lease lasts.

Owns the gate that every write of the operator passes, kopf's too. The gate reads the clock at each write, so that a
process that was frozen for a minute begins no write when it goes on, whatever it does first. A write that had passed
the gate before, and was frozen while it connected or was being sent, may still leave: what is written must bear that.
Whoever comes to a closed gate waits for the end of the process: an error would be logged, retried and told, and there
is nothing wrong. Does not know why the tenure lasts or ends.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from gpumeter_operator.adapters.kubernetes import Keep, Labels, Manifest, Manifests, Resource, whole
from gpumeter_operator.flow.api import Api
from gpumeter_operator.flow.scale_ports import Marks


class Kubernetes(Api, Marks, Protocol):
    """All that the operator asks of Kubernetes: adapters.kubernetes.Cluster."""

    async def close(self) -> None:
        """Close all connections."""
        ...


class Tenure:
    """Begins with the first `extend`, ends for good with `close` or when it is not extended in time."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._until_ns: int | None = None
        self._closed = False
        self._writing = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def extend(self, until_ns: int) -> None:
        """Writes are allowed until then."""
        self._until_ns = until_ns

    def close(self) -> None:
        """No write begins any more."""
        self._closed = True

    def over(self) -> bool:
        """Whether it has ended; once over, a tenure stays over. Nothing is ever written back as open, because two
        threads are here: the one that acts, and the one that keeps the Lease."""
        if self._until_ns is not None and self._clock_ns() >= self._until_ns:
            self._closed = True
        return self._closed

    def open(self) -> bool:
        """Whether a write may begin now."""
        return self._until_ns is not None and not self.over()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Around every write."""
        if not self.open():
            await asyncio.Event().wait()
        self._writing += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._writing -= 1
            if not self._writing:
                self._idle.set()

    async def idle(self, within_s: float) -> bool:
        """Whether all writes that had begun have ended, waiting for so long."""
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class InTenure:
    """A cluster that is written to only in a tenure; reading is free."""

    def __init__(self, cluster: Kubernetes, tenure: Tenure) -> None:
        self._cluster = cluster
        self._tenure = tenure

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest | None:
        """One object or None."""
        return await self._cluster.get(resource, name, namespace)

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Manifests:
        """All objects."""
        return await self._cluster.list(resource, namespace, labels)

    async def list_at(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Labels | None = None,
        keep: Keep = whole,
    ) -> tuple[Manifests, str]:
        """All objects, of each what `keep` makes of it, and the version at which the list was true."""
        return await self._cluster.list_at(resource, namespace, labels, keep)

    def watch(
        self, resource: Resource, namespace: str | None, labels: Labels | None, version: str
    ) -> AsyncIterator[tuple[str, Manifest]]:
        """Changes after `version`."""
        return self._cluster.watch(resource, namespace, labels, version)

    async def apply(
        self, manifest: Manifest, *, field_manager: str, subresource: str | None = None, only_new: bool = False
    ) -> Manifest:
        """Server-side apply."""
        async with self._tenure.writing():
            return await self._cluster.apply(
                manifest, field_manager=field_manager, subresource=subresource, only_new=only_new
            )

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest, *, subresource: str | None = None
    ) -> Manifest | None:
        """Merge patch."""
        async with self._tenure.writing():
            return await self._cluster.patch(resource, name, namespace, patch, subresource=subresource)

    async def patch_status(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest
    ) -> Manifest | None:
        """Merge patch of the status."""
        async with self._tenure.writing():
            return await self._cluster.patch_status(resource, name, namespace, patch)

    async def delete(
        self, resource: Resource, name: str, namespace: str | None = None, *, uid: str | None = None
    ) -> None:
        """Delete."""
        async with self._tenure.writing():
            await self._cluster.delete(resource, name, namespace, uid=uid)

    async def close(self) -> None:
        """Close all connections."""
        await self._cluster.close()
