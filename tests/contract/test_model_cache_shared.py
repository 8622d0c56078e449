"""Workers that share a cache volume, as real processes that fetch the same model, and are killed while they do."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rigs import modelservers
from rigs.modelservers import COMMIT, Server, tiny_model
from rigs.worker import until

MODEL = tiny_model(3_000_000)
WEIGHTS = f"/acme/tiny/resolve/{COMMIT}/model.safetensors"
QUICK = {"source_s": 10.0, "back_off_s": [0.2], "beat_s": 0.2, "stale_s": 2.0, "poll_s": 0.1}


class Fetcher:
    """One process that fetches, as a worker starts it."""

    def __init__(self, hub: Server, cache: Path, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpumeter_worker.sources.process"],
            env={"PATH": os.environ["PATH"], "HF_ENDPOINT": hub.url, "HOME": str(cache.parent), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.told: list[str] = []
        asked = {
            "uri": "hf://acme/tiny",
            "revision": "main",
            "allow_pickle": False,
            "cache": str(cache),
            "owner": "pod",
            "patience": QUICK,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        self._answer: dict[str, Any] = {}
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said: dict[str, Any] = json.loads(line)
            if "told" in said:
                self.told.append(said["told"])
            else:
                self._answer = said

    def answer(self) -> dict[str, Any]:
        """What it says in the end."""
        self._listening.join(timeout=120)
        assert self._answer, f"it ended with status {self._process.poll()} and without a word"
        return self._answer

    def kill(self) -> None:
        """As a node or a kubelet does it."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it, and see that it ends when nobody listens."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


@pytest.fixture
def hub() -> Iterator[Server]:
    with modelservers.hub({"acme/tiny": MODEL}) as server:
        yield server


def test_of_two_who_want_a_model_one_fetches_and_both_use_it(hub: Server, tmp_path: Path) -> None:
    hub.behaviour.slow_s = 1
    fetchers = [Fetcher(hub, tmp_path / "cache") for _ in range(2)]

    def both_tell() -> bool:
        told = [sentence for fetcher in fetchers for sentence in fetcher.told]
        return any(
            one.startswith("another worker is fetching the model (fetching the model: ") for one in told
        ) and any(one.startswith("fetching the model: ") and one.endswith(" left") for one in told)

    until(both_tell, "one fetches, the other says that it does")
    hub.behaviour.slow_s = 0
    paths = {fetcher.answer()["path"] for fetcher in fetchers}
    assert len(paths) == 1
    assert hub.behaviour.sent[WEIGHTS] == len(MODEL["model.safetensors"])
    assert (Path(paths.pop()) / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    for fetcher in fetchers:
        fetcher.close()
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert len(left) == 2, left  # the copy, and refs


def test_another_takes_over_from_one_that_is_killed_in_the_middle(hub: Server, tmp_path: Path) -> None:
    models = tmp_path / "cache" / "models"
    hub.behaviour.slow_s = 0.05
    first = Fetcher(hub, tmp_path / "cache")
    until(lambda: hub.behaviour.sent[WEIGHTS] > 2**18, "the first fetches")
    second = Fetcher(hub, tmp_path / "cache")
    first.kill()
    assert list(models.glob("*.claim")), "a killed fetcher cannot clean up"
    hub.behaviour.slow_s = 0
    folder = Path(second.answer()["path"])
    second.close()
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert (folder / "config.json").read_bytes() == MODEL["config.json"]
    assert sorted(path.name for path in models.iterdir()) == sorted([folder.name, "refs"])


def test_a_fetcher_ends_when_its_worker_does(hub: Server, tmp_path: Path) -> None:
    hub.behaviour.slow_s = 0.5
    fetcher = Fetcher(hub, tmp_path / "cache")
    until(lambda: hub.behaviour.sent[WEIGHTS] > 0, "it fetches")
    fetcher.close()


PRINTS = """
import builtins, os, subprocess
import huggingface_hub

download = huggingface_hub.hf_hub_download

def printing(*arguments, **named):
    print('{"path": "/a/library/says/so"}', flush=True)
    os.write(1, b"7 % of it\\n")
    subprocess.run(["echo", "null"], check=True)
    return download(*arguments, **named)

huggingface_hub.hf_hub_download = printing
"""


def test_what_a_library_prints_is_no_answer(hub: Server, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PRINTS)
    fetcher = Fetcher(hub, tmp_path / "cache", {"PYTHONPATH": str(tmp_path)})
    folder = Path(fetcher.answer()["path"])
    fetcher.close()
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert not [one for one in fetcher.told if not isinstance(one, str)]
