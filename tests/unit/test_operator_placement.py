"""A worker runs on the class of GPU that it is billed as, and on no GPU that others use too."""

from typing import Any

import pytest

from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.placement import NodeChoice, placement_problems
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Installation, build

H100 = NodeChoice({"nvidia.com/gpu.product": "H100"}, ({"key": "reserved", "value": "ml", "effect": "NoExecute"},))
SLICE = NodeChoice({"nvidia.com/gpu.product": "H100-MIG-1g.10gb"})
CLASSES = {"h100": H100, "a100": NodeChoice({"pool": "a100"})}
LOST = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
NOT_SHARED = [
    {"key": "nvidia.com/gpu.sharing-strategy", "operator": "NotIn", "values": ["mps", "time-slicing"]},
    {"key": "cloud.google.com/gke-gpu-sharing-strategy", "operator": "NotIn", "values": ["mps", "time-sharing"]},
]


def service(gpu: dict[str, Any], template: dict[str, Any] | None = None) -> Any:
    metadata = {"namespace": "team-a", "name": "smollm2", "uid": "u-1", "generation": 1}
    spec = {"model": {"uri": "hf://o/n"}, "resources": {"gpu": gpu}, "template": {"spec": template or {}}}
    return read({"metadata": metadata, "spec": spec})[0]


def pod(
    gpu: dict[str, Any], template: dict[str, Any] | None = None, classes: dict[str, NodeChoice] | None = None
) -> dict[str, Any]:
    installation = Installation("worker:1", "IfNotPresent", "", gpu_classes=CLASSES if classes is None else classes)
    workload = build(service(gpu, template), 1, installation, credentials_of(b"k" * 32, "u-1"))
    spec: dict[str, Any] = workload.deployment["spec"]["template"]["spec"]
    return spec


def tolerated(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Without what every pod tolerates: a node that is lost, for a while."""
    return [one for one in spec["tolerations"] if one["key"] not in LOST]


def terms(spec: dict[str, Any]) -> Any:
    required = (
        spec.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    )
    return required.get("nodeSelectorTerms")


def test_a_class_of_gpu_brings_its_nodes_and_their_taints() -> None:
    spec = pod({"class": "h100"})
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    assert tolerated(spec) == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "reserved", "value": "ml", "effect": "NoExecute"},
    ]


def test_a_slice_is_placed_by_its_own_class_or_by_that_of_its_gpu() -> None:
    gpu = {"class": "h100", "resourceName": "nvidia.com/mig-1g.10gb"}
    spec = pod(gpu)
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    assert [one["key"] for one in tolerated(spec)] == ["nvidia.com/mig-1g.10gb", "nvidia.com/gpu", "reserved"]
    assert pod(gpu, classes={"h100": H100, "h100.1g.10gb": SLICE})["nodeSelector"] == SLICE.selector


def test_a_service_on_the_cpu_is_placed_anywhere() -> None:
    spec = pod({"count": 0})
    assert not {"nodeSelector", "affinity"} & set(spec)
    assert tolerated(spec) == []


def test_a_lost_nodes_worker_is_replaced_after_half_a_minute() -> None:
    lost = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30}
    assert pod({"count": 0})["tolerations"] == [{"key": key, **lost} for key in LOST]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"key": LOST[0], "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 600}, [LOST[1]]),
        ({"key": LOST[1], "operator": "Exists"}, [LOST[0]]),
        ({"operator": "Exists"}, []),
        ({"key": LOST[0], "operator": "Exists", "effect": "NoSchedule"}, list(LOST)),
        ({"key": "reserved", "operator": "Exists"}, list(LOST)),
    ],
)
def test_what_a_template_says_of_lost_nodes_holds_because_the_shortest_of_several_times_would(
    theirs: dict[str, Any], ours: list[str]
) -> None:
    tolerations = pod({"count": 0}, {"tolerations": [theirs]})["tolerations"]
    assert tolerations[0] == theirs
    assert [one["key"] for one in tolerations[1:]] == ours


def test_a_gpu_without_a_class_is_placed_on_any_gpu() -> None:
    spec = pod({"count": 1})
    assert "nodeSelector" not in spec
    assert placement_problems(service({"count": 1}), CLASSES) == ()


def test_a_class_that_the_installation_does_not_know_is_refused_with_those_that_it_knows() -> None:
    [problem] = placement_problems(service({"class": "h200"}), CLASSES)
    assert problem.reason == "GpuClassUnknown"
    assert "class is h200, but this installation knows a100, h100 (gpuClasses of the chart)" in problem.message
    assert placement_problems(service({"class": "h200"}), {}) == (), "an installation that says nothing knows all"
    assert placement_problems(service({"class": "h100"}), CLASSES) == ()


def test_no_template_moves_a_worker_to_a_gpu_of_another_class_than_it_is_billed_as() -> None:
    moved = {"nodeSelector": {"nvidia.com/gpu.product": "T4", "zone": "a"}}
    [problem] = placement_problems(service({"class": "h100"}, moved), CLASSES)
    assert problem.reason == "TemplateInvalid"
    assert "nodeSelector sets nvidia.com/gpu.product to T4" in problem.message
    narrowed = {"nodeSelector": {"zone": "a"}, "tolerations": [{"key": "mine", "operator": "Exists"}]}
    assert placement_problems(service({"class": "h100"}, narrowed), CLASSES) == ()
    spec = pod({"class": "h100"}, narrowed)
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "H100", "zone": "a"}
    assert [one["key"] for one in tolerated(spec)] == ["nvidia.com/gpu", "reserved", "mine"]


@pytest.mark.parametrize("own", [[], [{"matchExpressions": [{"key": "pool", "operator": "In", "values": ["a"]}]}]])
def test_nodes_whose_gpus_are_shared_are_never_taken_whatever_nodes_the_template_names(own: list[Any]) -> None:
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": own}} if own else {}
    preferred = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": {}}]}
    chosen = {"affinity": {"nodeAffinity": {**required, **preferred}, "podAntiAffinity": {}}}
    spec = pod({"count": 1}, chosen)
    before = [one["matchExpressions"] for one in own] or [[]]
    assert terms(spec) == [{"matchExpressions": [*expressions, *NOT_SHARED]} for expressions in before]
    assert set(spec["affinity"]["nodeAffinity"]) == {*preferred, "requiredDuringSchedulingIgnoredDuringExecution"}
    assert set(spec["affinity"]) == {"nodeAffinity", "podAntiAffinity"}, "what else the template says stays"
