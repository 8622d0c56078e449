"""From a spec to manifests: the contract with the worker's pod."""

import base64
from typing import Any

import pytest

from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.owned import label_value
from gpumeter_operator.decide.replicas import decide_replicas
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Installation, Workload, build

INSTALLATION = Installation("registry/worker:1", "IfNotPresent", "http://gateway.ns.svc")
CREDENTIALS = credentials_of(b"k" * 32, "u-1")


def built(spec: dict[str, Any] | None = None, **metadata: Any) -> Workload:
    whole = {"namespace": "team-a", "name": "smollm2", "uid": "u-1", "generation": 1, **metadata}
    read_spec, problems = read(
        {"metadata": whole, "spec": {"model": {"uri": "pvc://models/smollm2/v1/"}, **(spec or {})}}
    )
    assert problems == ()
    return build(read_spec, decide_replicas(read_spec).wanted, INSTALLATION, CREDENTIALS)


def pod(workload: Workload) -> dict[str, Any]:
    template: dict[str, Any] = workload.deployment["spec"]["template"]
    return template


def main(workload: Workload) -> dict[str, Any]:
    container: dict[str, Any] = pod(workload)["spec"]["containers"][0]
    return container


def environment(workload: Workload) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in main(workload)["env"]}


def test_everything_owned_has_its_fixed_name_its_owner_and_its_labels() -> None:
    workload = built({"model": {"uri": "hf://o/n", "name": "Smol:LM2"}})
    named = {(one["kind"], one["metadata"]["name"]) for one in (*workload.secrets, *workload.others)}
    assert named == {
        ("Secret", "smollm2-usage"),
        ("ServiceAccount", "smollm2"),
        ("Service", "smollm2"),
        ("Service", "smollm2-usage"),
        ("PodDisruptionBudget", "smollm2"),
        ("Deployment", "smollm2"),
    }
    for one in (*workload.secrets, *workload.others):
        [owner] = one["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == ("u-1", True)
        assert one["metadata"]["labels"] == {
            "app.kubernetes.io/name": "gpumeter-worker",
            "app.kubernetes.io/instance": "smollm2",
            "app.kubernetes.io/managed-by": "gpumeter",
            "gpumeter.io/inferenceservice": "smollm2",
            "llm-d.ai/model": "Smol-LM2",
        }
    assert workload.others[-1]["kind"] == "Deployment", "pods come when all that they need is there"


def test_the_pod_says_whose_usage_it_is() -> None:
    annotations = pod(built({"resources": {"gpu": {"count": 1, "class": "h100"}}}))["metadata"]["annotations"]
    assert annotations["gpumeter.io/service-uid"] == "u-1"
    assert (annotations["gpumeter.io/devices"], annotations["gpumeter.io/gpu-class"]) == ("1", "h100")
    annotations = pod(built({"resources": {"gpu": {"count": 0}}}))["metadata"]["annotations"]
    assert (annotations["gpumeter.io/devices"], annotations["gpumeter.io/gpu-class"]) == ("1", "cpu")


def test_the_worker_is_told_its_settings_by_environment() -> None:
    told = environment(
        built(
            {
                "engine": {"maxBatchSize": 8, "maxBatchTokens": 512, "maxWaitMs": 5, "maxQueueLength": 9},
                "metering": {"checkpointInterval": "2s", "leaseTimeout": "1m", "attribution": "tokens"},
                "drain": {"timeout": "45s"},
                "resources": {"gpu": {"count": 0}},
            }
        )
    )
    assert told == {
        "GPUMETER_SERVICE": "team-a/smollm2",
        "GPUMETER_SERVICE_UID": "u-1",
        "GPUMETER_WORKER_UID": {"fieldRef": {"fieldPath": "metadata.uid"}},
        "GPUMETER_MODEL_NAME": "smollm2",
        "GPUMETER_MODEL_URI": "file:///mnt/models/smollm2/v1",
        "GPUMETER_MODEL_REVISION": "main",
        "GPUMETER_DTYPE": "auto",
        "GPUMETER_MAX_MODEL_LEN": "4096",
        "GPUMETER_MAX_BATCH_SIZE": "8",
        "GPUMETER_MAX_BATCH_TOKENS": "512",
        "GPUMETER_MAX_WAIT_MS": "5",
        "GPUMETER_MAX_QUEUE_LENGTH": "9",
        "GPUMETER_CUDA_GRAPHS": "1",
        "GPUMETER_COMPILE": "0",
        "GPUMETER_GPU_COUNT": "0",
        "GPUMETER_GPU_CLASS": "cpu",
        "GPUMETER_ATTRIBUTION": "tokens",
        "GPUMETER_CHECKPOINT_INTERVAL_MS": "2000",
        "GPUMETER_LEASE_TIMEOUT_MS": "60000",
        "GPUMETER_DRAIN_TIMEOUT_MS": "45000",
        "GPUMETER_JOURNAL_DIR": "/var/lib/gpumeter",
        "GPUMETER_CREDENTIALS_DIR": "/etc/gpumeter/credentials",
        "GPUMETER_MODEL_CACHE": "/var/cache/gpumeter",
        "GPUMETER_GATEWAY_URL": "http://gateway.ns.svc",
        "HOME": "/tmp",
        "NVIDIA_VISIBLE_DEVICES": "void",
    }


def test_gpus_are_asked_for_under_the_resources_own_name_and_a_cpu_service_asks_for_none() -> None:
    resources = main(built({"resources": {"gpu": {"count": 1, "resourceName": "nvidia.com/mig-1g.10gb"}}}))["resources"]
    assert resources["limits"] == {"memory": "4Gi", "nvidia.com/mig-1g.10gb": "1"}
    resources = main(built({"resources": {"gpu": {"count": 0}, "cpu": "2"}}))["resources"]
    assert resources == {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}


def test_a_split_model_is_told_to_the_worker_and_its_devices_to_the_collector() -> None:
    split = built({"resources": {"gpu": {"count": 4}}, "parallelism": {"tensor": 4}})
    assert main(split)["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert (environment(split)["GPUMETER_GPU_COUNT"], environment(split)["GPUMETER_TENSOR_PARALLEL"]) == ("4", "4")
    assert pod(split)["metadata"]["annotations"]["gpumeter.io/devices"] == "4"
    assert "GPUMETER_TENSOR_PARALLEL" not in environment(built()), "a worker that runs now would be replaced"


def test_a_cpu_service_gets_no_gpu_by_the_image_that_it_runs_either() -> None:
    """An image built on CUDA says that it sees all GPUs, and NVIDIA's runtime believes it."""
    none = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}
    assert none in main(built({"resources": {"gpu": {"count": 0}}}))["env"]
    assert "NVIDIA_VISIBLE_DEVICES" not in {one["name"] for one in main(built())["env"]}


def test_a_model_on_a_claim_is_mounted_read_only_and_any_other_is_not_mounted() -> None:
    spec = pod(built())["spec"]
    [volume] = [one for one in spec["volumes"] if one["name"] == "model"]
    assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert {"name": "model", "mountPath": "/mnt/models", "readOnly": True} in main(built())["volumeMounts"]
    other = built({"model": {"uri": "hf://o/n"}})
    assert "model" not in {one["name"] for one in pod(other)["spec"]["volumes"]}
    assert environment(other)["GPUMETER_MODEL_URI"] == "hf://o/n"


def test_a_whole_claim_can_be_the_model() -> None:
    assert environment(built({"model": {"uri": "pvc://models"}}))["GPUMETER_MODEL_URI"] == "file:///mnt/models"


def test_the_cache_is_a_claim_where_one_is_named() -> None:
    volumes = {one["name"]: one for one in pod(built({"cache": {"pvc": "weights"}}))["spec"]["volumes"]}
    assert volumes["cache"] == {"name": "cache", "persistentVolumeClaim": {"claimName": "weights"}}
    volumes = {one["name"]: one for one in pod(built({"resources": {"sharedMemory": "2Gi"}}))["spec"]["volumes"]}
    assert volumes["cache"] == {"name": "cache", "emptyDir": {}}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}


def test_the_pod_is_locked_down() -> None:
    spec = pod(built())["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 65532
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert main(built())["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_grace_period_covers_drain_and_the_last_acknowledgement() -> None:
    assert pod(built({"drain": {"timeout": "45s"}}))["spec"]["terminationGracePeriodSeconds"] == 90


def test_probes_let_a_model_load_and_stop_traffic_while_draining() -> None:
    container = main(built())
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 3_600
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_rollouts_are_as_the_spec_says() -> None:
    deployment = built({"rolloutStrategy": {"maxSurge": 0, "maxUnavailable": "50%"}, "replicas": 4}).deployment
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": "50%"}
    assert deployment["spec"]["replicas"] == 4


def test_the_usage_service_reaches_workers_that_are_not_ready() -> None:
    [usage] = [one for one in built().others if one["metadata"]["name"] == "smollm2-usage" and one["kind"] == "Service"]
    assert (usage["spec"]["clusterIP"], usage["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert usage["spec"]["ports"][0]["port"] == 8001


def test_the_secret_holds_the_derived_credentials_and_nothing_else() -> None:
    data = {key: base64.b64decode(value).decode() for key, value in built().secrets[0]["data"].items()}
    assert data == {"usage-token": CREDENTIALS.usage_token, "hop-key": CREDENTIALS.hop_key}


def test_a_template_is_merged_and_the_worker_keeps_what_is_its_own() -> None:
    workload = built(
        {
            "template": {
                "metadata": {"labels": {"team": "blue"}, "annotations": {"note": "x"}},
                "spec": {
                    "nodeSelector": {"pool": "gpu"},
                    "tolerations": [{"key": "gpu", "operator": "Exists"}],
                    "volumes": [{"name": "certificates", "configMap": {"name": "ca"}}],
                    "containers": [
                        {
                            "name": "main",
                            "env": [{"name": "HF_TOKEN", "value": "t"}],
                            "resources": {"limits": {"cpu": "4"}},
                        },
                        {"name": "sidecar", "image": "logs:1"},
                    ],
                },
            }
        }
    )
    template = pod(workload)
    assert template["metadata"]["labels"]["team"] == "blue"
    assert template["metadata"]["labels"]["gpumeter.io/inferenceservice"] == "smollm2"
    assert template["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert [one["name"] for one in template["spec"]["containers"]] == ["main", "sidecar"]
    told = environment(workload)
    assert told["HF_TOKEN"] == "t"
    assert told["GPUMETER_SERVICE"] == "team-a/smollm2"
    assert main(workload)["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/gpu": "1", "cpu": "4"}
    assert "certificates" in {one["name"] for one in template["spec"]["volumes"]}


def test_pods_of_another_template_are_told_apart_and_replicas_alone_change_no_template() -> None:
    assert built({"replicas": 1}).template_hash == built({"replicas": 5}).template_hash
    assert built().template_hash != built({"engine": {"maxBatchSize": 8}}).template_hash
    annotations = pod(built())["metadata"]["annotations"]
    assert annotations["gpumeter.io/template"] == built().template_hash


@pytest.mark.parametrize(
    ("text", "safe"),
    [("SmolLM2", "SmolLM2"), ("a:b/c", "a-b-c"), ("-x-", "x"), ("a" * 80, "a" * 63), ("a" * 62 + "::", "a" * 62)],
)
def test_model_names_become_label_values(text: str, safe: str) -> None:
    assert label_value(text) == safe
