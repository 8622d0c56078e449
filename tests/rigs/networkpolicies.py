"""Which connection a cluster's NetworkPolicies let through, by the words of Kubernetes' own documents.

https://kubernetes.io/docs/concepts/services-networking/network-policies/ and the API reference of networking.k8s.io/v1.
Owns the meaning of policies alone: knows none of ours. What no policy can stop is not asked here: a kubelet's probes
and port-forwards, which come from the pod's own node.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod as policies see it. `ports` has the numbers of its named ports."""

    namespace: str
    labels: Mapping[str, str]
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, template: Manifest, namespace: str) -> "Pod":
        """The pod of a template in a namespace with the label that Kubernetes gives each."""
        ports = {
            port["name"]: port["containerPort"]
            for container in template["spec"]["containers"]
            for port in container.get("ports", ())
            if "name" in port
        }
        labels = template["metadata"]["labels"]
        return cls(namespace, labels, {"kubernetes.io/metadata.name": namespace}, ports)


@dataclass(frozen=True)
class Address:
    """Somebody who is no pod of the cluster."""

    ip: str


Party = Pod | Address


@dataclass(frozen=True)
class Connection:
    """Who opens it, and to what."""

    source: Party
    target: Party
    port: int
    protocol: str


def lets_through(policies: Iterable[Manifest], source: Party, target: Party, port: int, protocol: str = "TCP") -> bool:
    """Whether both ends allow it: the source's policies what goes out, the target's what comes in."""
    known = [one for one in policies if one["kind"] == "NetworkPolicy"]
    wanted = Connection(source, target, port, protocol)
    return _allows(known, "Egress", wanted) and _allows(known, "Ingress", wanted)


def _allows(policies: list[Manifest], way: str, wanted: Connection) -> bool:
    """A pod that no policy of this way selects is open; otherwise what any of them allows is allowed."""
    own, other = (wanted.target, wanted.source) if way == "Ingress" else (wanted.source, wanted.target)
    if isinstance(own, Address):
        return True
    selecting = [one for one in policies if way in _ways(one["spec"]) and _selects(one, own)]
    field_name, peers_name = ("ingress", "from") if way == "Ingress" else ("egress", "to")
    return not selecting or any(
        _is_port(rule.get("ports"), wanted) and _is_peer(rule.get(peers_name), other, policy)
        for policy in selecting
        for rule in policy["spec"].get(field_name) or ()
    )


def _ways(spec: Manifest) -> list[str]:
    return list(spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])])


def _selects(policy: Manifest, pod: Pod) -> bool:
    same = policy["metadata"]["namespace"] == pod.namespace
    return same and matches(policy["spec"].get("podSelector") or {}, pod.labels)


def _is_port(ports: Iterable[Manifest] | None, wanted: Connection) -> bool:
    """No ports named: every port. A name is the target's own."""

    def fits(one: Manifest) -> bool:
        number = one.get("port")
        if one.get("protocol", "TCP") != wanted.protocol:
            return False
        if isinstance(number, str):
            return isinstance(wanted.target, Pod) and wanted.target.ports.get(number) == wanted.port
        return number is None or number <= wanted.port <= one.get("endPort", number)

    return not ports or any(map(fits, ports))


def _is_peer(peers: Iterable[Manifest] | None, other: Party, policy: Manifest) -> bool:
    """No peers named: everybody. A peer with both selectors wants both; one of pods alone stays in the namespace."""

    def fits(one: Manifest) -> bool:
        if block := one.get("ipBlock"):
            inside = isinstance(other, Address) and ip_address(other.ip) in ip_network(block["cidr"])
            return inside and not any(ip_address(other.ip) in ip_network(each) for each in block.get("except") or ())
        if isinstance(other, Address):
            return False
        chosen = one.get("namespaceSelector")
        near = other.namespace == policy["metadata"]["namespace"]
        return (near if chosen is None else matches(chosen, other.namespace_labels)) and matches(
            one.get("podSelector") or {}, other.labels
        )

    return not peers or any(map(fits, peers))


def matches(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """A LabelSelector; an empty one matches everything."""

    def holds(one: Manifest) -> bool:
        value, among = labels.get(one["key"]), one.get("values") or ()
        return {
            "In": value in among,
            "NotIn": value not in among,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[one["operator"]]

    wanted = selector.get("matchLabels") or {}
    return wanted.items() <= labels.items() and all(map(holds, selector.get("matchExpressions") or ()))
