"""The user's pod template: what it may not change, and how lists are merged."""

from typing import Any

import pytest

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
        ({"spec": {"containers": [{"name": "main", "image": "x"}]}}, "the worker's image is spec.engine.image"),
        (
            {"spec": {"containers": [{"name": "main", "env": [{"name": "GPUMETER_GPU_CLASS", "value": "free"}]}]}},
            "sets GPUMETER_GPU_CLASS, which gpumeter sets from the spec",
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


def test_an_ordinary_template_has_no_problem() -> None:
    template = {
        "metadata": {"labels": {"team": "blue"}},
        "spec": {
            "terminationGracePeriodSeconds": 600,
            "containers": [{"name": "main", "volumeMounts": [{"name": "data", "mountPath": "/var/lib/gpumeter-data"}]}],
        },
    }
    assert list(template_problems(template, 150)) == []
    assert list(template_problems({}, 150)) == []


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
