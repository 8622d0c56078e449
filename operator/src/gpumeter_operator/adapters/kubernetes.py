"""Kubernetes, as plain dicts: requests and a watch.

Owns the connection, the names of resources, request timeouts and the translation of every failure into two
exceptions, `Refused` (the API server said no, with its sentence) and `Unreachable` (it did not answer).
Does not know what any of the objects mean.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import msgspec
from lightkube import AsyncClient, KubeConfig
from lightkube.core.exceptions import ApiError, ConfigError
from lightkube.core.selector import build_selector
from lightkube.generic_resource import create_global_resource, create_namespaced_resource
from lightkube.types import PatchType

Manifest = dict[str, Any]
Manifests = list[Manifest]
Labels = Mapping[str, str | None]
"""A label selector: a value that must be equal, or None where it is enough that the label exists."""

REQUEST_TIMEOUT_S = 10.0  # the API server ends its own work on a request after 60 s; a healthy one answers in 1 s
WATCH_TIMEOUT_S = 300  # after this the server ends a watch; spreads reconnections, as client-go does with 5-10 min
SILENCE_TIMEOUT_S = 150.0  # bookmarks come about once a minute; a watch silent for longer is a dead connection
PAGE_SIZE = 500  # objects per page of a list, client-go's size: bounds memory of both sides


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object as the API server knows it; `group` is empty for the core group."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """`group/version`, or only the version for the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version


INFERENCE_SERVICES = Resource("gpumeter.io", "v1alpha1", "InferenceService", "inferenceservices")
USAGE_REPORTS = Resource("gpumeter.io", "v1alpha1", "UsageReport", "usagereports")
PRICE_PLANS = Resource("gpumeter.io", "v1alpha1", "PricePlan", "priceplans", namespaced=False)
PODS = Resource("", "v1", "Pod", "pods")
SECRETS = Resource("", "v1", "Secret", "secrets")
SERVICES = Resource("", "v1", "Service", "services")
SERVICE_ACCOUNTS = Resource("", "v1", "ServiceAccount", "serviceaccounts")
CONFIG_MAPS = Resource("", "v1", "ConfigMap", "configmaps")
EVENTS = Resource("", "v1", "Event", "events")
NAMESPACES = Resource("", "v1", "Namespace", "namespaces", namespaced=False)
DEPLOYMENTS = Resource("apps", "v1", "Deployment", "deployments")
POD_DISRUPTION_BUDGETS = Resource("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies")
POD_MONITORS = Resource("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors")  # of Prometheus' operator
ENDPOINT_SLICES = Resource("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices")
LEASES = Resource("coordination.k8s.io", "v1", "Lease", "leases")

RESOURCES: Mapping[tuple[str, str], Resource] = {
    (resource.api_version, resource.kind): resource
    for resource in list(globals().values())
    if isinstance(resource, Resource)
}


class Refused(Exception):
    """The API server answered no. `reason` is its word (Conflict, Forbidden, ...), `message` its sentence."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{reason} ({status}): {message}")
        self.status = status
        self.reason = reason
        self.message = message


class Unreachable(Exception):
    """The API server did not answer, or what answered was not an API server."""


class Cluster:
    """One connection pool to one API server. Objects in and out are plain dicts."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @classmethod
    def connect(cls, kubeconfig: Path | None = None, context: str | None = None) -> "Cluster":
        """Connect as the pod's service account, or by $KUBECONFIG or ~/.kube/config, or by the given file."""
        try:
            config = KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_env()
            chosen = config.get(context)
        except (ConfigError, KeyError) as problem:
            raise Unreachable(
                f"No way to a cluster is configured: {problem}; set KUBECONFIG or run inside a pod."
            ) from problem
        return cls(AsyncClient(chosen, timeout=httpx2.Timeout(REQUEST_TIMEOUT_S)))

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest | None:
        """The object, or None where there is none of this name."""
        try:
            with _translated():
                return dict(await self._client.get(_class(resource), name, namespace=namespace))
        except Refused as refusal:
            if refusal.status == 404:
                return None
            raise

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Manifests:
        """All objects, of one namespace or of all."""
        return (await self.list_at(resource, namespace, labels))[0]

    async def list_at(
        self, resource: Resource, namespace: str | None = None, labels: Labels | None = None
    ) -> tuple[Manifests, str]:
        """All objects and the resource version at which the list was true, for `watch` to go on from."""
        with _translated():
            pages = self._client.list(
                _class(resource),
                namespace=_scope(resource, namespace),
                chunk_size=PAGE_SIZE,
                labels=dict(labels) if labels else None,
            )
            objects = [dict(item, apiVersion=resource.api_version, kind=resource.kind) async for item in pages]
            return objects, pages.resourceVersion

    async def watch(
        self, resource: Resource, namespace: str | None, labels: Labels | None, version: str
    ) -> AsyncIterator[tuple[str, Manifest]]:
        """Changes after `version` as (ADDED | MODIFIED | DELETED | BOOKMARK, object); reconnects by itself.

        Raises Refused 410 when `version` is too old, Unreachable when the connection broke or fell silent.
        """
        # The public watch() of lightkube cannot ask for bookmarks, and without them a quiet resource cannot be told
        # from a dead connection. So the request is prepared one level below.
        generic = self._client._client
        request = generic.prepare_request(
            "list",
            res=_class(resource),
            namespace=_scope(resource, namespace),
            watch=True,
            params={
                "timeoutSeconds": WATCH_TIMEOUT_S,
                "resourceVersion": version,
                "allowWatchBookmarks": "true",
                "labelSelector": build_selector(dict(labels)) if labels else None,
            },
        )
        async with aclosing(generic.watch(request)) as changes:
            while True:
                with _translated():
                    async with asyncio.timeout(SILENCE_TIMEOUT_S):
                        change, item = await anext(changes)
                yield change, dict(item)

    async def create(self, manifest: Manifest) -> Manifest:
        """Create an object that must not be there yet: Refused 409 where it is."""
        resource = RESOURCES[manifest["apiVersion"], manifest["kind"]]
        with _translated():
            namespace = manifest["metadata"].get("namespace")
            made: Any = await self._client.create(_class(resource)(manifest), namespace=namespace)  # type: ignore[call-overload]
            return dict(made)

    async def apply(self, manifest: Manifest, *, field_manager: str, subresource: str | None = None) -> Manifest:
        """Server-side apply with force: fields in the manifest become ours, fields of others stay as they are."""
        resource = RESOURCES[manifest["apiVersion"], manifest["kind"]]
        with _translated():
            return dict(
                await self._client.patch(
                    _class(resource, subresource),
                    manifest["metadata"]["name"],
                    manifest,
                    namespace=manifest["metadata"].get("namespace"),
                    patch_type=PatchType.APPLY,
                    field_manager=field_manager,
                    force=True,
                )
            )

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest, *, subresource: str | None = None
    ) -> Manifest | None:
        """Merge patch (lists are replaced whole); None where the object is gone.

        With metadata.resourceVersion in the patch the server refuses (409) to change anything newer.
        """
        try:
            with _translated():
                return dict(
                    await self._client.patch(
                        _class(resource, subresource), name, patch, namespace=namespace, patch_type=PatchType.MERGE
                    )
                )
        except Refused as refusal:
            if refusal.status == 404:
                return None
            raise

    async def patch_status(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest
    ) -> Manifest | None:
        """Merge patch on the status subresource; None where the object is gone."""
        return await self.patch(resource, name, namespace, patch, subresource="status")

    async def delete(
        self, resource: Resource, name: str, namespace: str | None = None, *, uid: str | None = None
    ) -> None:
        """Delete, and let the garbage collector delete what it owned. An absent object is fine.

        With `uid` only that very object: a namesake made meanwhile stays, and counts as absent.
        """
        generic = self._client._client
        options: Manifest = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        try:
            with _translated():
                # lightkube's delete() has no preconditions, so the options travel as the body of the same request.
                request = generic.prepare_request("delete", res=_class(resource), name=name, namespace=namespace)
                request.data = options
                response = await generic.send(generic.build_adapter_request(request))  # type: ignore[no-untyped-call]
                generic.raise_for_status(response)  # type: ignore[no-untyped-call]
        except Refused as refusal:
            if refusal.status == 404 or (uid is not None and refusal.status == 409):
                return
            raise

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()


@contextmanager
def _translated() -> Iterator[None]:
    """Turn every failure of the client library into Refused or Unreachable, once and only here."""
    try:
        yield
    except ApiError as error:
        status = error.status
        raise Refused(status.code or 0, status.reason or "Unknown", status.message or str(error)) from error
    except httpx2.HTTPStatusError as error:  # a refusal without a Status object: a proxy's, or a watch's
        raise Refused(error.response.status_code, error.response.reason_phrase or "Unknown", str(error)) from error
    except TimeoutError as error:
        raise Unreachable(f"nothing was heard for {SILENCE_TIMEOUT_S:.0f} s") from error
    except httpx2.TimeoutException as error:
        raise Unreachable(f"no answer within {REQUEST_TIMEOUT_S:.0f} s ({type(error).__name__})") from error
    except httpx2.HTTPError as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error
    except (msgspec.DecodeError, KeyError) as error:  # KeyError: an answer without Content-Type
        raise Unreachable(f"what answered is not an API server ({type(error).__name__}: {error})") from error
    except ConfigError as error:
        raise Unreachable(f"the credentials cannot be used: {error}") from error


def _class(resource: Resource, subresource: str | None = None) -> Any:
    whole = _whole(resource)
    return whole if subresource is None else getattr(whole, subresource.capitalize())


@cache  # lightkube registers a class for a kind once, and refuses a second one
def _whole(resource: Resource) -> Any:
    create = create_namespaced_resource if resource.namespaced else create_global_resource
    return create(resource.group, resource.version, resource.kind, resource.plural)


def _scope(resource: Resource, namespace: str | None) -> str | None:
    return "*" if resource.namespaced and namespace is None else namespace
