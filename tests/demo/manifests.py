"""What the demo installs and applies. Pure: names and objects, nothing that runs."""

import base64
import hashlib
from typing import Any

RELEASE = "gpumeter"
RELEASE_NAMESPACE = "gpumeter"
TEAM = "team-a"
SERVICE = "smollm2"
TENANTS = ("acme", "bolt")
GRANULARITY_LABEL = "gpumeter.io/granularity"
MODEL_CLAIM = "models"
MODEL_URI = f"pvc://{MODEL_CLAIM}/smollm2"


def values(image_version: str) -> dict[str, Any]:
    """The chart's values for a local cluster. The annotation rolls pods over when an image of the same name changed."""
    part = {"podAnnotations": {"demo-image": image_version}}
    return {
        "image": {"repository": "localhost/gpumeter-operator", "tag": "dev"},
        "workerImage": {"repository": "localhost/gpumeter-worker", "tag": "dev"},
        "billing": {"period": "1m", "closeGrace": "30s"},
        "logging": {"format": "text"},
        "operator": part,
        "collector": part,
        "gateway": {"replicas": 1, **part},
    }


def price_plan() -> dict[str, Any]:
    """An hour of a CPU worker for 40 cents, so that a minute's traffic is worth something."""
    return {
        "apiVersion": "gpumeter.io/v1alpha1",
        "kind": "PricePlan",
        "metadata": {"name": "default"},
        "spec": {
            "currency": "USD",
            "idlePayer": "platform",
            "rates": [{"gpuClass": "cpu", "perGpuHour": "0.40"}, {"gpuClass": "gpu", "perGpuHour": "2.50"}],
        },
    }


def namespace(name: str) -> dict[str, Any]:
    """A namespace that demands of pods what gpumeter's keep anyway."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def model_claim() -> dict[str, Any]:
    """A claim on the local cluster's volume of models."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": MODEL_CLAIM, "namespace": TEAM},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "models",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }


def inference_service(model_uri: str, image_version: str) -> dict[str, Any]:
    """One worker on the CPU; leave resources.gpu out for one GPU. A rollout needs room for two on two cores."""
    return {
        "apiVersion": "gpumeter.io/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": SERVICE, "namespace": TEAM},
        "spec": {
            "model": {"uri": model_uri, "maxModelLen": 2048},
            "engine": {"maxBatchSize": 8},
            "resources": {"gpu": {"count": 0}, "cpu": "500m", "memory": "3Gi"},
            "replicas": 1,
            "template": {"metadata": {"annotations": {"demo-image": image_version}}},
        },
    }


def api_key_secret(tenant: str, key: str) -> dict[str, Any]:
    """What the cluster keeps of a key: its SHA-256 and whose it is."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": f"api-key-{tenant}",
            "namespace": RELEASE_NAMESPACE,
            "labels": {"gpumeter.io/api-key": "true", "gpumeter.io/tenant": tenant},
        },
        "data": {"sha256": base64.b64encode(digest.encode()).decode()},
    }
