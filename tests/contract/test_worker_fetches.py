"""A real worker whose model is fetched first: what it says meanwhile, that it serves, and how it fails and leaves."""

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rigs import modelservers
from rigs.modelservers import COMMIT, Server
from rigs.worker import COMMAND, WorkerProcess, model_path, until

WEIGHTS = f"/acme/smollm2/resolve/{COMMIT}/model.safetensors"


@pytest.fixture(scope="module")
def hub() -> Iterator[Server]:
    files = {path.name: path.read_bytes() for path in model_path().iterdir() if path.is_file()}
    with modelservers.hub({"acme/smollm2": files}) as server:
        yield server


def environment(hub: Server, uri: str = "hf://acme/smollm2") -> dict[str, str]:
    return {"GPUMETER_MODEL_URI": uri, "HF_ENDPOINT": hub.url, "GPUMETER_LOG_LEVEL": "info"}


def message(worker: WorkerProcess) -> str:
    """What /readyz says; empty while nobody listens."""
    try:
        with urllib.request.urlopen(f"{worker.url}/readyz", timeout=10) as answer:
            return str(json.load(answer)["message"])
    except urllib.error.HTTPError as error:
        return str(json.load(error)["message"])
    except OSError:
        return ""


def test_a_worker_tells_how_far_its_model_is_and_then_serves_it(hub: Server, tmp_path: Path) -> None:
    hub.behaviour.slow_s = 0.002
    worker = WorkerProcess(tmp_path, environment(hub))
    try:
        told: list[str] = []

        def says_how_far() -> bool:
            told.append(message(worker))
            return "fetching the model: " in told[-1] and "MB/s" in told[-1]

        until(says_how_far, f"progress in readiness: {told[-3:]}", 120)
        hub.behaviour.slow_s = 0
        worker.ready()
        assert hub.behaviour.sent[WEIGHTS] == (model_path() / "model.safetensors").stat().st_size
        assert "fetching the model: " in worker.log
    finally:
        worker.stop()


def test_a_model_that_cannot_be_had_ends_the_worker_with_one_sentence(hub: Server, tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path, environment(hub, "hf://acme/nothing"))
    assert worker.process.wait(timeout=120) == 3
    assert worker.log.splitlines()[-1].startswith(f"ModelNotFound: {hub.url} has no acme/nothing, or it is private")


def test_a_worker_that_is_told_to_leave_while_it_fetches_leaves_at_once(hub: Server, tmp_path: Path) -> None:
    hub.behaviour.slow_s = 1
    worker = WorkerProcess(tmp_path, environment(hub))
    try:
        before = hub.behaviour.asked[f"GET {WEIGHTS}"]
        until(lambda: hub.behaviour.asked[f"GET {WEIGHTS}"] > before, "it fetches", 120)
        worker.process.send_signal(signal.SIGTERM)
        until(lambda: "sealed at record" in worker.log, "it seals its chain")
    finally:
        worker.stop()


def diagnosed(tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [COMMAND, "diagnose", "--dev", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_diagnose_prints_every_check_and_its_exit_code_says_whether_it_could_serve(hub: Server, tmp_path: Path) -> None:
    code, text = diagnosed(tmp_path, "--model", f"file://{model_path()}")
    assert code == 0
    for line in ("device         ok       the CPU, as asked for", "architecture   ok       llama", "It can serve."):
        assert line in text
    code, text = diagnosed(tmp_path, "--model", f"file://{tmp_path}", GPUMETER_GPU_COUNT="1")
    assert code == 3
    assert f"model          failed   {tmp_path / 'config.json'} is missing" in text
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        assert "device         failed   1 GPU was asked for and this container has none" in text
        assert "It cannot serve: 2 of " in text


def test_diagnose_speaks_json_and_asks_the_source(hub: Server, tmp_path: Path) -> None:
    hub.behaviour.slow_s = 0
    code, text = diagnosed(tmp_path, "--model", "hf://acme/smollm2", "-o", "json", HF_ENDPOINT=hub.url)
    document = json.loads(text)
    assert (code, document["canServe"]) == (0, True)
    [model] = [one for one in document["checks"] if one["name"] == "model"]
    assert model["verdict"] == "later"
    assert f"at {COMMIT}: " in model["found"]
    code, text = diagnosed(tmp_path, "--model", "hf://acme/nothing", "-o", "json", HF_ENDPOINT=hub.url)
    [failed] = [one for one in json.loads(text)["checks"] if one["verdict"] == "failed"]
    assert (code, failed["reason"]) == (3, "ModelNotFound")
    code, text = diagnosed(tmp_path, "-o", "json")
    assert code == 3
    assert json.loads(text)["checks"][0]["found"] == ("GPUMETER_MODEL_URI is not set; name the model with --model URI")
