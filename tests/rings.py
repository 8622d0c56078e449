"""Runs the rings of tests one after the other and says what ran, how long it took, and what was skipped and why.

Owns the order of the rings and what each needs of the machine; pytest owns the tests.

    python -m rings [RING ...]        all rings without names
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PROCESSES_MAX = 4  # more would only take turns at importing torch


@dataclass(frozen=True)
class Ring:
    """One ring: its folder under tests/, why it cannot run here (None when it can), and what is built ahead of it.

    What takes minutes is built by devcluster's own commands, which show progress; inside a test nobody would see it.
    """

    name: str
    missing: Callable[[], str | None]
    prepare: tuple[str, ...] = ()
    shared: bool = False
    """Whether its tests need nothing but a processor, and so are shared out among the machine's."""


@dataclass(frozen=True)
class Outcome:
    """What became of one ring."""

    ring: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""


def main(names: list[str]) -> int:
    """Run the named rings, or the linters and all rings; the exit code is 1 when anything failed."""
    known = {ring.name for ring in RINGS}
    if unknown := [name for name in names if name not in known]:
        print(f"Unknown ring: {', '.join(unknown)}. There are: {', '.join(sorted(known))}.")
        return 2
    outcomes = [] if names else [_lint()]
    for ring in RINGS:
        if names and ring.name not in names:
            continue
        reason = ring.missing()
        if reason is not None:
            print(f"\n=== {ring.name}: skipped. {reason}", flush=True)
            outcomes.append(Outcome(ring.name, note=f"skipped: {reason}"))
            continue
        print(f"\n=== {ring.name}", flush=True)
        outcomes.append(_run(ring))
    _print_summary(outcomes)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _nothing() -> str | None:
    return None


def _control_plane_missing() -> str | None:
    if shutil.which("go") is None:
        return "Go is needed to build the API server (https://go.dev/dl, 1.26 or newer)."
    return None


def _node_missing() -> str | None:
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0:
        return None
    if sys.platform != "linux" or os.geteuid() != 0:
        return "A real node needs Docker, or Linux and root."
    return _control_plane_missing()


def _gpu_missing() -> str | None:
    if not Path("/dev/nvidia0").exists():
        return "No NVIDIA GPU on this machine (no /dev/nvidia0)."
    return None


RINGS = (
    Ring("unit", _nothing, shared=True),
    Ring("property", _nothing, shared=True),
    Ring("sim", _nothing, shared=True),
    Ring("contract", _nothing, ("model", "tools")),
    Ring("cluster", _control_plane_missing, ("tools",)),
    Ring("e2e", _node_missing),  # brings its cluster up as a user does
    Ring("gpu", _gpu_missing),
)


def _lint() -> Outcome:
    print("=== lint", flush=True)
    started = time.monotonic()
    commands = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"])
    failed = 0
    for command, *arguments in commands:
        failed += subprocess.run([BIN / command, *arguments], cwd=ROOT, check=False).returncode != 0
    return Outcome("lint", len(commands) - failed, failed, seconds=time.monotonic() - started)


def _run(ring: Ring) -> Outcome:
    started = time.monotonic()
    for command in ring.prepare:
        if command == "tools" and _control_plane_missing() is not None:
            continue  # the tests that need them say so
        if subprocess.run([sys.executable, "-m", "devcluster", command], cwd=ROOT, check=False).returncode:
            return Outcome(ring.name, failed=1, seconds=time.monotonic() - started, note=f"devcluster {command} failed")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"tests/{ring.name}", f"--junit-xml={report}", "--durations=5"]
        if ring.shared:
            command += ["--numprocesses", str(min(os.cpu_count() or 1, PROCESSES_MAX)), "--dist", "worksteal"]
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if ring.shared else {})  # a processor for each process
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        seconds = time.monotonic() - started
        if not report.exists():
            return Outcome(ring.name, failed=1, seconds=seconds, note=f"pytest ended with {code} and no report")
        suite = next(iter(ElementTree.parse(report).getroot().iter("testsuite")))  # noqa: S314 - our own file
        total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        reasons = sorted({node.get("message", "") for node in suite.iter("skipped")})
    if total == 0:
        return Outcome(ring.name, failed=1, seconds=seconds, note="the ring holds no test")
    note = "" if code in (0, 1) else f"pytest ended with {code}"
    failed = max(failed, 1) if code != 0 else failed
    return Outcome(ring.name, total - failed - skipped, failed, skipped, seconds, note or "; ".join(reasons))


def _print_summary(outcomes: list[Outcome]) -> None:
    print(f"\n{'ring':<10} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}  note")
    for one in outcomes:
        print(f"{one.ring:<10} {one.passed:>7} {one.failed:>7} {one.skipped:>8} {one.seconds:>8.0f}  {one.note}")
    passed, failed = sum(one.passed for one in outcomes), sum(one.failed for one in outcomes)
    print(f"\n{passed} passed, {failed} failed, {sum(one.skipped for one in outcomes)} skipped", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
