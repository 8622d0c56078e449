"""Which nodes a worker may run on: those of its class of GPU, tainted for GPUs or not, and never one that shares them.

Owns what the installation says about classes of GPU (`gpuClasses` of the chart) and how it enters a pod, so that what
is billed as a class runs on that class; and how long a worker stays on a node that is lost. Does not know which nodes
there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpumeter_operator.decide.spec import UNNAMED_CLASS, Problem, ServiceSpec

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """The nodes of one class of GPU: labels that they have, and taints that its workers tolerate."""

    selector: Mapping[str, str]
    tolerations: tuple[Mapping[str, Any], ...] = ()


# A step on a shared GPU lasts as long as the others' work says, and a container often cannot see it. NVIDIA's feature
# discovery labels such nodes, and so does GKE; nodes without the labels are taken.
_NOT_SHARED = (
    {"key": "nvidia.com/gpu.sharing-strategy", "operator": "NotIn", "values": ["mps", "time-slicing"]},
    {"key": "cloud.google.com/gke-gpu-sharing-strategy", "operator": "NotIn", "values": ["mps", "time-sharing"]},
)

# Taints of a node that is lost. Half a minute is longer than a kubelet needs to start again.
_LOST_NODE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
LOST_NODE_S = 30


def placement(spec: ServiceSpec, classes: Mapping[str, NodeChoice]) -> Manifest:
    """The part of a pod's spec that says where it may run; empty for a service on the CPU."""
    if not spec.gpu_count:
        return {}
    chosen = _choice(spec.gpu_class, classes)
    # Nodes with GPUs are tainted by the resource's name, by the admission plugin ExtendedResourceToleration's rule, and
    # clouds taint those with MIG instances by nvidia.com/gpu as well.
    taints = dict.fromkeys((spec.gpu_resource_name, f"{spec.gpu_resource_name.partition('/')[0]}/gpu"))
    tolerations: list[Any] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in taints]
    tolerations += [dict(one) for one in (chosen.tolerations if chosen else ())]
    return {"tolerations": tolerations, **({"nodeSelector": dict(chosen.selector)} if chosen else {})}


def keep_whole(pod: Mapping[str, Any]) -> Manifest:
    """The pod's spec with nodes excluded that share their GPUs, whatever other nodes it names."""
    affinity = dict(pod.get("affinity") or {})
    node = dict(affinity.get("nodeAffinity") or {})
    required = dict(node.get("requiredDuringSchedulingIgnoredDuringExecution") or {})
    # Terms are alternatives, so each of them needs it.
    terms: Sequence[Mapping[str, Any]] = required.get("nodeSelectorTerms") or [{}]
    required["nodeSelectorTerms"] = [
        {**term, "matchExpressions": [*(term.get("matchExpressions") or []), *_NOT_SHARED]} for term in terms
    ]
    node["requiredDuringSchedulingIgnoredDuringExecution"] = required
    return {**pod, "affinity": {**affinity, "nodeAffinity": node}}


def leave_lost_nodes(pod: Mapping[str, Any]) -> Manifest:
    """The pod's spec with the time after which a lost node's worker is replaced, where it says nothing of it itself.

    Kubernetes' own default is 300 s, in which a service with one worker answers nobody. What counts as said is that
    default's rule: k8s.io/kubernetes, plugin/pkg/admission/defaulttolerationseconds.
    """
    held = pod.get("tolerations") or []
    missing = [key for key in _LOST_NODE if not any(_is_about(one, key) for one in held)]
    ours = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": LOST_NODE_S}
    return {**pod, "tolerations": [*held, *({"key": key, **ours} for key in missing)]}


def _is_about(toleration: Mapping[str, Any], key: str) -> bool:
    return (toleration.get("key") or key) == key and (toleration.get("effect") or "NoExecute") == "NoExecute"


def placement_problems(spec: ServiceSpec, classes: Mapping[str, NodeChoice]) -> tuple[Problem, ...]:
    """What would let a service be billed as one class of GPU and run on another."""
    if not spec.gpu_count or not classes:
        return ()
    chosen = _choice(spec.gpu_class, classes)
    if chosen is None:
        return () if spec.gpu_class.partition(".")[0] == UNNAMED_CLASS else (_unknown(spec.gpu_class, classes),)
    named = (spec.template.get("spec") or {}).get("nodeSelector") or {}
    return tuple(
        Problem(
            "TemplateInvalid",
            f"spec.template.spec.nodeSelector sets {key} to {named[key]}, but nodes of class {spec.gpu_class} have "
            f"{value}, and a worker is billed as that class; remove it, or name the other class in "
            "spec.resources.gpu.class.",
        )
        for key, value in sorted(chosen.selector.items())
        if key in named and named[key] != value
    )


def _unknown(gpu_class: str, classes: Mapping[str, NodeChoice]) -> Problem:
    return Problem(
        "GpuClassUnknown",
        f"spec.resources.gpu.class is {gpu_class}, but this installation knows {', '.join(sorted(classes))} "
        "(gpuClasses of the chart), and what it does not know it cannot place; name one of them, or ask who runs "
        "gpumeter to add the class.",
    )


def _choice(gpu_class: str, classes: Mapping[str, NodeChoice]) -> NodeChoice | None:
    """Of h100.1g.10gb the class itself, and where that has no nodes of its own those of h100."""
    return classes.get(gpu_class) or classes.get(gpu_class.partition(".")[0])
