"""The operators' Lease at the API server (coordination.k8s.io/v1).

Owns how a Lease is read and written, and that no write goes over a version that was not read: creation fails where
there is one, a change carries the resource version. Decides nothing, and does not know who holds it.
"""

from datetime import UTC, datetime
from typing import Any

from gpumeter_operator.adapters.kubernetes import LEASES, Cluster, Manifest, Refused
from gpumeter_operator.decide.lease import Lease


class Leases:
    """One Lease. Raises Refused and Unreachable as `Cluster` does; `cluster` should be a connection of its own, so that
    a renewal never waits behind a thousand other requests."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name

    @property
    def reference(self) -> str:
        """NAMESPACE/NAME."""
        return f"{self._namespace}/{self._name}"

    async def read(self) -> Lease | None:
        """The Lease as the API server has it now, or None where there is none."""
        found = await self._cluster.get(LEASES, self._name, self._namespace)
        return None if found is None else _lease(found)

    async def write(self, lease: Lease) -> Lease | None:
        """Create (without a version) or change the Lease of this version; None where somebody was faster."""
        spec = {
            "holderIdentity": lease.holder,
            "leaseDurationSeconds": lease.duration_s,
            "acquireTime": lease.acquired,
            "renewTime": lease.renewed,
            "leaseTransitions": lease.transitions,
        }
        try:
            written = await (self._change(spec, lease.version) if lease.version else self._create(spec))
        except Refused as refusal:
            if refusal.status == 409:
                return None
            raise
        return None if written is None else _lease(written)

    async def close(self) -> None:
        """Close the connection."""
        await self._cluster.close()

    async def _create(self, spec: dict[str, Any]) -> Manifest:
        metadata = {"name": self._name, "namespace": self._namespace}
        return await self._cluster.create(
            {"apiVersion": LEASES.api_version, "kind": LEASES.kind, "metadata": metadata, "spec": spec}
        )

    async def _change(self, spec: dict[str, Any], version: str) -> Manifest | None:
        patch = {"metadata": {"resourceVersion": version}, "spec": spec}
        return await self._cluster.patch(LEASES, self._name, self._namespace, patch)


def stamp() -> str:
    """This machine's time as a Lease has it: RFC 3339 in UTC, to the microsecond."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _lease(found: Manifest) -> Lease:
    spec: dict[str, Any] = found.get("spec") or {}
    return Lease(
        holder=spec.get("holderIdentity") or "",
        duration_s=int(spec.get("leaseDurationSeconds") or 0),
        acquired=spec.get("acquireTime") or "",
        renewed=spec.get("renewTime") or "",
        transitions=int(spec.get("leaseTransitions") or 0),
        version=found["metadata"]["resourceVersion"],
    )
