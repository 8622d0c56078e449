"""What a user reads, within 30 seconds, when a service cannot start."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from demo import manifests, steps

TEAM = "team-mistakes"
WITHIN_S = 30


@pytest.fixture(scope="module")
def team(release: steps.Demo) -> Iterator[steps.Demo]:
    release.kube.apply(manifests.namespace(TEAM))
    release.kube.apply(manifests.model_claim() | {"metadata": {"name": manifests.MODEL_CLAIM, "namespace": TEAM}})
    yield release
    release.kube.run("-n", TEAM, "delete", "inferenceservices.gpumeter.io", "--all", "--timeout=100s")


def condition_after(team: steps.Demo, name: str, reason: str, **spec: Any) -> dict[str, Any]:
    """Apply a service and wait for that reason of Ready=False; fails after 30 seconds with what stood there instead."""
    manifest = manifests.inference_service(manifests.MODEL_URI, team.image_version)
    manifest["metadata"] = {"name": name, "namespace": TEAM}
    manifest["spec"] |= spec
    started, seen = time.monotonic(), {}
    team.kube.apply(manifest)
    while time.monotonic() < started + WITHIN_S:
        status = team.kube.get("-n", TEAM, f"inferenceservices.gpumeter.io/{name}").get("status", {})
        seen = next((one for one in status.get("conditions", []) if one["type"] == "Ready"), {})
        if seen.get("reason") == reason:
            assert seen["status"] == "False"
            print(f"{name}: {reason} after {time.monotonic() - started:.1f} s: {seen['message']}")
            return seen | {"modelStatus": status.get("modelStatus", {})}
        time.sleep(0.3)
    pytest.fail(f"no {reason} within {WITHIN_S} s; Ready says {seen}")


def test_a_model_that_is_not_there_is_said_with_its_path(team: steps.Demo):
    seen = condition_after(team, "no-model", "ModelNotFound", model={"uri": "pvc://models/typo"})
    assert "/mnt/models/typo" in seen["message"]
    assert seen["modelStatus"]["state"] == "FailedToLoad"
    assert seen["modelStatus"]["lastFailureInfo"]["message"] == seen["message"]


def test_a_gpu_that_is_asked_for_and_absent_is_said_and_never_replaced_by_the_cpu(team: steps.Demo):
    resources = {"gpu": {"count": 1}, "cpu": "500m", "memory": "2Gi"}
    seen = condition_after(team, "no-gpu", "GpuNotFound", resources=resources)
    assert "GPU" in seen["message"]


def test_more_gpus_than_any_node_has_are_said_with_the_schedulers_words(team: steps.Demo):
    resources = {"gpu": {"count": 1, "resourceName": "nvidia.com/mig-1g.10gb"}, "cpu": "500m", "memory": "2Gi"}
    seen = condition_after(team, "no-mig", "InsufficientCapacity", resources=resources)
    assert "nvidia.com/mig-1g.10gb" in seen["message"]


def test_an_image_that_cannot_be_pulled_is_said(team: steps.Demo):
    engine = {"image": "localhost/no-such-image:none", "maxBatchSize": 8}
    seen = condition_after(team, "no-image", "ImagePullFailed", engine=engine)
    assert "localhost/no-such-image:none" in seen["message"]


def test_a_claim_that_does_not_exist_is_said(team: steps.Demo):
    seen = condition_after(team, "no-claim", "Unschedulable", model={"uri": "pvc://nowhere/smollm2"})
    assert "nowhere" in seen["message"]
