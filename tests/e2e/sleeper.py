"""A service that scales from 0 to 1, begins with a worker and goes to sleep when nobody asks it.

Owns its objects, and when it sleeps. It takes a minute to fall asleep, so it is begun before it is needed.
"""

from typing import Any

from demo import manifests, steps
from demo.kube import Kube

TEAM = "team-sleep"
NAME = "sleeper"
SERVICES = "inferenceservices.gpumeter.io"


def begin(demo: steps.Demo) -> None:
    """Apply it; does nothing where it is there already."""
    kube = demo.kube
    kube.apply(manifests.namespace(TEAM))
    kube.apply(manifests.model_claim() | {"metadata": {"name": manifests.MODEL_CLAIM, "namespace": TEAM}})
    manifest: dict[str, Any] = manifests.inference_service(demo.model_uri, demo.image_version)
    manifest["metadata"] = {"name": NAME, "namespace": TEAM}
    del manifest["spec"]["replicas"]
    manifest["spec"] |= {
        "model": {**manifest["spec"]["model"], "name": NAME},
        "drain": {"timeout": "10s"},
        "scaling": {"minReplicas": 0, "maxReplicas": 1, "scaleToZeroAfter": "30s"},
    }
    kube.apply(manifest)


def sleeps(kube: Kube) -> bool:
    """Whether it was awake once and no worker is left of it."""
    return "NoRequests" in history(kube) and not kube.get("-n", TEAM, "pods")["items"]


def history(kube: Kube) -> set[str]:
    """The reasons of what the autoscaler did to it."""
    status = kube.get("-n", TEAM, f"{SERVICES}/{NAME}").get("status", {})
    return {each["reason"] for each in status.get("scalingHistory", [])}
