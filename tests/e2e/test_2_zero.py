"""A service that nobody asks sleeps, and the first request wakes it: on a real node, through the gateway."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from demo import manifests, steps
from demo.manifests import RELEASE, RELEASE_NAMESPACE
from e2e.story import ready_reason, until
from traffic.asks import Ask, Kind
from traffic.exchange import Outcome, exchange

TEAM = "team-sleep"
NAME = "sleeper"
START_S = 120
"""A worker loads its model in it; the request waits for that, and no longer than the gateway lets it."""


@pytest.fixture(scope="module")
def sleeper(release: steps.Demo) -> Iterator[steps.Demo]:
    """A service with scaling from 0 to 1, which was ready once and has gone to sleep."""
    kube = release.kube
    kube.apply(manifests.namespace(TEAM))
    kube.apply(manifests.model_claim() | {"metadata": {"name": manifests.MODEL_CLAIM, "namespace": TEAM}})
    manifest: dict[str, Any] = manifests.inference_service(release.model_uri, release.image_version)
    manifest["metadata"] = {"name": NAME, "namespace": TEAM}
    del manifest["spec"]["replicas"]
    manifest["spec"] |= {
        "model": {**manifest["spec"]["model"], "name": NAME},
        "drain": {"timeout": "10s"},
        "scaling": {"minReplicas": 0, "maxReplicas": 1, "scaleToZeroAfter": "30s"},
    }
    kube.apply(manifest)
    with release.progress.step("a service that scales starts", lambda: ready_reason(kube, TEAM, NAME)):
        until(lambda: ready_reason(kube, TEAM, NAME).startswith("Serving"), 240)
    with release.progress.step("and goes to sleep", lambda: ready_reason(kube, TEAM, NAME)):
        until(lambda: not kube.get("-n", TEAM, "pods")["items"], 120)
    yield release
    kube.run("-n", TEAM, "delete", "inferenceservices.gpumeter.io", NAME, "--timeout=100s")


def test_the_first_request_wakes_a_service_that_sleeps_and_is_answered(sleeper: steps.Demo, keys: dict[str, str]):
    kube = sleeper.kube
    replicas = ("-n", TEAM, "get", "deployments", "-o", "jsonpath={.items[*].spec.replicas}")
    assert kube.run(*replicas) == "0"
    tenant = next(iter(keys))
    ask = Ask(0, Kind.PLAIN, {"model": NAME, "messages": [{"role": "user", "content": "Wake up."}], "max_tokens": 8})
    with kube.forwarded(RELEASE_NAMESPACE, f"{RELEASE}-gateway", 80) as port:
        started = time.monotonic()
        found = exchange("127.0.0.1", port, tenant, keys[tenant], ask, timeout_s=START_S)
    print(f"from zero to an answer in {time.monotonic() - started:.1f} s: {found}")
    assert found.outcome is Outcome.FINISHED, found.note
    history = kube.get("-n", TEAM, f"inferenceservices.gpumeter.io/{NAME}")["status"]["scalingHistory"]
    assert "FirstRequest" in {each["reason"] for each in history}
    assert "NoRequests" in {each["reason"] for each in history}
