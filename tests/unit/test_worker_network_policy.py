"""Who reaches a worker's ports and reads its metrics, by the installation's choice."""

from typing import Any

from gpumeter_operator.decide.access import Monitoring, Peers
from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Installation, Workload, build

GATEWAY, OPERATOR, COLLECTOR = ({"podSelector": {"matchLabels": {"part": one}}} for one in ("g", "o", "c"))
PEERS = Peers(http=(GATEWAY, OPERATOR), usage=(COLLECTOR,))
ANYWHERE = {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]}


def built(*, monitored: bool = True, **choice: Any) -> Workload:
    metadata = {"namespace": "team-a", "name": "smollm2", "uid": "u-1", "generation": 1}
    spec, _ = read({"metadata": metadata, "spec": {"model": {"uri": "hf://o/n"}}})
    installation = Installation("worker:1", "IfNotPresent", "", **choice)
    return build(spec, 1, installation, credentials_of(b"k" * 32, "u-1"), monitored=monitored)


def of_kind(workload: Workload, kind: str) -> Any:
    [found] = [one for one in workload.others if one["kind"] == kind]
    return found


def absent(workload: Workload) -> set[str]:
    return {one["kind"] for one in workload.absent}


def test_requests_come_from_gateway_and_operator_and_usage_is_read_by_the_collector_alone() -> None:
    spec = of_kind(built(peers=PEERS), "NetworkPolicy")["spec"]
    assert spec["podSelector"] == {"matchLabels": {"gpumeter.io/inferenceservice": "smollm2"}}
    assert spec["ingress"] == [
        {"from": [GATEWAY, OPERATOR], "ports": [{"port": 8000, "protocol": "TCP"}]},
        {"from": [COLLECTOR], "ports": [{"port": 8001, "protocol": "TCP"}]},
    ]


def test_models_come_from_anywhere_unless_the_installation_says_from_where() -> None:
    spec = of_kind(built(peers=PEERS), "NetworkPolicy")["spec"]
    assert (spec["policyTypes"], "egress" in spec) == (["Ingress"], False)
    spec = of_kind(built(peers=Peers(PEERS.http, PEERS.usage, (ANYWHERE,))), "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"][1:] == [{**ANYWHERE, "ports": [{"port": 443, "protocol": "TCP"}]}], "as the server keeps it"
    assert {(one["port"], one["protocol"]) for one in spec["egress"][0]["ports"]} == {(53, "UDP"), (53, "TCP")}


def test_a_policy_is_there_before_the_pods_and_goes_when_it_is_not_wanted_any_more() -> None:
    kinds = [one["kind"] for one in built(peers=PEERS).others]
    assert kinds.index("NetworkPolicy") < kinds.index("Deployment") == len(kinds) - 1
    assert "NetworkPolicy" not in absent(built(peers=PEERS))
    assert "NetworkPolicy" in absent(built())


def test_a_pod_monitor_is_there_where_it_is_wanted_and_the_cluster_knows_what_it_is() -> None:
    monitoring = Monitoring({"release": "prometheus", "app.kubernetes.io/name": "mine"}, "30s")
    monitor = of_kind(built(monitoring=monitoring), "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["metadata"]["labels"]["app.kubernetes.io/name"] == "gpumeter-worker", "ours, by which it is found"
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "http", "path": "/metrics", "interval": "30s"}
    assert "PodMonitor" in absent(built())
    for wanted in (monitoring, None):
        elsewhere = built(monitoring=wanted, monitored=False)
        assert "PodMonitor" not in {one["kind"] for one in elsewhere.others} | absent(elsewhere)
