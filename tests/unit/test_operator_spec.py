"""Reading an InferenceService: defaults, and every problem in a sentence, all at once."""

from typing import Any

import pytest

from gpumeter_operator.decide.replicas import decide_replicas
from gpumeter_operator.decide.spec import duration_ms, read


def service(spec: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    whole = {"namespace": "team-a", "name": "smollm2", "uid": "u-1", "generation": 3, **metadata}
    return {"metadata": whole, "spec": {"model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"}, **(spec or {})}}


def test_defaults_that_depend_on_other_fields_are_filled_in() -> None:
    spec, problems = read(service())
    assert problems == ()
    assert (spec.model_name, spec.model_revision, spec.gpu_class) == ("smollm2", "main", "gpu")
    assert (decide_replicas(spec).wanted, spec.replicas, spec.scaling) == (1, None, None)
    assert spec.reference == "team-a/smollm2"


def test_a_service_without_gpus_is_of_class_cpu_whatever_it_says() -> None:
    spec, problems = read(service({"resources": {"gpu": {"count": 0, "class": "h100"}}}))
    assert (spec.gpu_class, problems) == ("cpu", ())


@pytest.mark.parametrize(
    ("spec", "stopped", "wanted"),
    [
        ({}, False, 1),
        ({"replicas": 0}, False, 0),
        ({"replicas": 3}, False, 3),
        ({"replicas": 3}, True, 0),
        ({"scaling": {"minReplicas": 0, "maxReplicas": 4}}, False, 1),
        ({"scaling": {"minReplicas": 2, "maxReplicas": 4}}, False, 2),
        ({"scaling": {"maxReplicas": 4}}, True, 0),
    ],
)
def test_the_number_of_wanted_workers(spec: dict[str, Any], stopped: bool, wanted: int) -> None:
    annotations = {"gpumeter.io/stop": "true"} if stopped else {}
    assert decide_replicas(read(service(spec, annotations=annotations))[0]).wanted == wanted


@pytest.mark.parametrize(("value", "stopped"), [("true", True), ("True", True), ("false", False), ("", False)])
def test_only_true_stops(value: str, stopped: bool) -> None:
    assert read(service(annotations={"gpumeter.io/stop": value}))[0].stopped is stopped


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"engine": {"type": "vllm"}}, "spec.engine.type is vllm, but this version has only the engine transformers"),
        (
            {"parallelism": {"tensor": 2}, "resources": {"gpu": {"count": 4}}},
            "spec.parallelism.tensor is 2 and spec.resources.gpu.count is 4, but a worker splits its model over all",
        ),
        (
            {"parallelism": {"tensor": 2}, "resources": {"gpu": {"count": 0}}},
            "make them equal (tensor is 1 on the CPU)",
        ),
        (
            {
                "parallelism": {"tensor": 2},
                "resources": {"gpu": {"count": 2, "resourceName": "nvidia.com/mig-1g.10gb"}},
            },
            "MIG instances cannot exchange what a split model needs",
        ),
        ({"resources": {"gpu": {"resourceName": "nvidia.com/gpu.shared"}}}, "the time of its steps cannot be measured"),
    ],
)
def test_what_this_version_cannot_do_is_said_with_what_to_do(spec: dict[str, Any], sentence: str) -> None:
    [problem] = read(service(spec))[1]
    assert problem.reason == "NotSupported"
    assert sentence in problem.message
    assert problem.message.endswith(".")


def test_a_model_may_be_split_over_all_gpus_of_a_worker() -> None:
    spec, problems = read(service({"parallelism": {"tensor": 4}, "resources": {"gpu": {"count": 4, "class": "h100"}}}))
    assert (spec.tensor, spec.gpu_count, problems) == (4, 4, ())
    assert read(service())[0].tensor == 1


@pytest.mark.parametrize("uri", ["hf://o/n", "pvc://claim/a", "file:///a", "s3://models/a", "oci://registry/a:1"])
def test_a_model_of_every_source_can_be_run_compiled_or_not(uri: str) -> None:
    for compiled in (True, False):
        spec, problems = read(
            service({"model": {"uri": uri}, "engine": {"compile": compiled, "cudaGraphs": not compiled}})
        )
        assert problems == ()
        assert (spec.model_uri, spec.compile, spec.cuda_graphs) == (uri, compiled, not compiled)


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ({"class": "h100"}, "h100"),
        ({}, "gpu"),
        ({"count": 0, "class": "h100"}, "cpu"),
        ({"class": "h100", "resourceName": "nvidia.com/mig-1g.10gb"}, "h100.1g.10gb"),
        ({"class": "h100.1g.10gb", "resourceName": "nvidia.com/mig-1g.10gb"}, "h100.1g.10gb"),
        ({"resourceName": "nvidia.com/mig-3g.40gb"}, "gpu.3g.40gb"),
    ],
)
def test_a_slice_of_a_gpu_never_has_the_class_of_the_whole(gpu: dict[str, Any], expected: str) -> None:
    assert read(service({"resources": {"gpu": gpu}}))[0].gpu_class == expected


def test_all_problems_are_told_at_once() -> None:
    _, problems = read(
        service(
            {
                "resources": {"gpu": {"resourceName": "nvidia.com/gpu.shared"}},
                "engine": {"type": "vllm"},
                "template": {"spec": {"restartPolicy": "Never"}},
            }
        )
    )
    assert [problem.reason for problem in problems] == ["NotSupported", "NotSupported", "TemplateInvalid"]


@pytest.mark.parametrize(
    ("text", "milliseconds"), [("120s", 120_000), ("500ms", 500), ("1h30m", 5_400_000), ("1m", 60_000), ("0s", 0)]
)
def test_durations(text: str, milliseconds: int) -> None:
    assert duration_ms(text) == milliseconds


@pytest.mark.parametrize("text", ["", "12", "2 minutes", "1.5h", "s", "-1s", "1d"])
def test_what_is_no_duration_raises(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        duration_ms(text)


def test_a_worker_gets_its_drain_timeout_and_time_to_hand_over_its_records() -> None:
    assert read(service({"drain": {"timeout": "1500ms"}}))[0].termination_grace_s == 2 + 45
    assert read(service())[0].termination_grace_s == 165
