"""The user's pod template: what it may not change, and how lists are merged."""

from typing import Any

import pytest

from gpumeter_operator.decide.shape import shape_problems
from gpumeter_operator.decide.spec import Problem, read
from gpumeter_operator.decide.template import merge_template, template_problems


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ({"metadata": {"labels": {"gpumeter.io/inferenceservice": "x"}}}, "by which gpumeter finds its pods"),
        ({"metadata": {"labels": {"app.kubernetes.io/instance": "x"}}}, "by which gpumeter finds its pods"),
        ({"metadata": {"annotations": {"gpumeter.io/devices": "2"}}}, "by which gpumeter finds its pods"),
        ({"spec": {"restartPolicy": "Never"}}, "restartPolicy must be Always"),
        ({"spec": {"terminationGracePeriodSeconds": 30}}, "is 30, but a worker needs 150 seconds"),
        ({"spec": {"volumes": [{"name": "journal"}]}}, "has a volume called journal, which gpumeter uses"),
        ({"spec": {"containers": [{"image": "x"}]}}, "has a container without a name"),
        ({"spec": {"initContainers": [{"image": "x"}]}}, "has a container without a name"),
        (
            {"spec": {"containers": [{"name": "worker", "env": [{"name": "HF_TOKEN", "value": "x"}]}]}},
            "containers[worker] has no image; give it one, or, to change the worker's own container, set that in "
            "containers[main].",
        ),
        ({"spec": {"initContainers": [{"name": "main"}]}}, "initContainers[main] has no image"),
        ({"spec": {"containers": [{"name": "main", "image": "x"}]}}, "the worker's image is spec.engine.image"),
        (
            {"spec": {"containers": [{"name": "main", "env": [{"name": "GPUMETER_GPU_CLASS", "value": "free"}]}]}},
            "sets GPUMETER_GPU_CLASS, which is not one of those that may be set here: GPUMETER_ALLOW_PICKLE, ",
        ),
        (
            {"spec": {"containers": [{"name": "main", "volumeMounts": [{"mountPath": "/var/lib/gpumeter/x"}]}]}},
            "where the worker keeps data of its own",
        ),
    ],
)
def test_what_would_break_metering_is_refused_in_a_sentence(template: dict[str, Any], sentence: str) -> None:
    [problem] = template_problems(template, 150)
    assert sentence in problem
    assert problem.endswith(".")


GPU = {"nvidia.com/gpu": "2"}


@pytest.mark.parametrize(
    ("pod", "path"),
    [
        ({"containers": [{"name": "main", "resources": {"limits": GPU}}]}, "containers[main].resources.limits"),
        (
            {"containers": [{"name": "x", "image": "i", "resources": {"requests": GPU}}]},
            "containers[x].resources.requests",
        ),
        (
            {"initContainers": [{"name": "x", "image": "i", "resources": {"limits": GPU}}]},
            "initContainers[x].resources.limits",
        ),
        ({"containers": [{"name": "main", "resources": {"limits": {"nvidia.com/gpu": None}}}]}, "resources.limits"),
        (
            {"containers": [{"name": "x", "image": "i", "resources": {"limits": {"nvidia.com/mig-1g.10gb": 1}}}]},
            "resources.limits",
        ),
        (
            {
                "containers": [
                    {"name": "x", "image": "i", "resources": {"limits": {"deviceclass.resource.kubernetes.io/gpu": 1}}}
                ]
            },
            "containers[x].resources.limits",
        ),
        ({"resources": {"limits": GPU}}, "spec.template.spec.resources.limits"),
        ({"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "gpu"}]}, "resourceClaims"),
        (
            {"containers": [{"name": "x", "image": "i", "resources": {"claims": [{"name": "gpu"}]}}]},
            "containers[x].resources.claims",
        ),
        (
            {"containers": [{"name": "main", "env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]}]},
            "containers[main].env sets NVIDIA_VISIBLE_DEVICES",
        ),
        (
            {
                "initContainers": [
                    {"name": "x", "image": "i", "env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "0"}]}
                ]
            },
            "x].env",
        ),
        (
            {
                "containers": [
                    {
                        "name": "x",
                        "image": "i",
                        "env": [{"name": "NVIDIA_VISIBLE_DEVICES", "valueFrom": {"fieldRef": {}}}],
                    }
                ]
            },
            "containers[x].env",
        ),
    ],
)
def test_a_device_that_nobody_would_meter_is_refused_and_said_where_to_ask_for_gpus(
    pod: dict[str, Any], path: str
) -> None:
    [problem] = template_problems({"spec": pod}, 150)
    assert path in problem
    assert problem.endswith("that nobody would meter; remove it, and ask for GPUs in spec.resources.gpu.")


@pytest.mark.parametrize(
    ("pod", "sentence"),
    [
        (
            {"containers": {"main": {"env": {"A": "b"}}}},
            "spec.template.spec.containers is a map, but Kubernetes takes a list there; "
            "write it as kubectl explain pod.spec.containers shows.",
        ),
        (
            {"containers": [{"name": "main", "env": ["A=b"]}]},
            "spec.template.spec.containers[0].env[0] is a text, but Kubernetes takes a map there; "
            "write it as kubectl explain pod.spec.containers.env shows.",
        ),
        ({"volumes": ["data"]}, "spec.template.spec.volumes[0] is a text, but Kubernetes takes a map there"),
        ({"containers": [None]}, "spec.template.spec.containers[0] is empty, but Kubernetes takes a map there"),
        ({"containers": [{"name": "main", "ports": [8080]}]}, "spec.template.spec.containers[0].ports[0] is a number"),
        ({"containers": [{"name": ["main"]}]}, "spec.template.spec.containers[0].name is a list"),
        (
            {"initContainers": [{"name": "x", "image": "i", "resources": {"limits": "2"}}]},
            "initContainers[0].resources.limits is a",
        ),
        (
            {
                "affinity": {
                    "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": {}}}
                }
            },
            "requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms is a map",
        ),
        ({"nodeSelector": "gpu"}, "spec.template.spec.nodeSelector is a text, but Kubernetes takes a map there"),
        ({"tolerations": "all"}, "spec.template.spec.tolerations is a text, but Kubernetes takes a list there"),
        ({"terminationGracePeriodSeconds": "5"}, "terminationGracePeriodSeconds is a text, but Kubernetes takes a who"),
    ],
)
def test_what_has_not_the_shape_of_a_pod_is_refused_with_its_path_and_where_the_shape_is_shown(
    pod: dict[str, Any], sentence: str
) -> None:
    [problem] = shape_problems({"spec": pod})
    assert sentence in problem
    metadata = {"namespace": "team-a", "name": "smollm2", "uid": "u-1"}
    spec, problems = read({"metadata": metadata, "spec": {"template": {"spec": pod}}})
    assert problems == (Problem("TemplateInvalid", problem),)
    assert spec.template == {}, "nobody after this walks what has no shape"


def test_a_template_without_a_bottom_is_refused_before_anything_descends_into_it() -> None:
    bottomless: Any = "x"
    for _ in range(50_000):
        bottomless = [{"inner": bottomless}]
    [problem] = shape_problems({"spec": {"nodeSelector": {"zone": "a"}, "odd": bottomless}})
    assert problem == "spec.template.spec.odd holds more than 100 levels of maps and lists, and no pod does; remove it."


def test_a_field_that_is_left_empty_takes_nothing_away_of_what_a_worker_is_placed_and_metered_by() -> None:
    ours = {"nodeSelector": {"pool": "h100"}, "terminationGracePeriodSeconds": 165, "containers": [{"name": "main"}]}
    theirs = {"nodeSelector": None, "terminationGracePeriodSeconds": None, "containers": None}
    assert merge_template(ours, theirs) == ours
    assert merge_template({"livenessProbe": {"x": 1}}, {"livenessProbe": None}) == {"livenessProbe": None}


def test_an_ordinary_template_has_no_problem() -> None:
    template = {
        "metadata": {"labels": {"team": "blue"}},
        "spec": {
            "terminationGracePeriodSeconds": 600,
            "volumes": None,
            "containers": [
                {
                    "name": "main",
                    "volumeMounts": [{"name": "data", "mountPath": "/var/lib/gpumeter-data"}],
                    "resources": {"limits": {"cpu": "4", "hugepages-2Mi": "1Gi", "ephemeral-storage": "9Gi"}},
                }
            ],
        },
    }
    assert list(shape_problems(template)) == []
    assert list(template_problems(template, 150)) == []
    assert list(template_problems({}, 150)) == []
    assert list(template_problems({"spec": {"env": True}}, 150)) == [], "no field of a pod, which the API server says"


def test_lists_with_a_key_are_merged_by_it_and_keep_their_order() -> None:
    ours = {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]}
    theirs = {"env": [{"name": "C", "value": "3"}, {"name": "A", "value": "9"}]}
    assert merge_template(ours, theirs)["env"] == [
        {"name": "A", "value": "9"},
        {"name": "B", "value": "2"},
        {"name": "C", "value": "3"},
    ]


def test_tolerations_are_joined_and_lists_without_a_key_replaced() -> None:
    merged = merge_template({"tolerations": [1], "command": ["a", "b"]}, {"tolerations": [2], "command": ["c"]})
    assert merged == {"tolerations": [1, 2], "command": ["c"]}
