"""Whatever JSON a user writes as spec.template, it is merged or refused in a sentence, and nobody raises."""

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.drift import covers
from gpumeter_operator.decide.placement import NodeChoice, placement_problems
from gpumeter_operator.decide.shape import walked_names
from gpumeter_operator.decide.spec import ServiceSpec, read
from gpumeter_operator.decide.workload import Installation, build
from rigs.thoroughness import examples

CLASSES = {"h100": NodeChoice({"nvidia.com/gpu.product": "H100"}, ({"key": "reserved", "operator": "Exists"},))}
INSTALLATION = Installation("worker:1", "IfNotPresent", "http://gateway", gpu_classes=CLASSES, development_image="dev")
NAMES = sorted({*walked_names(), "nvidia.com/gpu", "cpu", "value", "key", "securityContext", "nvidia.com/gpu.product"})
WORDS = ("main", "A", "http", "journal", "10.0.0.1", "10.0.0.2", "1.2.3", "1.2.4", "/data", "1", ".")
LEAVES = st.none() | st.booleans() | st.integers(-1, 2**40) | st.floats(allow_nan=False) | st.sampled_from(WORDS)
ANYTHING = st.recursive(
    LEAVES | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
CONTAINER = {
    "name": "main",
    "env": [{"name": "A", "value": "1.2.3"}],
    "ports": [{"name": "more", "containerPort": 9000}],
    "resources": {"limits": {"cpu": "4"}, "requests": {"cpu": "2"}},
    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    "securityContext": {"capabilities": {"drop": ["ALL"]}},
}
TERMS = [{"matchExpressions": [{"key": "pool", "operator": "In", "values": ["a"]}]}]
SOUND: dict[str, Any] = {
    "metadata": {"labels": {"team": "blue"}, "annotations": {"note": "1.0.0"}},
    "spec": {
        "containers": [CONTAINER, {"name": "beside", "image": "x:1"}],
        "initContainers": [{"name": "before", "image": "x:1"}],
        "volumes": [{"name": "data", "emptyDir": {}}],
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a"]}, {"ip": "10.0.0.2", "hostnames": ["b"]}],
        "tolerations": [{"key": "mine", "operator": "Exists"}],
        "nodeSelector": {"zone": "a"},
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": TERMS}}},
        "terminationGracePeriodSeconds": 600,
    },
}


@st.composite
def templates(draw: st.DrawFn) -> Any:
    """A sound template, some places of which hold anything; the CRD sees to it that metadata and spec are maps."""
    template = json.loads(json.dumps(SOUND))
    for _ in range(draw(st.integers(1, 3))):
        place, key = template, draw(st.sampled_from(["spec", "spec", "spec", "metadata"]))
        # Down from there, as far as it goes or as chance will have it: what is replaced lies at any depth.
        for _ in range(draw(st.integers(1, 8))):
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            place, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        place[key] = draw(ANYTHING)
    if draw(st.booleans()):
        template["spec"] = {**template["spec"], draw(st.sampled_from(NAMES)): draw(ANYTHING)}
    return {key: value for key, value in template.items() if isinstance(value, dict)}


def service(template: Any, gpus: int, jupyter: bool) -> dict[str, Any]:
    gpu = {"count": gpus, "class": "h100"}
    spec = {"model": {"uri": "hf://o/n"}, "resources": {"gpu": gpu}, "template": template}
    metadata = {"namespace": "team-a", "name": "smollm2", "uid": "u-1", "generation": 1}
    return {"metadata": metadata, "spec": {**spec, "development": {"jupyter": jupyter}}}


def pods(spec: ServiceSpec) -> Any:
    return build(spec, 1, INSTALLATION, credentials_of(b"k" * 32, "u-1")).deployment["spec"]["template"]


@settings(deadline=None, max_examples=examples(400))
@given(template=templates(), gpus=st.integers(0, 1), jupyter=st.booleans())
@example(template={"spec": {"containers": {"main": {"env": {"A": "b"}}}}}, gpus=1, jupyter=False)
@example(template={"spec": {"volumes": ["data"]}}, gpus=1, jupyter=False)
@example(template={"spec": {"containers": [{"name": "main", "ports": [8080]}]}}, gpus=1, jupyter=False)
@example(template={"spec": {"containers": [{"name": {}}, None]}}, gpus=1, jupyter=False)
def test_any_template_is_refused_in_sentences_or_makes_a_pod_that_is_metered_and_placed(
    template: Any, gpus: int, jupyter: bool
) -> None:
    spec, problems = read(service(template, gpus, jupyter))
    problems += placement_problems(spec, CLASSES)
    made = pods(spec)
    covers(made, pods(read(service(SOUND, gpus, jupyter))[0]))
    covers(pods(read(service(SOUND, gpus, jupyter))[0]), made)
    assert all(one.message.startswith("spec.template") and one.message.endswith(".") for one in problems), problems
    if problems:
        return
    [main] = [one for one in made["spec"]["containers"] if one["name"] == "main"]
    for asked in (main["resources"]["requests"], main["resources"]["limits"]):
        assert {name: value for name, value in asked.items() if "/" in name} == (
            {"nvidia.com/gpu": "1"} if gpus else {}
        )
    others = [one for one in made["spec"]["containers"] if one is not main] + (made["spec"].get("initContainers") or [])
    for one in others:
        resources = one.get("resources") or {}
        names = [*(resources.get("requests") or ()), *(resources.get("limits") or ())]
        assert not [name for name in names if "/" in name]
    assert made["spec"]["terminationGracePeriodSeconds"] >= spec.termination_grace_s
    if gpus:
        assert made["spec"]["nodeSelector"]["nvidia.com/gpu.product"] == "H100"
