"""What the operator's flows need of Kubernetes: the port that adapters.kubernetes.Cluster implements.

Owns the shape of the calls, so that a test can stand in for a cluster. Does nothing.
"""

from typing import Protocol

from gpumeter_operator.adapters.kubernetes import Labels, Manifest, Manifests, Resource
from gpumeter_operator.adapters.mirror import Source


class Api(Source, Protocol):
    """Reads, server-side applies, patches and deletions, each refused or unreachable by exception."""

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest | None:
        """One object or None."""
        ...

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Manifests:
        """All objects, as the API server knows them now."""
        ...

    async def apply(
        self, manifest: Manifest, *, field_manager: str, subresource: str | None = None, only_new: bool = False
    ) -> Manifest:
        """Server-side apply; with `only_new` Refused 409 where there is an object of this name."""
        ...

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest, *, subresource: str | None = None
    ) -> Manifest | None:
        """Merge patch; None where the object is gone."""
        ...

    async def patch_status(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest
    ) -> Manifest | None:
        """Merge patch of the status; None where the object is gone."""
        ...

    async def delete(
        self, resource: Resource, name: str, namespace: str | None = None, *, uid: str | None = None
    ) -> None:
        """Delete; absent is fine."""
        ...
