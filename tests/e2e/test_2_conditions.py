"""What a user reads, within 30 seconds, when a service cannot start."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from demo import manifests, steps

TEAM = "team-mistakes"
WITHIN_S = 30
ROOM = {"gpu": {"count": 0}, "cpu": "100m", "memory": "2Gi"}
"""A node of two processors has room for all of them, beside the other tests' services."""
MISTAKES: dict[str, dict[str, Any]] = {
    "no-model": {"model": {"uri": "pvc://models/typo"}},
    "no-gpu": {"resources": ROOM | {"gpu": {"count": 1}}},
    "no-mig": {"resources": ROOM | {"gpu": {"count": 1, "resourceName": "nvidia.com/mig-1g.10gb"}}},
    "no-image": {"engine": {"image": "localhost/no-such-image:none", "maxBatchSize": 8}},
    "no-claim": {"model": {"uri": "pvc://nowhere/smollm2"}},
}


@dataclass(frozen=True)
class Team:
    """All of these services, and when they were asked for: together, so that nobody waits for each in turn."""

    demo: steps.Demo
    asked_s: float


@pytest.fixture(scope="module")
def team(release: steps.Demo) -> Iterator[Team]:
    services = []
    for name, spec in MISTAKES.items():
        manifest = manifests.inference_service(manifests.MODEL_URI, release.image_version)
        manifest["metadata"] = {"name": name, "namespace": TEAM}
        manifest["spec"] |= {"resources": ROOM} | spec
        services.append(manifest)
    release.kube.apply(manifests.namespace(TEAM))
    release.kube.apply(manifests.model_claim() | {"metadata": {"name": manifests.MODEL_CLAIM, "namespace": TEAM}})
    asked_s = time.monotonic()
    release.kube.apply(*services)
    yield Team(release, asked_s)
    release.kube.run("-n", TEAM, "delete", "inferenceservices.gpumeter.io", "--all", "--timeout=100s")


def condition_of(team: Team, name: str, reason: str) -> dict[str, Any]:
    """Wait for that reason of Ready=False; fails 30 seconds after the service was asked for with what stood there."""
    seen: dict[str, Any] = {}
    while True:
        in_time = time.monotonic() < team.asked_s + WITHIN_S
        status = team.demo.kube.get("-n", TEAM, f"inferenceservices.gpumeter.io/{name}").get("status", {})
        seen = next((one for one in status.get("conditions", []) if one["type"] == "Ready"), {})
        if seen.get("reason") == reason:
            assert seen["status"] == "False"
            print(f"{name}: {reason} within {time.monotonic() - team.asked_s:.1f} s: {seen['message']}")
            return seen | {"modelStatus": status.get("modelStatus", {})}
        if not in_time:
            pytest.fail(f"no {reason} within {WITHIN_S} s; Ready says {seen}")
        time.sleep(0.3)


def test_a_model_that_is_not_there_is_said_with_its_path(team: Team):
    seen = condition_of(team, "no-model", "ModelNotFound")
    assert "/mnt/models/typo" in seen["message"]
    assert seen["modelStatus"]["state"] == "FailedToLoad"
    assert seen["modelStatus"]["lastFailureInfo"]["message"] == seen["message"]


def test_a_gpu_that_is_asked_for_and_absent_is_said_and_never_replaced_by_the_cpu(team: Team):
    seen = condition_of(team, "no-gpu", "GpuNotFound")
    assert "GPU" in seen["message"]


def test_more_gpus_than_any_node_has_are_said_with_the_schedulers_words(team: Team):
    seen = condition_of(team, "no-mig", "InsufficientCapacity")
    assert "nvidia.com/mig-1g.10gb" in seen["message"]


def test_an_image_that_cannot_be_pulled_is_said(team: Team):
    seen = condition_of(team, "no-image", "ImagePullFailed")
    assert "localhost/no-such-image:none" in seen["message"]


def test_a_claim_that_does_not_exist_is_said(team: Team):
    seen = condition_of(team, "no-claim", "Unschedulable")
    assert "nowhere" in seen["message"]
