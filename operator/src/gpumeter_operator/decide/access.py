"""Who reaches a worker's ports, and who reads its metrics: its NetworkPolicy and its PodMonitor.

Owns both manifests. Who the peers are says the installation; does not know whether the cluster's network enforces
policies, nor whether it has Prometheus' operator.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumeter_operator.decide.names import HTTP_PORT, HTTP_PORT_NAME, SERVICE_LABEL, USAGE_PORT
from gpumeter_operator.decide.owned import Manifest, owned
from gpumeter_operator.decide.spec import ServiceSpec

POLICY_API = "networking.k8s.io/v1"
MONITOR_API = "monitoring.coreos.com/v1"
_DNS = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}


@dataclass(frozen=True, slots=True)
class Peers:
    """NetworkPolicyPeers that reach a worker's port of requests and metrics, and its port of usage.

    `egress` holds NetworkPolicyEgressRules; None where workers may reach whatever they like.
    """

    http: tuple[Mapping[str, Any], ...]
    usage: tuple[Mapping[str, Any], ...]
    egress: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Monitoring:
    """How Prometheus' operator is to find and to read workers."""

    labels: Mapping[str, str]
    interval: str


def network_policy(spec: ServiceSpec, peers: Peers) -> Manifest:
    """Only `peers` reach the workers; a kubelet's probes and port-forwards are not traffic that a policy stops."""
    outwards = {} if peers.egress is None else {"egress": [_DNS, *map(_said, peers.egress)]}
    return owned(
        spec,
        POLICY_API,
        "NetworkPolicy",
        spec.name,
        spec={
            "podSelector": {"matchLabels": {SERVICE_LABEL: spec.name}},
            "policyTypes": ["Ingress", *(["Egress"] if outwards else [])],
            "ingress": [_from(peers.http, HTTP_PORT), _from(peers.usage, USAGE_PORT)],
            **outwards,
        },
    )


def pod_monitor(spec: ServiceSpec, monitoring: Monitoring) -> Manifest:
    """Every worker is read by itself, for a Service would hide those that are not ready."""
    return owned(
        spec,
        MONITOR_API,
        "PodMonitor",
        spec.name,
        more_labels=monitoring.labels,
        spec={
            "selector": {"matchLabels": {SERVICE_LABEL: spec.name}},
            "podTargetLabels": [SERVICE_LABEL],
            "podMetricsEndpoints": [{"port": HTTP_PORT_NAME, "path": "/metrics", "interval": monitoring.interval}],
        },
    )


def _said(rule: Mapping[str, Any]) -> Manifest:
    """A rule with the one default that the API server would fill in, so that what it keeps is what was asked for."""
    return {**rule, **({"ports": [{"protocol": "TCP", **one} for one in rule["ports"]]} if rule.get("ports") else {})}


def _from(peers: tuple[Mapping[str, Any], ...], port: int) -> Manifest:
    return {"from": [dict(one) for one in peers], "ports": [{"port": port, "protocol": "TCP"}]}
