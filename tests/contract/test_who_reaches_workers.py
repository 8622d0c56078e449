"""Who reaches which port of a worker: the chart's own pods against the policies that the operator makes of its values.

The local cluster's network enforces no policies, so what one would lock out is reckoned here, with the labels,
namespaces and ports that helm and the operator really write.
"""

import inspect
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from charts import NAMESPACE, environment, one, pod_specs, rendered
from gpumeter_operator.adapters.signals import Signals
from gpumeter_operator.adapters.starting import StartingWorkers
from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.development import PORT as NOTEBOOK
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Workload, build
from gpumeter_operator.gateway.endpoints import endpoints_from
from gpumeter_operator.settings import read_settings
from gpumeter_worker.settings import from_environment
from rigs.networkpolicies import Address, Manifest, Party, Pod, lets_through

pytestmark = pytest.mark.shared

TEAM = "team-a"
SIDE = 9000  # of a container that a user's template adds
PARTS = ("gateway", "operator", "collector")
SCRAPERS = "workers.networkPolicy.scrapers[0].namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name=prom"
EGRESS = ("egress[0].ports[0].port=443", "egress[0].to[0].ipBlock.cidr=198.51.100.0/24")
TEMPLATE = {
    "metadata": {"labels": {"mine": "too"}},
    "spec": {"containers": [{"name": "side", "image": "side:1", "ports": [{"name": "side", "containerPort": SIDE}]}]},
}
MODELS, STRANGER = Address("198.51.100.7"), Address("203.0.113.9")


@dataclass(frozen=True)
class World:
    """One release, one service, and everybody who may want to reach its worker."""

    workload: Workload
    policies: tuple[Manifest, ...]
    worker: Pod
    others: dict[str, Party]

    def ports(self, name: str) -> set[int]:
        """Those of a worker's ports that somebody reaches."""
        every = (*self.worker.ports.values(), NOTEBOOK)
        return {port for port in every if lets_through(self.policies, self.others[name], self.worker, port)}


def world(folder: Path, *settings: str, release: str = "gpumeter", **spec: Any) -> World:
    found = chart(settings, release)
    (folder / "key").write_bytes(b"k" * 32)
    told = {"GPUMETER_NAMESPACE": NAMESPACE, "GPUMETER_MASTER_KEY_FILE": str(folder / "key")}
    name = next(name for name in pod_specs(found) if name.endswith("-operator"))
    installation = read_settings(environment(pod_specs(found)[name]) | told).installation
    workloads = {}
    for service in ("smollm2", "other"):
        metadata = {"namespace": TEAM, "name": service, "uid": f"u-{service}", "generation": 1}
        wanted, problems = read(
            {"metadata": metadata, "spec": {"model": {"uri": "hf://o/n"}, "template": TEMPLATE} | spec}
        )
        assert problems == ()
        installation = replace(installation, development_image="development:1")
        workloads[service] = build(wanted, 1, installation, credentials_of(b"k" * 32, wanted.uid))
    worker, beside = (Pod.of(one.deployment["spec"]["template"], TEAM) for one in workloads.values())
    parts = {part: Pod.of(template_of(found, part), NAMESPACE) for part in PARTS}
    elsewhere = {"kubernetes.io/metadata.name": "elsewhere"}
    others: dict[str, Party] = {
        **parts,
        "a worker of the same service": worker,
        "a worker of another service": beside,
        "a pod of the team": Pod(TEAM, {"app": "shell"}, worker.namespace_labels),
        **{f"a pod of the team that calls itself {part}": replace(worker, labels=parts[part].labels) for part in PARTS},
        "a pod beside the release": replace(parts["gateway"], labels={"app": "shell"}),
        **{
            f"the {part} of a release of the same name elsewhere": replace(
                parts[part], namespace="elsewhere", namespace_labels=elsewhere
            )
            for part in PARTS
        },
        **{
            f"the {part} of another release beside it": Pod.of(template_of(chart((), "another"), part), NAMESPACE)
            for part in PARTS
        },
        "prometheus": Pod("prom", {"app": "prometheus"}, {"kubernetes.io/metadata.name": "prom"}),
        "somebody outside": STRANGER,
    }
    made = [one for workload in workloads.values() for one in workload.others]
    return World(workloads["smollm2"], (*made, *in_namespace(found)), worker, others)


@cache
def chart(settings: tuple[str, ...], release: str) -> list[dict[str, Any]]:
    return rendered(*settings, release=release)


def in_namespace(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chart's objects, in the release's namespace where they name none."""
    return [one | {"metadata": {"namespace": NAMESPACE} | one["metadata"]} for one in found]


def template_of(found: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """The pod template of the Deployment of one part."""
    [name] = [each for each in pod_specs(found) if each.endswith(f"-{part}")]
    template: dict[str, Any] = one(found, "Deployment", name)["spec"]["template"]
    return template


@pytest.mark.parametrize(
    ("settings", "release"),
    [((), "gpumeter"), ((), "prod"), (("nameOverride=meter", "gateway.podLabels.team=ml"), "2024")],
)
@pytest.mark.parametrize("jupyter", [False, True])
def test_each_part_reaches_its_port_of_a_worker_and_nobody_else_reaches_any(
    tmp_path: Path, settings: tuple[str, ...], release: str, jupyter: bool
) -> None:
    there = world(tmp_path, *settings, release=release, development={"jupyter": jupyter})
    there = replace(there, worker=replace(there.worker, ports={"http": 8000, "usage": 8001, "side": SIDE}))
    allowed = {"gateway": {8000}, "operator": {8000}, "collector": {8001}}
    assert {name: ports for name in there.others if (ports := there.ports(name))} == allowed


def test_whoever_is_named_as_a_scraper_reads_metrics_and_no_usage(tmp_path: Path) -> None:
    there = world(tmp_path, SCRAPERS)
    assert {name for name in there.others if there.ports(name)} == {*PARTS, "prometheus"}
    assert there.ports("prometheus") == {8000}


def test_without_policies_everybody_reaches_everything(tmp_path: Path) -> None:
    there = world(tmp_path, "workers.networkPolicy.enabled=false")
    everything = {8000, 8001, SIDE, NOTEBOOK}
    assert {name: there.ports(name) for name in there.others} == dict.fromkeys(there.others, everything)


def test_a_worker_reaches_what_it_likes_until_it_is_said_where_models_come_from(tmp_path: Path) -> None:
    def reached(there: World) -> list[bool]:
        wanted = ((MODELS, 443, "TCP"), (STRANGER, 443, "TCP"), (MODELS, 80, "TCP"), (STRANGER, 53, "UDP"))
        return [lets_through(there.policies, there.worker, *one) for one in wanted]

    assert reached(world(tmp_path)) == [True] * 4
    said = world(tmp_path, *(f"workers.networkPolicy.{one}" for one in EGRESS))
    assert reached(said) == [True, False, False, True]
    assert said.ports("collector") == {8001}, "answers are no connection of their own"


def test_the_ports_are_those_where_a_worker_listens_and_where_it_is_asked(tmp_path: Path) -> None:
    there = world(tmp_path)
    for name in ("usage-token", "hop-key"):
        (tmp_path / name).write_text("t" * 64)
    [container] = [one for one in there.workload.deployment["spec"]["template"]["spec"]["containers"] if "args" in one]
    told = {one["name"]: one.get("value", "uid") for one in container["env"]}
    worker = from_environment(told | {"GPUMETER_CREDENTIALS_DIR": str(tmp_path)})
    assert there.worker.ports == {"http": worker.http_port, "usage": worker.usage_port, "side": SIDE}
    assert there.ports("collector") == {worker.usage_port} == {Target("10.0.0.1", "t").port}
    for asking in (Signals, StartingWorkers):
        assert there.ports("operator") == {worker.http_port} == {inspect.signature(asking).parameters["port"].default}
    assert there.ports("gateway") == {worker.http_port} == {gateways_port(there)}


def gateways_port(there: World) -> int:
    """Where the gateway asks, by the EndpointSlice that Kubernetes makes of the service's Service."""
    service = one(there.workload.others, "Service", "smollm2")
    ports = [
        {"name": port["name"], "port": there.worker.ports[port["targetPort"]]} for port in service["spec"]["ports"]
    ]
    metadata = {"namespace": TEAM, "name": "s", "labels": {"kubernetes.io/service-name": "smollm2"}}
    found = endpoints_from([{"metadata": metadata, "ports": ports, "endpoints": [{"addresses": ["10.0.0.1"]}]}])
    [endpoint] = found[TEAM, "smollm2"]
    return endpoint.port


# What the reckoning itself makes of policies, by the examples of Kubernetes' documents.
CLIENT = Pod("myproject", {"role": "client"}, {"user": "alice"})
STRANGE_CLIENT = Pod("other", {"role": "client"}, {"user": "bob"})
DATABASE = Pod("default", {"role": "db"}, {}, {"redis": 6379})
ALICE, ROLE = {"namespaceSelector": {"matchLabels": {"user": "alice"}}}, {"podSelector": {"matchLabels": CLIENT.labels}}
BLOCK = {"ipBlock": {"cidr": "172.17.0.0/16", "except": ["172.17.1.0/24"]}}
RANGE = [{"port": 6000, "endPort": 6400}]


@pytest.mark.parametrize(
    ("spec", "source", "port", "expected"),
    [
        ({"podSelector": {"matchLabels": {"role": "web"}}, "ingress": []}, STRANGER, 6379, True),  # selects another pod
        ({"podSelector": {}, "policyTypes": ["Ingress"]}, CLIENT, 6379, False),  # deny everything
        ({"podSelector": {}, "policyTypes": ["Egress"]}, CLIENT, 6379, True),  # says nothing of what comes in
        ({"podSelector": {}, "ingress": [{}]}, STRANGER, 6379, True),  # allow everything
        ({"podSelector": {}, "ingress": [{"from": [ALICE | ROLE]}]}, CLIENT, 6379, True),
        ({"podSelector": {}, "ingress": [{"from": [ALICE | ROLE]}]}, STRANGE_CLIENT, 6379, False),  # both are wanted
        ({"podSelector": {}, "ingress": [{"from": [ALICE, ROLE]}]}, replace(CLIENT, labels={}), 6379, True),  # either
        ({"podSelector": {}, "ingress": [{"from": [ROLE]}]}, CLIENT, 6379, False),  # of the policy's own namespace
        ({"podSelector": {}, "ingress": [{"from": [BLOCK]}]}, Address("172.17.2.1"), 6379, True),
        ({"podSelector": {}, "ingress": [{"from": [BLOCK]}]}, Address("172.17.1.1"), 6379, False),
        (
            {"podSelector": {}, "ingress": [{"ports": [{"port": "redis"}]}]},
            CLIENT,
            6379,
            True,
        ),  # by the pod's name of it
        ({"podSelector": {}, "ingress": [{"ports": [{"port": "redis"}]}]}, CLIENT, 6380, False),
        ({"podSelector": {}, "ingress": [{"ports": [{"port": 6379, "protocol": "UDP"}]}]}, CLIENT, 6379, False),
        ({"podSelector": {}, "ingress": [{"ports": RANGE}]}, CLIENT, 6379, True),
        ({"podSelector": {"matchExpressions": [{"key": "role", "operator": "DoesNotExist"}]}}, CLIENT, 6379, True),
        (
            {"podSelector": {"matchExpressions": [{"key": "role", "operator": "In", "values": ["db"]}]}},
            CLIENT,
            1,
            False,
        ),
    ],
)
def test_the_reckoning_means_what_kubernetes_means(spec: Any, source: Party, port: int, expected: bool) -> None:
    policy = {"kind": "NetworkPolicy", "metadata": {"namespace": "default", "name": "p"}, "spec": spec}
    assert lets_through([policy], source, DATABASE, port) is expected
    open_door = {**policy, "spec": {"podSelector": {}, "ingress": [{}]}}
    assert lets_through([policy, open_door], source, DATABASE, port), "what one of them allows is allowed"
