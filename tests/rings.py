"""Runs the rings of tests and says what ran, how long it took, and what was skipped and why.

Owns the order of the rings, which of them run beside others, and what each needs of the machine; pytest owns the tests.
Where several are asked for there are two lanes: what needs nothing but a processor runs, with less right to one, beside
what starts servers and waits for them. Its output is shown when the ring that ran meanwhile has ended.

    python -m rings [RING ...]        all rings without names
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SKIPPED = "skipped: "  # how the note of a ring begins that this machine cannot run
PROCESSES_MAX = 4  # more would only take turns at importing torch
BESIDE_NICE = 10
"""A tenth of the processor time of the lane that it runs beside, where that one wants all; where it waits, all."""


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
    marks: str = ""
    """Which tests of the folder, as pytest's -m has it; all where it is empty."""

    @property
    def label(self) -> str:
        """How it is called in what is printed; a folder may be run in two parts."""
        return f"{self.name}, {self.marks}" if self.marks else self.name


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
    if "--help" in names or "-h" in names:
        print(f"{__doc__}\nRings: {', '.join(sorted(known))}.")
        return 0
    if unknown := [name for name in names if name not in known]:
        print(f"Unknown ring: {', '.join(unknown)}. There are: {', '.join(sorted(known))}.")
        return 2
    outcomes = [] if names else [_lint()]
    chosen = [ring for ring in RINGS if not names or ring.name in names]
    front, beside = lanes(chosen, os.cpu_count() or 1)
    found: dict[Ring, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as second:
        running = [(ring, second.submit(run, ring, Path(folder) / ring.label)) for ring in beside]
        try:
            for ring in front:
                print(f"\n=== {ring.label}", flush=True)
                found[ring] = run(ring)
                while running and running[0][1].done():
                    found |= _told(*running.pop(0), Path(folder))
            if running:
                print(f"\n=== still running: {'; '.join(ring.label for ring, _ in running)}", flush=True)
            for one in running:
                found |= _told(*one, Path(folder))
        finally:
            second.shutdown(wait=False, cancel_futures=True)  # Ctrl-C ends what runs, and begins nothing more
    outcomes += [found[ring] for ring in chosen]
    print_summary(outcomes)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _told(ring: Ring, outcome: Future[Outcome], folder: Path) -> dict[Ring, Outcome]:
    """What became of a ring that ran beside others, after its output was shown."""
    done = outcome.result()
    print(f"\n=== {ring.label} (ran beside)", flush=True)
    if (folder / ring.label).exists():
        print((folder / ring.label).read_text(), flush=True)
    return {ring: done}


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
    Ring("contract", _nothing, ("model", "tools"), shared=True, marks="shared"),
    # Before what computes most: unit, the one beside it, has clocks to look at.
    Ring("cluster", _control_plane_missing, ("tools",)),
    Ring("contract", _nothing, ("model", "tools"), marks="not shared"),
    Ring("e2e", _node_missing),  # brings its cluster up as a user does
    Ring("gpu", _gpu_missing),
)


def lanes(rings: Sequence[Ring], processors: int) -> tuple[list[Ring], list[Ring]]:
    """What runs in front, in order, and what beside it: shared rings, where there are others and room for both."""
    beside = [ring for ring in rings if ring.shared]
    front = [ring for ring in rings if not ring.shared]
    return (front, beside) if front and processors > 1 else (list(rings), [])


def _lint() -> Outcome:
    print("=== lint", flush=True)
    started = time.monotonic()
    commands = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"])
    failed = 0
    for command, *arguments in commands:
        failed += subprocess.run([BIN / command, *arguments], cwd=ROOT, check=False).returncode != 0
    return Outcome("lint", len(commands) - failed, failed, seconds=time.monotonic() - started)


def run(ring: Ring, output: Path | None = None) -> Outcome:
    """Run one ring; with `output` beside others, its words into that file."""
    reason = ring.missing()
    if reason is not None:
        if output is None:
            print(f"skipped. {reason}", flush=True)
        return Outcome(ring.label, note=f"{SKIPPED}{reason}")
    started = time.monotonic()
    for command in ring.prepare:
        if command == "tools" and _control_plane_missing() is not None:
            continue  # the tests that need them say so
        if call([sys.executable, "-m", "devcluster", command], output):
            note = f"devcluster {command} failed"
            return Outcome(ring.label, failed=1, seconds=time.monotonic() - started, note=note)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"tests/{ring.name}", f"--junit-xml={report}", "--durations=5"]
        if ring.marks:
            command += ["-m", ring.marks]
        if ring.shared:
            dist = "loadfile" if ring.prepare else "worksteal"  # what takes long to make is made once for a whole file
            command += ["--numprocesses", str(min(os.cpu_count() or 1, PROCESSES_MAX)), "--dist", dist]
        code = call(command, output, {"OMP_NUM_THREADS": "1"} if ring.shared else {})  # a processor for each process
        seconds = time.monotonic() - started
        if not report.exists():
            return Outcome(ring.label, failed=1, seconds=seconds, note=f"pytest ended with {code} and no report")
        suite = next(iter(ElementTree.parse(report).getroot().iter("testsuite")))  # noqa: S314 - our own file
        total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        reasons = sorted({node.get("message", "") for node in suite.iter("skipped")})
    if total == 0:
        return Outcome(ring.label, failed=1, seconds=seconds, note="the ring holds no test")
    note = "" if code in (0, 1) else f"pytest ended with {code}"
    failed = max(failed, 1) if code != 0 else failed
    return Outcome(ring.label, total - failed - skipped, failed, skipped, seconds, note or "; ".join(reasons))


def call(command: list[str], output: Path | None, more: Mapping[str, str] | None = None) -> int:
    """The exit code of a program; one whose output goes into a file has less right to the processors, too."""
    environment = os.environ | (more or {})
    if output is None:
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    with output.open("ab") as file:
        polite = ["nice", "-n", str(BESIDE_NICE), *command]
        return subprocess.run(polite, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode


def print_summary(outcomes: list[Outcome]) -> None:
    print(f"\n{'ring':<20} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}  note")
    for one in outcomes:
        print(f"{one.ring:<20} {one.passed:>7} {one.failed:>7} {one.skipped:>8} {one.seconds:>8.0f}  {one.note}")
    passed, failed = sum(one.passed for one in outcomes), sum(one.failed for one in outcomes)
    not_run = [one.ring for one in outcomes if one.note.startswith(SKIPPED)]
    whole = f"; not run here: {', '.join(not_run)}" if not_run else ""
    print(f"\n{passed} passed, {failed} failed, {sum(one.skipped for one in outcomes)} skipped{whole}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
