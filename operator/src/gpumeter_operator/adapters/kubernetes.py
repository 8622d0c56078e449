"""Kubernetes, as plain dicts: requests and a watch.

Owns the connections, the names of resources, request timeouts and the translation of every failure into two
exceptions, `Refused` (the API server said no, with its sentence) and `Unreachable` (it did not answer).
Does not know what any of the objects mean. metadata.managedFields are left out of lists and watches: nobody here reads
them, and they are half of an object. How deep an object may be is said where processes start (cli.main).
"""

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
from yarl import URL

from gpumeter_operator.adapters import access

Manifest = dict[str, Any]
Decoded = TypeVar("Decoded")
Manifests = list[Manifest]
Keep = Callable[[Manifest], Manifest]
"""What stays of an object."""
Labels = Mapping[str, str | None]
"""A label selector: a value that must be equal, or None where it is enough that the label exists."""

REQUEST_TIMEOUT_S = 10.0  # the API server ends its own work on a request after 60 s; a healthy one answers in 1 s
WATCH_TIMEOUT_S = 300  # after this the server ends a watch; spreads reconnections, as client-go does with 5-10 min
SILENCE_TIMEOUT_S = 150.0  # bookmarks come about once a minute; a watch silent for longer is a dead connection
PAGE_SIZE = 500  # objects per page of a list, client-go's size: bounds memory of both sides
IDLE_S = 60.0  # a connection is kept so long; the API server ends it after 90 s
ENDED_AT_ONCE_S = 1.0  # a watch that the server ends sooner, without a word, is broken and not over


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


_APPLY, _MERGE, _JSON = "application/apply-patch+yaml", "application/merge-patch+json", "application/json"
# A version that no object has: the first write into an empty etcd makes revision 2. In an apply it is a condition on
# an object that exists (409 where it has another), and none on one that does not: k8s.io/apiserver,
# registry/generic/registry/store.go, Update. A POST would refuse as well, but its fields would be owned by an update
# and not by our applies, which could then never take one back.
_NEVER = "1"
_REFUSAL_MAX = 300  # characters of an answer that is not in the API server's form
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


class Refused(Exception):
    """The API server answered no. `reason` is its word (Conflict, Forbidden, ...), `message` its sentence."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{reason} ({status}): {message}")
        self.status = status
        self.reason = reason
        self.message = message


class Unreachable(Exception):
    """The API server did not answer, or what answered was not an API server."""


def whole(item: Manifest) -> Manifest:
    """The object as it is, for those who keep all of it."""
    return item


class _Metadata(msgspec.Struct):
    resourceVersion: str = ""
    continued: str = msgspec.field(name="continue", default="")


class _Page(msgspec.Struct):
    metadata: _Metadata
    items: list[dict[str, Any]] | None = None


class _Change(msgspec.Struct):
    type: str
    object: dict[str, Any]


class _Status(msgspec.Struct):
    """How the API server says no."""

    reason: str = ""
    message: str = ""
    code: int = 0


class Cluster:
    """One connection pool to one API server. Objects in and out are plain dicts."""

    def __init__(self, way: access.Access) -> None:
        self._access = way
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def connect(cls, kubeconfig: Path | None = None, context: str | None = None) -> "Cluster":
        """Connect as the pod's service account, or by $KUBECONFIG or ~/.kube/config, or by the given file."""
        try:
            return cls(access.find(kubeconfig, context))
        except access.AccessInvalid as problem:
            raise Unreachable(
                f"No way to a cluster is configured: {problem}; set KUBECONFIG or run inside a pod."
            ) from problem

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest | None:
        """The object, or None where there is none of this name."""
        try:
            return await self._object("GET", _path(resource, namespace, name))
        except Refused as refusal:
            if refusal.status == 404:
                return None
            raise

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Manifests:
        """All objects, of one namespace or of all."""
        return (await self.list_at(resource, namespace, labels))[0]

    async def list_at(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Labels | None = None,
        keep: Keep = whole,
    ) -> tuple[Manifests, str]:
        """All objects, of each what `keep` makes of it, and the version at which the list was true, for `watch`."""
        path, query = _path(resource, namespace), {"limit": str(PAGE_SIZE), **_selector(labels)}
        found: Manifests = []
        while True:
            page = _decoded(await self._answer("GET", path, query), _PAGE)
            # Page by page: of a list of thousands the managed fields are hundreds of megabytes; and the little that is
            # kept, put among all the rest, would keep its memory from being given back.
            found += [
                keep(_slim({**item, "apiVersion": resource.api_version, "kind": resource.kind}))
                for item in page.items or ()
            ]
            if not page.metadata.continued:
                return found, page.metadata.resourceVersion
            query["continue"] = page.metadata.continued

    async def watch(
        self, resource: Resource, namespace: str | None, labels: Labels | None, version: str
    ) -> AsyncIterator[tuple[str, Manifest]]:
        """Changes after `version` as (ADDED | MODIFIED | DELETED | BOOKMARK, object); reconnects by itself.

        Raises Refused 410 when `version` is too old, Unreachable when the connection broke or fell silent.
        """
        path = _path(resource, namespace)
        asked = {"watch": "true", "timeoutSeconds": str(WATCH_TIMEOUT_S), "allowWatchBookmarks": "true"}
        while True:
            begun_s, told = time.monotonic(), False
            query = {**asked, "resourceVersion": version, **_selector(labels)}
            async with self._answering("GET", path, query, silence_s=SILENCE_TIMEOUT_S) as response:
                async for line in _lines(response):
                    change, told = _decoded(line, _CHANGE), True
                    if change.type == "ERROR":
                        raise _refused(msgspec.convert(change.object, _Status))
                    version = change.object["metadata"]["resourceVersion"]
                    yield change.type, _slim(change.object)
            if not told and time.monotonic() - begun_s < ENDED_AT_ONCE_S:
                raise Unreachable("the API server ended a watch as soon as it was asked for")

    async def create(self, manifest: Manifest) -> Manifest:
        """Create an object that must not be there yet: Refused 409 where it is."""
        resource = RESOURCES[manifest["apiVersion"], manifest["kind"]]
        return await self._object("POST", _path(resource, manifest["metadata"].get("namespace")), None, manifest, _JSON)

    async def apply(
        self, manifest: Manifest, *, field_manager: str, subresource: str | None = None, only_new: bool = False
    ) -> Manifest:
        """Server-side apply with force: fields in the manifest become ours, fields of others stay as they are.

        With `only_new` nothing that exists is changed: Refused 409 where there is an object of this name, whoever's.
        """
        if only_new:
            manifest = {**manifest, "metadata": {**manifest["metadata"], "resourceVersion": _NEVER}}
        metadata = manifest["metadata"]
        path = _path(
            RESOURCES[manifest["apiVersion"], manifest["kind"]],
            metadata.get("namespace"),
            metadata["name"],
            subresource,
        )
        return await self._object("PATCH", path, {"fieldManager": field_manager, "force": "true"}, manifest, _APPLY)

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest, *, subresource: str | None = None
    ) -> Manifest | None:
        """Merge patch (lists are replaced whole); None where the object is gone.

        With metadata.resourceVersion in the patch the server refuses (409) to change anything newer.
        """
        try:
            return await self._object("PATCH", _path(resource, namespace, name, subresource), None, patch, _MERGE)
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
        options: Manifest = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        try:
            await self._answer("DELETE", _path(resource, namespace, name), None, options, _JSON)
        except Refused as refusal:
            if refusal.status == 404 or (uid is not None and refusal.status == 409):
                return
            raise

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def _object(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content: str = "",
    ) -> Manifest:
        return _decoded(await self._answer(method, path, query, body, content), _OBJECT)

    async def _answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content: str = "",
    ) -> bytes:
        async with self._answering(method, path, query, body, content) as response:
            return await response.read()

    @asynccontextmanager
    async def _answering(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content: str = "",
        *,
        silence_s: float = REQUEST_TIMEOUT_S,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that is none of refusal, to be read within the block; every failure in there is translated too."""
        url = URL(f"{self._access.server}{path}{f'?{urlencode(query)}' if query else ''}", encoded=True)
        data = None if body is None else msgspec.json.encode(body)
        with _translated(silence_s):
            for refused in (False, True):
                headers = {"Accept": _JSON, **({"Content-Type": content} if content else {})}
                if authorization := await self._access.authorization(refused):
                    headers["Authorization"] = authorization
                async with self._connections().request(
                    method,
                    url,
                    data=data,
                    headers=headers,
                    timeout=_timeout(silence_s),
                    proxy=self._access.proxy,
                    server_hostname=self._access.server_name,
                    allow_redirects=False,
                ) as response:
                    if response.status == 401 and not refused:
                        continue  # a token may have been renewed meanwhile
                    if not 200 <= response.status < 300:
                        raise _refusal(response.status, response.reason or "", await response.read())
                    yield response
                    return

    def _connections(self) -> aiohttp.ClientSession:
        # Made in the loop that uses it, which is not the one, or the moment, of `connect`.
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # Without a limit: each watch holds one, and who writes much is bounded by its own rule.
                connector=aiohttp.TCPConnector(ssl=self._access.tls or True, limit=0, keepalive_timeout=IDLE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                # Answers of a network's length are not worth the time that both sides take to compress them.
                skip_auto_headers=("Accept-Encoding",),
                trust_env=any(os.environ.get(name) for name in _PROXIES),
            )
        return self._session


@contextmanager
def _translated(silence_s: float) -> Iterator[None]:
    """Turn every failure of the client library into Refused or Unreachable, once and only here."""
    try:
        yield
    except aiohttp.ServerTimeoutError as error:
        raise Unreachable(f"nothing was heard for {silence_s:.0f} s ({type(error).__name__})") from error
    except TimeoutError as error:
        raise Unreachable(f"no answer within {silence_s:.0f} s ({type(error).__name__})") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error
    except access.AccessInvalid as error:
        raise Unreachable(f"the credentials cannot be used: {error}") from error


_OBJECT: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])
_PAGE: msgspec.json.Decoder[_Page] = msgspec.json.Decoder(_Page)
_CHANGE: msgspec.json.Decoder[_Change] = msgspec.json.Decoder(_Change)
_STATUS: msgspec.json.Decoder[_Status] = msgspec.json.Decoder(_Status)


def _decoded(body: bytes, decoder: msgspec.json.Decoder[Decoded]) -> Decoded:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise Unreachable(f"what answered is not an API server ({type(error).__name__}: {error})") from error


def _refusal(status: int, reason: str, body: bytes) -> Refused:
    """A refusal in the API server's own words; a proxy's has none."""
    try:
        told = _STATUS.decode(body)
    except msgspec.DecodeError:
        told = _Status()
    text = told.message or body[:_REFUSAL_MAX].decode(errors="replace").strip() or f"HTTP {status}"
    return Refused(status, told.reason or reason or "Unknown", text)


def _refused(told: _Status) -> Refused:
    return Refused(told.code, told.reason or "Unknown", told.message)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Lines of any length: an object may be a megabyte, and the library's own reader ends at 128 KiB."""
    held = bytearray()
    async for chunk in response.content.iter_any():
        first, *others = chunk.split(b"\n")
        held += first
        for following in others:
            if held:
                yield bytes(held)
            held = bytearray(following)


def _slim(item: Manifest) -> Manifest:
    item["metadata"].pop("managedFields", None)
    return item


@cache
def _timeout(silence_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_TIMEOUT_S, sock_read=silence_s)


def _path(resource: Resource, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
    """The path of an object, or of a collection: in one namespace, or in all of them."""
    parts = [_base(resource)]
    if resource.namespaced and namespace is not None:
        parts.append(f"namespaces/{quote(namespace, safe='')}")
    elif resource.namespaced and name is not None:
        raise ValueError(f"{resource.kind} {name} is asked for without its namespace")
    parts.append(resource.plural)
    parts += [quote(one, safe="") for one in (name, subresource) if one is not None]
    return "/".join(parts)


@cache
def _base(resource: Resource) -> str:
    return f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"


def _selector(labels: Labels | None) -> dict[str, str]:
    if not labels:
        return {}
    return {"labelSelector": ",".join(name if value is None else f"{name}={value}" for name, value in labels.items())}
