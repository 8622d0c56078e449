"""JupyterLab in place of a worker (docs/services.md, "A notebook"), seen by the one who uses it."""

import base64
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from demo import audit, manifests, steps
from demo.kube import DemoFailed
from devcluster.imagekeys import DEVELOPMENT
from development.notebook import Notebook, opened
from development.scene import Scene, documented_spec, settled
from e2e.story import until

SECRETS_LIE_IN = ("/etc/gpumeter", "/run/secrets", "/var/run/secrets", "/var/lib/gpumeter")
MAY_WRITE = ("/workspace", "/tmp", "/var/cache/gpumeter", "/dev/shm")
MAY_NOT_WRITE = ("/", "/opt/gpumeter", "/opt/application", "/mnt/models")
FINAL_WITHIN_S = 180
LOOK = f"""
import errno, json, os, pathlib, torch

def writes(folder):
    try:
        (pathlib.Path(folder) / "written").write_text("yes")
        return "written"
    except OSError as problem:
        return errno.errorcode[problem.errno]

files = [file for top in {SECRETS_LIE_IN!r} for file in pathlib.Path(top).rglob("*") if file.is_file()]
model = pathlib.Path(os.environ["GPUMETER_MODEL_URI"].removeprefix("file://"))
print(json.dumps({{
    "zero": torch.zeros(1).tolist(),
    "user": os.getuid(),
    "folder": os.getcwd(),
    "writes": {{folder: writes(folder) for folder in {(*MAY_WRITE, *MAY_NOT_WRITE)!r}}},
    "environment": dict(os.environ),
    "secrets": {{str(file): file.read_text() for file in files}},
    "model": sorted(file.name for file in model.iterdir()),
}}))
"""


@pytest.fixture(scope="module")
def kernel(notebook: Notebook) -> str:
    """A kernel of the one kind that the image has."""
    return str(notebook.told("POST", "/api/kernels", {"name": "python3"})["id"])


@pytest.fixture(scope="module")
def seen(notebook: Notebook, kernel: str) -> dict[str, Any]:
    """What a user's code finds in the pod."""
    ran = notebook.run(kernel, LOOK)
    assert ran.status == "ok", ran.error
    found: dict[str, Any] = json.loads(ran.printed)
    return found


def test_the_pod_runs_the_image_that_the_chart_names_and_its_probe_answers(scene: Scene) -> None:
    [container] = scene.pod()["spec"]["containers"]
    [status] = scene.pod()["status"]["containerStatuses"]
    assert container["image"] == DEVELOPMENT.reference
    assert "readinessProbe" in container
    assert (status["ready"], status["restartCount"]) == (True, 0)


def test_ready_is_false_because_there_is_a_notebook(scene: Scene) -> None:
    assert (scene.ready["status"], scene.ready["reason"]) == ("False", "Development")
    metering = scene.stage.condition("MeteringReady")
    assert (metering["status"], metering["reason"]) == ("False", "Development")


def test_it_answers_whoever_has_the_token_and_nobody_else(notebook: Notebook) -> None:
    assert {"started", "kernels"} <= notebook.told("GET", "/api/status").keys()
    for wrong in ("", "0" * len(notebook.token)):
        stranger = replace(notebook, token=wrong)
        assert [stranger.ask("GET", f"/api/{path}")[0] for path in ("status", "kernels", "contents")] == [403] * 3


def test_the_page_and_what_it_is_made_of_are_served(notebook: Notebook) -> None:
    status, page = notebook.ask("GET", "/lab")
    scripts = re.findall(r'src="(/static/lab/[^"]+\.js[^"]*)"', page)
    assert (status, "<title>JupyterLab</title>" in page, bool(scripts)) == (200, True, True)
    assert [notebook.ask("GET", script)[0] for script in scripts] == [200] * len(scripts)


def test_at_the_pods_own_address_nobody_answers(scene: Scene) -> None:
    pod = scene.pod()["metadata"]["name"]
    with pytest.raises(DemoFailed) as refused:
        scene.demo.kube.run("get", "--raw", f"/api/v1/namespaces/{manifests.TEAM}/pods/{pod}:8888/proxy/api")
    assert "refused" in refused.value.evidence


def test_a_kernel_computes_with_the_workers_torch_and_sees_its_model(seen: dict[str, Any]) -> None:
    assert seen["zero"] == [0.0]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(seen["model"])


def test_what_is_wrong_with_a_users_code_is_told_to_the_user(notebook: Notebook, kernel: str) -> None:
    ran = notebook.run(kernel, "1 / 0")
    assert (ran.status, "ZeroDivisionError" in ran.error) == ("error", True)


def test_the_workspace_can_be_written_and_the_images_own_files_cannot(seen: dict[str, Any]) -> None:
    assert (seen["user"], seen["folder"]) == (65532, "/workspace")
    assert seen["writes"] == dict.fromkeys(MAY_WRITE, "written") | dict.fromkeys(MAY_NOT_WRITE, "EROFS")


def test_no_credential_but_its_own_token_is_in_the_pod(scene: Scene, notebook: Notebook, seen: dict[str, Any]) -> None:
    data = scene.demo.kube.get("-n", manifests.TEAM, "secret", f"{manifests.SERVICE}-usage")["data"]
    foreign = [base64.b64decode(value).decode(errors="replace") for value in data.values()]
    assert len(foreign) >= 2 and all(foreign)
    found = [*seen["environment"].values(), *seen["secrets"].values()]
    assert notebook.token in found, "the look finds what there is"
    assert not [one for one in foreign if any(one in text for text in found)]
    assert {path.rpartition("/")[0].partition("/..")[0] for path in seen["secrets"]} == {"/etc/gpumeter/jupyter"}


def test_no_gpu_of_the_node_is_shown_to_a_service_that_asked_for_none(seen: dict[str, Any]) -> None:
    assert seen["environment"]["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_there_is_a_terminal(notebook: Notebook) -> None:
    terminal = notebook.told("POST", "/api/terminals")["name"]
    assert "whole=42" in notebook.type(terminal, "echo whole=$((6*7))", "whole=42")


def test_its_time_is_nobodys_but_the_platforms(scene: Scene) -> None:
    kube, lines = scene.demo.kube, []

    def closed() -> bool:
        reports = kube.get("-n", manifests.TEAM, "usagereports.gpumeter.io")["items"]
        pods = kube.get("-n", manifests.TEAM, "pods", "-l", steps.WORKERS)["items"]
        lines[:] = [one for one in audit.lines_of(reports, audit.runs_of(pods), manifests.SERVICE) if one.allocated_ns]
        return bool(lines)

    with scene.demo.progress.step("a period with the notebook becomes Final"):
        until(closed, FINAL_WITHIN_S, lambda: steps.bill_evidence(scene.demo))
    for line in lines:
        assert line.holds
        assert line.by_tenant == {audit.PLATFORM: line.unaccounted_ns}
        assert line.unaccounted_ns == line.allocated_ns


def test_on_the_documents_volume_a_notebook_stays_when_its_pod_goes(scene: Scene) -> None:
    wanted = documented_spec()
    [volume] = wanted["template"]["spec"]["volumes"]
    claim = {"name": volume["persistentVolumeClaim"]["claimName"], "namespace": manifests.TEAM}
    scene.demo.kube.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": claim,
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        }
    )
    former = scene.pod()["metadata"]["name"]
    scene.stage.edit(**wanted)
    until(lambda: former not in names(scene), 120, scene.stage.told)
    cell = {"cell_type": "code", "source": "6 * 7", "metadata": {}, "outputs": [], "execution_count": None}
    content = {"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [cell]}
    with opened(scene.demo.kube, settled(scene.stage)["message"]) as notebook:
        notebook.told("PUT", "/api/contents/kept.ipynb", {"type": "notebook", "content": content})
    former = scene.pod()["metadata"]["name"]
    scene.demo.kube.run("-n", manifests.TEAM, "delete", "pod", former)
    with opened(scene.demo.kube, settled(scene.stage)["message"]) as notebook:
        assert notebook.told("GET", "/api/contents/kept.ipynb")["content"]["cells"][0]["source"] == "6 * 7"
    assert former not in names(scene)


def test_switched_off_a_worker_serves_again(scene: Scene) -> None:
    scene.stage.edit(development=None, template=None)
    with scene.demo.progress.step("a worker in place of the notebook", scene.stage.told):
        until(scene.stage.settled, steps.READY_WITHIN_S, lambda: steps.service_evidence(scene.demo))
    [pod] = scene.stage.pods()
    assert pod["spec"]["containers"][0]["image"] == "localhost/gpumeter-worker:dev"


def names(scene: Scene) -> set[str]:
    return {pod["metadata"]["name"] for pod in scene.stage.pods()}
