"""A notebook in place of a worker: by choice alone, on nobody's bill, and closed to everybody without its token."""

import base64
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpumeter_operator.decide.credentials import Credentials, credentials_of
from gpumeter_operator.decide.development import development_problems
from gpumeter_operator.decide.names import DEVELOPMENT_ANNOTATION
from gpumeter_operator.decide.pods import PodState
from gpumeter_operator.decide.replicas import decide_replicas
from gpumeter_operator.decide.spec import ServiceSpec, read
from gpumeter_operator.decide.status import Seen, decide_status
from gpumeter_operator.decide.workload import Installation, Workload, build
from gpumeter_operator.flow.discover import runs_a_notebook

INSTALLATION = Installation("worker:1", "IfNotPresent", "", development_image="development:1")
CREDENTIALS = credentials_of(b"k" * 32, "u-1")
IMAGES = ("worker", "development")


def service(**spec: Any) -> ServiceSpec:
    metadata = {"namespace": "team-a", "name": "smollm2", "uid": "u-1", "generation": 1}
    whole = {"model": {"uri": "pvc://models/n"}, "resources": {"gpu": {"count": 1, "class": "h100"}}, **spec}
    found, problems = read({"metadata": metadata, "spec": whole})
    assert problems == ()
    return found


def built(*, jupyter: bool = True, credentials: Credentials = CREDENTIALS, **spec: Any) -> Workload:
    return build(service(development={"jupyter": jupyter}, **spec), 1, INSTALLATION, credentials)


def pod(workload: Workload) -> Any:
    return workload.deployment["spec"]["template"]


def main(workload: Workload) -> Any:
    [container] = pod(workload)["spec"]["containers"]
    return container


def test_nobody_gets_a_notebook_who_did_not_ask_for_one() -> None:
    for workload in (built(jupyter=False), build(service(), 1, INSTALLATION, CREDENTIALS)):
        assert main(workload)["args"] == ["serve"]
        assert "jupyter" not in str(workload).replace("jupyter=False", "")


def test_the_notebook_listens_to_its_own_pod_alone_and_asks_for_a_token() -> None:
    container = main(built())
    assert "--ip=127.0.0.1" in container["command"]
    assert "ports" not in container
    [variable] = [one for one in container["env"] if one["name"] == "JUPYTER_TOKEN_FILE"]
    [mount] = [one for one in container["volumeMounts"] if one["mountPath"] == "/etc/gpumeter/jupyter"]
    assert variable["value"] == f"{mount['mountPath']}/token"
    [volume] = [one for one in pod(built())["spec"]["volumes"] if one["name"] == mount["name"]]
    [_, secret] = built().secrets
    assert volume["secret"]["secretName"] == secret["metadata"]["name"] == "smollm2-jupyter"
    token = base64.b64decode(secret["data"]["token"]).decode()
    assert len(token) == 64
    assert token not in (CREDENTIALS.usage_token, CREDENTIALS.hop_key)
    assert built(credentials=credentials_of(b"k" * 32, "u-2")).secrets[1] != secret, "another service, another token"


def test_whoever_opens_the_notebook_finds_no_credentials_of_workers_in_it() -> None:
    spec = pod(built())["spec"]
    assert not {"credentials", "journal"} & {one["name"] for one in spec["volumes"]}
    assert not {one["name"] for one in main(built())["volumeMounts"]} - {one["name"] for one in spec["volumes"]}


def test_the_notebooks_pod_says_that_it_is_no_worker_so_that_the_collector_sends_it_no_token() -> None:
    assert runs_a_notebook(pod(built())) and pod(built())["metadata"]["annotations"][DEVELOPMENT_ANNOTATION] == "true"
    assert DEVELOPMENT_ANNOTATION not in pod(built(jupyter=False))["metadata"]["annotations"]
    assert not runs_a_notebook(pod(built(jupyter=False)))


def test_the_notebook_has_the_workers_gpu_models_and_locks() -> None:
    notebook, worker = main(built()), main(built(jupyter=False))
    for same in ("resources", "securityContext"):
        assert notebook[same] == worker[same]
    assert {"name": "model", "mountPath": "/mnt/models", "readOnly": True} in notebook["volumeMounts"]
    told = {one["name"]: one.get("value") for one in notebook["env"]}
    assert told["GPUMETER_MODEL_URI"] == "file:///mnt/models/n"
    assert (notebook["image"], main(built(engine={"image": "mine:1"}))["image"]) == ("development:1", "mine:1")


def test_a_notebook_without_a_gpu_sees_none_of_its_node() -> None:
    def seen(workload: Workload) -> list[Any]:
        return [one["value"] for one in main(workload)["env"] if one["name"] == "NVIDIA_VISIBLE_DEVICES"]

    none = {"resources": {"gpu": {"count": 0}}}
    assert seen(built(**none)) == seen(built(jupyter=False, **none)) == ["void"]
    assert seen(built()) == [], "the device plugin says which"


def test_its_pod_is_allocated_time_of_its_class_and_gets_no_request() -> None:
    metadata = pod(built())["metadata"]
    assert metadata["annotations"]["gpumeter.io/service-uid"] == "u-1"
    assert metadata["annotations"]["gpumeter.io/gpu-class"] == "h100"
    [front] = [one for one in built().others if one["kind"] == "Service" and one["metadata"]["name"] == "smollm2"]
    assert not front["spec"]["selector"].items() <= metadata["labels"].items()


def test_notebooks_are_kept_on_a_volume_of_the_template_where_one_is_mounted() -> None:
    own = {"name": "notebooks", "persistentVolumeClaim": {"claimName": "notebooks"}}
    mounts = [{"name": "notebooks", "mountPath": "/workspace"}]
    workload = built(template={"spec": {"volumes": [own], "containers": [{"name": "main", "volumeMounts": mounts}]}})
    [mount] = [one for one in main(workload)["volumeMounts"] if one["mountPath"] == "/workspace"]
    assert mount["name"] == "notebooks"


def test_without_an_image_that_has_one_it_is_said_who_can_name_it() -> None:
    wanted = service(development={"jupyter": True})
    [problem] = development_problems(wanted, "")
    assert problem.reason == "DevelopmentImageMissing"
    assert "Dockerfile.development" in problem.message
    assert development_problems(wanted, "development:1") == ()
    assert development_problems(service(), "") == ()
    assert development_problems(service(development={"jupyter": True}, engine={"image": "mine:1"}), "") == ()


def test_the_status_says_how_to_open_it_and_that_nothing_is_served_or_metered() -> None:
    spec = service(development={"jupyter": True})
    runs = PodState("w-1", "now", ready=True, terminating=False, started=True, stuck=False, problem=None, failure=None)
    seen = Seen(spec, decide_replicas(spec), (), "now", None, (runs,))
    status = decide_status(seen, {}, datetime(2026, 11, 21, 10, 0, 0, tzinfo=UTC))
    conditions = {one["type"]: (one["status"], one["reason"], one["message"]) for one in status["conditions"]}
    state, reason, message = conditions["Ready"]
    assert (state, reason) == ("False", "Development")
    assert "kubectl port-forward -n team-a deploy/smollm2 8888" in message
    assert "kubectl get secret -n team-a smollm2-jupyter -o jsonpath='{.data.token}'" in message
    assert conditions["MeteringReady"][:2] == ("False", "Development")
    assert "billed to nobody" in conditions["MeteringReady"][2]
    assert (status["readyReplicas"], status["modelStatus"]["state"]) == (0, "Standby")


def test_the_notebooks_image_changes_no_library_of_the_workers() -> None:
    pinned = {name: dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", requirements(name), re.MULTILINE)) for name in IMAGES}
    shared = pinned["worker"].keys() & pinned["development"].keys()
    assert len(shared) > 10
    assert {name: pinned["worker"][name] for name in shared} == {name: pinned["development"][name] for name in shared}
    assert "torch" not in pinned["development"]


def requirements(name: str) -> str:
    return (Path(__file__).parents[2] / "requirements" / f"{name}.txt").read_text()
