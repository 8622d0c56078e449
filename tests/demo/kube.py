"""kubectl and helm as functions: every failure is one exception with what the program said.

Owns the kubeconfig and the paths of the two programs. Does not know what is applied.
"""

import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rigs.ports import hold_port


class DemoFailed(Exception):
    """A sentence for the reader; `evidence` is what to look at: logs, conditions, what a program said."""

    def __init__(self, sentence: str, evidence: str = "") -> None:
        super().__init__(sentence)
        self.evidence = evidence


@dataclass(frozen=True, slots=True)
class Kube:
    """One cluster, as the two programs see it."""

    kubectl: Path
    helm: Path
    kubeconfig: Path

    def run(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120) -> str:
        """Run kubectl; returns what it printed."""
        return self._run(self.kubectl, arguments, stdin, timeout_s)

    def run_helm(self, *arguments: str, timeout_s: float = 300) -> str:
        """Run helm; returns what it printed."""
        return self._run(self.helm, arguments, None, timeout_s)

    def get(self, *arguments: str) -> Any:
        """`kubectl get ... -o json` as Python values."""
        return json.loads(self.run("get", *arguments, "-o", "json"))

    def apply(self, *manifests: dict[str, Any]) -> None:
        """Server-side apply, as the demo's own field manager."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.run(
            *("apply", "--server-side", "--force-conflicts", "--field-manager=gpumeter-demo", "-f", "-"),
            stdin=json.dumps(listed),
        )

    def peek(self, *arguments: str) -> str:
        """What kubectl prints, also when it fails: evidence must not fail."""
        try:
            return self.run(*arguments, timeout_s=20).rstrip()
        except DemoFailed as failed:
            return f"({failed}) {failed.evidence}".rstrip()

    @contextmanager
    def forwarded(self, namespace: str, service: str, port: int) -> Iterator[int]:
        """A port of 127.0.0.1 that leads to a Service; kubectl is started again when it loses its pod."""
        local = hold_port()
        arguments = [str(self.kubectl), "-n", namespace, "port-forward", f"service/{service}", f"{local}:{port}"]
        over = threading.Event()
        running: list[subprocess.Popen[bytes]] = []

        def keep_forwarding() -> None:
            while not over.is_set():
                process = subprocess.Popen(
                    arguments, env=self._environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                running[:] = [process]
                process.wait()
                over.wait(0.2)

        thread = threading.Thread(target=keep_forwarding, daemon=True)
        thread.start()
        try:
            _until_ready(f"http://127.0.0.1:{local}/readyz")
            yield local
        finally:
            over.set()
            for process in running:
                process.terminate()
            thread.join(5)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig)}

    def _run(self, program: Path, arguments: tuple[str, ...], stdin: str | None, timeout_s: float) -> str:
        shown = f"{program.name} {' '.join(arguments)}"
        try:
            done = subprocess.run(
                [program, *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                env=self._environment(),
            )
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"`{shown}` did not end within {timeout_s:.0f} s.") from None
        if done.returncode != 0:
            raise DemoFailed(f"`{shown}` failed.", f"{done.stdout}\n{done.stderr}".strip())
        return done.stdout


def _until_ready(url: str, within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError) as error:
            if time.monotonic() > deadline:
                raise DemoFailed(f"{url} did not answer within {within_s:.0f} s: {error}.") from None
        time.sleep(0.1)
