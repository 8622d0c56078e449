"""The operator as a real process, with the chart's own rights, and InferenceServices to show it.

Owns the process, its identity and the polling of the tests. Does not judge what the operator does.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from apiserver import ROOT, Run
from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, Cluster, Manifest
from rigs.ports import hold_port

Found = TypeVar("Found")

NAMESPACE = "gpumeter-system"
MASTER_KEY = b"a master key of the tests, longer than thirty-two bytes"
PEERS = {"http": [{"podSelector": {"matchLabels": {"part": "gateway"}}}], "usage": [{"podSelector": {}}]}
START_TIMEOUT_S = 60


def identity_of_the_chart(kubectl: Run, helm: Run, admin: Path, folder: Path) -> Path:
    """A kubeconfig that may do what the chart's role of the operator allows, and nothing else."""
    images = ("image.repository=localhost/gpumeter-operator", "workerImage.repository=localhost/gpumeter-worker")
    shown = ("templates/roles.yaml", "templates/service-accounts.yaml")
    options = [part for one in images for part in ("--set", one)] + [part for one in shown for part in ("-s", one)]
    rendered = helm("template", "gpumeter", str(ROOT / "charts/gpumeter"), "--namespace", NAMESPACE, *options)
    namespace = json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    kubectl("apply", "-f", "-", stdin=namespace)
    kubectl("apply", "-f", "-", stdin=rendered.stdout)
    token = kubectl("create", "token", "gpumeter-operator", "--namespace", NAMESPACE).stdout.strip()
    config = json.loads(admin.read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    path = folder / "operator.kubeconfig"
    path.write_text(json.dumps(config))
    return path


def let_controllers_work(kubectl: Run) -> None:
    """Without a node the controller manager acts under one name, which has no right to make ReplicaSets and pods."""
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "tests-let-controllers-work"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [
            {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "system:kube-controller-manager"}
        ],
    }
    kubectl("apply", "-f", "-", stdin=json.dumps(binding))


class OperatorProcess:
    """`gpumeter operator` as the image runs it."""

    def __init__(self, kubeconfig: Path, folder: Path, **environment: str) -> None:
        self.port = hold_port()
        self.log = folder / f"operator-{time.monotonic_ns()}.log"
        key = folder / "master-key"
        key.write_bytes(MASTER_KEY)
        self._environment = {
            "PATH": os.environ["PATH"],
            "KUBECONFIG": str(kubeconfig),
            "GPUMETER_WORKER_IMAGE": "localhost/gpumeter-worker:test",
            "GPUMETER_GATEWAY_URL": "http://gpumeter-gateway.gpumeter-system.svc",
            "GPUMETER_MASTER_KEY_FILE": str(key),
            "GPUMETER_NAMESPACE": NAMESPACE,
            "GPUMETER_STATUS_INTERVAL_MS": "1000",
            "GPUMETER_STATUS_HOLD_MS": "0",
            "GPUMETER_HTTP_HOST": "127.0.0.1",
            "GPUMETER_HTTP_PORT": str(self.port),
            "GPUMETER_WORKER_PEERS": json.dumps(PEERS),
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, acts: bool = True) -> None:
        """Start and wait until it is ready: to act, or without `acts` to take over from another one."""
        self.begin()
        assert self._process is not None
        end = time.monotonic() + START_TIMEOUT_S
        while self.answer("/readyz")[0] != 200 or (acts and not self.acts):
            assert self._process.poll() is None, f"the operator ended:\n{self.log.read_text()}"
            assert time.monotonic() < end, f"the operator was not ready in {START_TIMEOUT_S} s:\n{self.log.read_text()}"
            time.sleep(0.05)

    def begin(self) -> None:
        """Start, and wait for nothing."""
        with self.log.open("ab") as log:
            command = [str(Path(sys.executable).parent / "gpumeter"), "operator"]
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit code."""
        assert self._process is not None
        self.signal(how)
        return self.ended()

    def signal(self, how: int) -> None:
        assert self._process is not None
        self._process.send_signal(how)

    def ended(self, within_s: float = 30) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        assert self._process is not None
        return self._process.wait(timeout=within_s)

    @property
    def acts(self) -> bool:
        """Whether it holds the lease, by its own word."""
        return self.metric("gpumeter_operator_active ") == 1

    @property
    def said(self) -> str:
        """Its log."""
        return self.log.read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def memory_mib(self) -> float:
        """Resident memory."""
        assert self._process is not None
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1_024

    @property
    def cpu_s(self) -> float:
        """Processor time so far."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def answer(self, path: str) -> tuple[int, str]:
        """Status code and text of its own HTTP server; 0 when nothing listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, line_start: str) -> float:
        """Value of one metric; 0 when it was never counted."""
        lines = [line for line in self.answer("/metrics")[1].splitlines() if line.startswith(line_start)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@contextmanager
def running_operator(kubeconfig: Path, folder: Path, **environment: str) -> Iterator[OperatorProcess]:
    """An operator that runs until the block ends; a test may stop and start it itself."""
    operator = OperatorProcess(kubeconfig, folder, **environment)
    operator.start()
    try:
        yield operator
    finally:
        if operator.runs:
            operator.stop()


async def eventually(probe: Callable[[], Awaitable[Found | None]], timeout_s: float = 30) -> Found:
    """Poll until the probe returns something other than None and False; a failure names the probe."""
    end = time.monotonic() + timeout_s
    while True:
        found = await probe()
        if found is not None and found is not False:
            return found
        assert time.monotonic() < end, f"nothing came of {getattr(probe, '__name__', probe)} in {timeout_s} s"
        await asyncio.sleep(0.05)


def service(namespace: str, name: str = "smollm2", **spec: Any) -> Manifest:
    """A valid InferenceService on the CPU."""
    whole = {"model": {"uri": "pvc://models/smollm2"}, "resources": {"gpu": {"count": 0}}, **spec}
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "gpumeter.io/v1alpha1", "kind": "InferenceService", "metadata": metadata, "spec": whole}


async def status_of(cluster: Cluster, namespace: str, name: str = "smollm2") -> Manifest:
    """Status of a service, empty until it has one."""
    found = await cluster.get(INFERENCE_SERVICES, name, namespace)
    status: Manifest = (found or {}).get("status") or {}
    return status


def condition(status: Manifest, kind: str = "Ready") -> Manifest:
    """One condition, empty when it is not there."""
    found: Manifest = next((one for one in status.get("conditions") or [] if one["type"] == kind), {})
    return found
