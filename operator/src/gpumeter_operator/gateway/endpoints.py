"""Ready workers: where the requests of a service may go.

Owns the reading of EndpointSlices. A worker that is draining (terminating) or not ready gets nothing new. Does not know
how many requests a worker has; see routing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gpumeter_operator.decide.names import HTTP_PORT, HTTP_PORT_NAME, SLICE_OF_LABEL


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One worker's address for requests."""

    address: str
    port: int

    @property
    def origin(self) -> str:
        """The URL without a path; an IPv6 address stands in brackets."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}"


def endpoints_from(slices: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[Endpoint, ...]]:
    """Ready endpoints by (namespace, service name). Slices of other Services (NAME-usage) have keys of their own."""
    found: dict[tuple[str, str], dict[str, Endpoint]] = {}
    for item in sorted(slices, key=_families):
        metadata = item.get("metadata", {})
        name = (metadata.get("labels") or {}).get(SLICE_OF_LABEL)
        port = _http_port(item.get("ports") or ())
        if not name or port is None or item.get("addressType") == "FQDN":
            continue
        pods = found.setdefault((metadata.get("namespace", ""), name), {})
        for one in item.get("endpoints") or ():
            addresses = one.get("addresses") or ()
            if addresses and takes_new_requests(one.get("conditions") or {}):
                pod = (one.get("targetRef") or {}).get("uid") or addresses[0]
                pods.setdefault(pod, Endpoint(addresses[0], port))  # a dual-stack pod is one worker, not two
    return {key: tuple(sorted(pods.values())) for key, pods in found.items()}


def takes_new_requests(conditions: Mapping[str, Any]) -> bool:
    """Kubernetes' reading of an endpoint's conditions: an absent `ready` or `serving` counts as true."""
    if conditions.get("terminating"):
        return False
    return conditions.get("ready") is not False and conditions.get("serving") is not False


def _http_port(ports: Iterable[Mapping[str, Any]]) -> int | None:
    known = [port for port in ports if port.get("port")]
    for port in known:
        if port.get("name") == HTTP_PORT_NAME:
            return int(port["port"])
    return next((HTTP_PORT for port in known if port["port"] == HTTP_PORT), None)


def _families(item: Mapping[str, Any]) -> tuple[str, str]:
    return item.get("addressType", ""), item.get("metadata", {}).get("name", "")
