"""What the operator writes into a pod is what the worker reads from it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Installation, Workload, build
from gpumeter_worker.main import main as worker_command
from gpumeter_worker.settings import Settings, from_environment
from gpumeter_worker.sources.location import local_path

pytestmark = pytest.mark.shared

ROOT = Path(__file__).parents[2]
INSTALLATION = Installation("registry/worker:1", "IfNotPresent", "http://gpumeter-gateway.gpumeter.svc")
CREDENTIALS = credentials_of(b"k" * 32, "u-1")


def workload(spec: dict[str, Any]) -> Workload:
    metadata = {"namespace": "team-a", "name": "smollm2", "uid": "u-1", "generation": 1}
    read_spec, problems = read({"metadata": metadata, "spec": spec})
    assert problems == ()
    return build(read_spec, 1, INSTALLATION, CREDENTIALS)


def container(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = workload(spec).deployment["spec"]["template"]["spec"]["containers"][0]
    return found


def settings(spec: dict[str, Any], folder: Path) -> Settings:
    """The worker's settings as it would read them in that pod, its credentials mounted at `folder`."""
    (folder / "usage-token").write_text("u" * 64)
    (folder / "hop-key").write_text("h" * 64)
    environment = {one["name"]: one.get("value", "pod-uid") for one in container(spec)["env"]}
    return from_environment(environment | {"GPUMETER_CREDENTIALS_DIR": str(folder)})


def test_the_containers_command_is_one_that_the_worker_has():
    [command] = container({"model": {"uri": "hf://o/n"}})["args"]
    assert command in worker_command.commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "spec",
    [
        {"model": {"uri": "hf://o/n"}},
        {"model": {"uri": "pvc://models/a/b"}, "resources": {"gpu": {"count": 0}}},
        {"model": {"uri": "file:///m", "dtype": "float32"}, "resources": {"gpu": {"class": "h100"}}},
        {"model": {"uri": "file:///m"}, "resources": {"gpu": {"count": 4}}, "parallelism": {"tensor": 4}},
    ],
)
def test_the_worker_accepts_every_setting_of_its_pod(spec: dict[str, Any], tmp_path: Path):
    found = settings(spec, tmp_path)
    gpu_count = spec.get("resources", {}).get("gpu", {}).get("count", 1)
    assert (found.service, found.service_uid, found.worker_uid) == ("team-a/smollm2", "u-1", "pod-uid")
    assert (found.gpu_count, found.ranks) == (gpu_count, max(gpu_count, 1))
    assert found.device == ("cuda" if gpu_count else "cpu")


def test_what_a_user_sets_arrives_in_the_worker(tmp_path: Path):
    spec = {
        "model": {"uri": "hf://o/n", "name": "small", "revision": "abc", "maxModelLen": 512, "dtype": "bfloat16"},
        "engine": {
            "maxBatchSize": 3,
            "maxBatchTokens": 70,
            "maxWaitMs": 5,
            "maxQueueLength": 9,
            "compile": True,
            "cudaGraphs": False,
        },
        "metering": {"attribution": "tokens", "checkpointInterval": "2s", "leaseTimeout": "40s"},
        "drain": {"timeout": "33s"},
    }
    found = settings(spec, tmp_path)
    assert (found.model_name, found.model_revision, found.max_model_len, found.dtype) == (
        "small",
        "abc",
        512,
        "bfloat16",
    )
    assert (found.max_batch_size, found.max_batch_tokens, found.max_wait_ms, found.max_queue_length) == (3, 70, 5, 9)
    assert (found.attribution, found.checkpoint_interval_ms, found.lease_timeout_ms) == ("tokens", 2000, 40_000)
    assert found.drain_timeout_ms == 33_000
    assert (found.compile, found.cuda_graphs) == (True, False)


@pytest.mark.parametrize("uri", ["hf://o/n", "s3://models/a", "oci://registry.example.com/a:v1"])
def test_the_worker_fetches_from_every_source_that_it_is_told_of(uri: str, tmp_path: Path):
    assert local_path(settings({"model": {"uri": uri}}, tmp_path).model_uri) is None
    assert local_path(settings({"model": {"uri": "pvc://claim/a/b"}}, tmp_path).model_uri) == Path("/mnt/models/a/b")


def test_a_claim_for_the_cache_is_where_the_worker_keeps_models(tmp_path: Path):
    spec = {"model": {"uri": "s3://models/a"}, "cache": {"pvc": "weights"}}
    pod = workload(spec).deployment["spec"]["template"]["spec"]
    [name] = [one["name"] for one in pod["volumes"] if one.get("persistentVolumeClaim") == {"claimName": "weights"}]
    [path] = [one["mountPath"] for one in pod["containers"][0]["volumeMounts"] if one["name"] == name]
    assert str(settings(spec, tmp_path).model_cache) == path


def test_a_users_credentials_for_sources_reach_the_worker_beside_its_own_settings():
    env = [{"name": "GPUMETER_ALLOW_PICKLE", "value": "1"}, {"name": "GPUMETER_PREFIX_CACHE", "value": "0"}]
    main = {"name": "main", "env": env, "envFrom": [{"secretRef": {"name": "s3"}}]}
    built = container({"model": {"uri": "s3://models/a"}, "template": {"spec": {"containers": [main]}}})
    assert built["envFrom"] == [{"secretRef": {"name": "s3"}}]
    found = {one["name"]: one.get("value") for one in built["env"]}
    assert found["GPUMETER_ALLOW_PICKLE"] == "1"
    assert found["GPUMETER_MODEL_URI"] == "s3://models/a"


def test_the_worker_writes_only_where_its_pod_lets_it(tmp_path: Path):
    spec = {"model": {"uri": "hf://o/n"}}
    writable = {mount["mountPath"] for mount in container(spec)["volumeMounts"] if not mount.get("readOnly", False)}
    found = settings(spec, tmp_path)
    assert {str(found.journal_dir), str(found.model_cache)} <= writable


def test_the_secret_holds_what_the_worker_looks_for():
    secret = workload({"model": {"uri": "hf://o/n"}}).secrets[0]
    assert set(secret["data"]) == {"usage-token", "hop-key"}


@pytest.mark.parametrize(
    "example", sorted((ROOT / "examples").glob("inferenceservice-*.yaml")), ids=lambda one: one.stem
)
def test_every_example_is_one_that_the_operator_runs_and_the_worker_reads(example: Path, tmp_path: Path):
    spec = yaml.safe_load(example.read_text())["spec"]
    assert settings(spec, tmp_path).model_name
