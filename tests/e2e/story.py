"""What happens to the service while it is watched: traffic, a killed worker, a killed collector, a deletion.

Owns the order of events and the evidence that they leave; judges nothing. The tests read the evidence.
"""

import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from demo import manifests, steps
from demo.kube import Kube
from demo.manifests import RELEASE, RELEASE_NAMESPACE
from e2e.audit import lives_of, nanoseconds
from traffic.asks import Ask, Kind
from traffic.client import Options, run
from traffic.exchange import Exchange, exchange
from traffic.summary import table

TEAM = "team-bill"
SERVICE = "smollm2"
REPLICAS = 2
TRAFFIC_S = 75
WORKERS = "gpumeter.io/inferenceservice"
WATCH = ("--watch", "--output-watch-events", "-o", "json")

# What runs inside a container to hand out a consistent copy of a SQLite file that is being written.
_BACKUP = (
    "import sqlite3,sys,tempfile;"
    "copy=tempfile.NamedTemporaryFile(dir='/tmp');"
    "source=sqlite3.connect('file:{path}?mode=ro',uri=True);target=sqlite3.connect(copy.name);"
    "source.backup(target);target.close();sys.stdout.buffer.write(open(copy.name,'rb').read())"
)


@dataclass
class Evidence:
    """Everything that the tests judge."""

    exchanges: list[Exchange] = field(default_factory=list)
    farewell: Exchange | None = None
    pods_seen: list[dict[str, Any]] = field(default_factory=list)
    killed_pod_uid: str = ""
    killed_at_ns: int = 0
    deletion_s: float = 0.0
    acknowledged: dict[tuple[str, str], int] = field(default_factory=dict)  # (worker, boot) -> seq, as the worker says
    reports: list[dict[str, Any]] = field(default_factory=list)
    accounts: str = ""
    ledger: Path = Path()


class PodWatch:
    """Every state in which the workers' pods were, the last one too: the test's own witness of `allocated`.

    A watch and no polling, because a pod is gone from the API milliseconds after it told when its container ended.
    `patient` begins again where an API server that goes away breaks it off: no pod goes meanwhile.
    """

    def __init__(self, kube: Kube, namespace: str, *, patient: bool = False) -> None:
        self.seen: list[dict[str, Any]] = []
        self._command = [kube.kubectl, "-n", namespace, "get", "pods", "-l", WORKERS, *WATCH]
        self._environment = os.environ | {"KUBECONFIG": str(kube.kubeconfig)}
        self._patient = patient
        self._over = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "PodWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._process.terminate()
        self._thread.join()

    def check(self) -> None:
        """A watch that ended early has seen too little to judge by."""
        assert self._thread.is_alive(), "the watch of the pods ended early"

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(self._command, env=self._environment, stdout=subprocess.PIPE, text=True)

    def _read(self) -> None:
        while True:
            assert self._process.stdout is not None
            for line in self._process.stdout:  # one event a line
                self.seen.append(json.loads(line)["object"])
            if not self._patient or self._over.wait(0.2):
                return
            self._process = self._start()
            if self._over.is_set():
                self._process.terminate()  # whoever ended the watch meanwhile knew only the one before


def play(demo: steps.Demo, keys: dict[str, str], folder: Path) -> Evidence:
    """From a running release to a deleted service whose usage is collected."""
    evidence, kube = Evidence(), demo.kube
    with PodWatch(kube, TEAM) as watch:
        kube.apply(manifests.namespace(TEAM))
        kube.apply(manifests.model_claim() | {"metadata": {"name": manifests.MODEL_CLAIM, "namespace": TEAM}})
        kube.apply(service(demo))
        with demo.progress.step(f"{REPLICAS} workers load their model", lambda: ready_reason(kube, TEAM, SERVICE)):
            until(
                lambda: ready_reason(kube, TEAM, SERVICE).startswith("Serving") and len(ready_pods(kube)) == REPLICAS,
                240,
            )
        with kube.forwarded(RELEASE_NAMESPACE, f"{RELEASE}-gateway", 80) as port:
            _traffic_with_deaths(demo, keys, port, evidence)
            with demo.progress.step("both workers serve again"):
                until(lambda: len(ready_pods(kube)) == REPLICAS, 120)
            for pod in ready_pods(kube):
                uid = pod["metadata"]["uid"]
                journal = copy_out(
                    kube, TEAM, pod["metadata"]["name"], "/var/lib/gpumeter/journal.sqlite", folder / uid
                )
                evidence.acknowledged |= {(uid, boot): seq for boot, seq in _acknowledged(journal)}
            # The last request ends, and at once the service is deleted: its usage has been in the journal for no time.
            tenant = next(iter(keys))
            evidence.farewell = exchange("127.0.0.1", port, tenant, keys[tenant], _last_ask(), timeout_s=60)
            started = time.monotonic()
            with demo.progress.step("the service is deleted"):
                kube.run("-n", TEAM, "delete", f"inferenceservices.gpumeter.io/{SERVICE}", "--timeout=100s")
            evidence.deletion_s = time.monotonic() - started
        watch.check()
    evidence.pods_seen = watch.seen
    return evidence


def settle(demo: steps.Demo, evidence: Evidence, folder: Path) -> None:
    """Wait until the service's last period is Final, and take the bill with the ledger behind it."""
    kube = demo.kube
    last_end_ns = max(life.ended_ns for life in lives_of(evidence.pods_seen))
    with demo.progress.step("the last period becomes Final"):
        until(lambda: final_until_ns(kube) >= last_end_ns, 150)
    listed = kube.get("-n", TEAM, "usagereports.gpumeter.io")["items"]
    evidence.reports = [one for one in listed if one["spec"]["period"]["granularity"] not in ("Day", "Month")]
    collector = ("-n", RELEASE_NAMESPACE, "exec", f"deployment/{RELEASE}-collector", "--")
    evidence.accounts = kube.run(*collector, "gpumeter", "accounts", "--check", "--namespace", TEAM, "-o", "json")
    evidence.ledger = copy_out(
        kube, RELEASE_NAMESPACE, f"deployment/{RELEASE}-collector", "/var/lib/gpumeter/ledger.db", folder / "ledger.db"
    )


def service(demo: steps.Demo) -> dict[str, Any]:
    """Two workers of the demo's service, in a namespace of its own."""
    manifest = manifests.inference_service(demo.model_uri, demo.image_version)
    manifest["metadata"] = {"name": SERVICE, "namespace": TEAM}
    manifest["spec"] |= {"replicas": REPLICAS, "drain": {"timeout": "20s"}}
    return manifest


def _traffic_with_deaths(demo: steps.Demo, keys: dict[str, str], port: int, evidence: Evidence) -> None:
    """Chat traffic; one worker's container dies in the middle of it, and later the collector's pod."""
    options = Options(base_url=f"http://127.0.0.1:{port}", keys=keys, model=SERVICE, seconds=TRAFFIC_S, seed=7)
    failures: list[BaseException] = []

    def chat() -> None:
        try:
            evidence.exchanges = run(options)
        except BaseException as failure:
            failures.append(failure)
            raise

    thread = threading.Thread(target=chat, daemon=True)
    thread.start()
    thread.join(20)
    victim = ready_pods(demo.kube)[0]
    demo.progress.say(f"kill -9 to the container of {victim['metadata']['name']}")
    evidence.killed_pod_uid, evidence.killed_at_ns = victim["metadata"]["uid"], time.time_ns()
    kill_container(victim)
    thread.join(15)
    demo.progress.say("the collector's pod is deleted without grace")
    selector = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=collector"
    demo.kube.run("-n", RELEASE_NAMESPACE, "delete", "pod", "-l", selector, "--grace-period=0", "--force")
    thread.join()
    if failures:
        raise failures[0]
    print(f"\n{table(evidence.exchanges)}\n")


def kill_container(pod: dict[str, Any]) -> None:
    """SIGKILL to every process of the pod's container, which must be there."""
    assert kill_processes(pod), f"no process of a container of {pod['metadata']['name']} on this machine"


def kill_processes(pod: dict[str, Any]) -> int:
    """The same, found by the container's id among the cgroups of this machine; returns how many there were.

    Only a container of the cluster that this test made has that id.
    """
    container_id = pod["status"]["containerStatuses"][0]["containerID"].rpartition("//")[2]
    victims = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                groups = (folder / "cgroup").read_text()
            except OSError:
                continue
            if container_id in groups:
                victims.append(int(folder.name))
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(victims)


def copy_out(kube: Kube, namespace: str, where: str, path: str, target: Path) -> Path:
    """A consistent copy of a SQLite file from inside a container."""
    command = [kube.kubectl, "-n", namespace, "exec", where, "--", "python3", "-c", _BACKUP.format(path=path)]
    done = subprocess.run(
        command, env=os.environ | {"KUBECONFIG": str(kube.kubeconfig)}, capture_output=True, check=True
    )
    target.write_bytes(done.stdout)
    return target


def ready_reason(kube: Kube, namespace: str, name: str) -> str:
    """`Reason: message` of the Ready condition."""
    status = kube.get("-n", namespace, f"inferenceservices.gpumeter.io/{name}").get("status", {})
    for condition in status.get("conditions", []):
        if condition["type"] == "Ready":
            return f"{condition['reason']}: {condition['message']}"
    return "not seen by the operator yet"


def ready_pods(kube: Kube, namespace: str = TEAM, name: str = SERVICE) -> list[dict[str, Any]]:
    """The service's pods that are Ready and not on their way out."""
    return [
        pod
        for pod in kube.get("-n", namespace, "pods", "-l", f"{WORKERS}={name}")["items"]
        if not pod["metadata"].get("deletionTimestamp")
        and any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))
    ]


def until(true: Callable[[], bool], within_s: float, instead: Callable[[], str] = lambda: "") -> None:
    """Poll until it holds; `instead` says what was seen when it did not."""
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"it did not happen within {within_s:.0f} s. {instead()}")
        time.sleep(0.3)


def _acknowledged(journal: Path) -> list[tuple[str, int]]:
    with sqlite3.connect(journal) as connection:
        return connection.execute("SELECT boot_id, acknowledged_seq FROM boots").fetchall()


def final_until_ns(kube: Kube, namespace: str = TEAM) -> int:
    """The end of the latest Final report of the platform; periods close in their order."""
    ends = [
        nanoseconds(report["spec"]["period"]["end"])
        for report in kube.get("-n", namespace, "usagereports.gpumeter.io")["items"]
        if report["spec"]["tenant"] == "_platform" and report.get("status", {}).get("phase") == "Final"
    ]
    return max(ends, default=0)


def _last_ask() -> Ask:
    body = {"model": SERVICE, "messages": [{"role": "user", "content": "Say goodbye."}], "max_tokens": 24}
    return Ask(number=0, kind=Kind.PLAIN, body=body)
