from typing import Any

import pytest

from gpumeter_operator.gateway.outlook import outlook


def service(
    reason: str = "", *, state: str = "Standby", seen: int = 3, annotations: dict[str, str] | None = None, **spec: Any
) -> dict[str, Any]:
    ready = {"type": "Ready", "status": "False", "reason": reason, "message": "Because."}
    return {
        "metadata": {"name": "m", "generation": 3, "annotations": annotations},
        "spec": spec,
        "status": {
            "observedGeneration": seen,
            "conditions": [ready] if reason else [],
            "modelStatus": {"state": state},
        },
    }


@pytest.mark.parametrize(
    "waits_for",
    [
        service("ScaledToZero", scaling={"minReplicas": 0}),
        service("PodsStarting"),
        service("ModelLoading", state="Loading"),
        service("ContainerCreating"),
        service("InsufficientCapacity"),  # a cluster may add nodes
        service("QuotaExceeded"),
        service("AReasonOfALaterVersion"),
        service("Stopped"),  # the annotation has been removed, and the operator has not looked yet
        service(),
        {"metadata": {"name": "m"}, "spec": {}},  # just made
    ],
)
def test_what_passes_is_worth_waiting_for(waits_for: dict[str, Any]) -> None:
    assert outlook(waits_for).comes


@pytest.mark.parametrize("reason", ["SpecInvalid", "TemplateInvalid", "ImagePullFailed", "NameTaken"])
def test_what_a_person_must_change_is_not_waited_for(reason: str) -> None:
    told = outlook(service(reason))
    assert not told.comes
    assert told.because == f" {reason}: Because."


def test_a_model_that_failed_to_load_is_not_waited_for_until_the_spec_changes() -> None:
    failed = service("ModelNotFound", state="FailedToLoad")
    assert not outlook(failed).comes
    assert outlook(failed | {"metadata": {"name": "m", "generation": 4}}).comes


def test_a_stopped_service_and_one_that_is_fixed_at_zero_are_not_waited_for() -> None:
    for value in ("true", "True", "TRUE"):  # as the operator reads it
        assert outlook(service(annotations={"gpumeter.io/stop": value})).reason == "Stopped"
    assert outlook(service(annotations={"gpumeter.io/stop": "false"})).comes
    assert "spec.replicas is 0" in outlook(service(replicas=0)).message
