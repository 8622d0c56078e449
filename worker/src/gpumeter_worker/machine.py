"""Facts about this machine and container: cores, memory, shared memory, GPUs, the installed torch and transformers.

Owns how each is found out. Imports neither torch nor transformers, so that everything is known within a second. Judges
nothing: checks.py does.
"""

import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROBE_TIMEOUT_S = 60.0
"""A driver that works answers in a second or two, with eight GPUs in some more."""

_MPS_PIPE = Path("/tmp/nvidia-mps")  # noqa: S108 - CUDA's default


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that the container was given; memory in bytes."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Others:
    """Who uses a GPU before this worker does, as far as NVML tells; None where it does not."""

    processes: int | None = None
    mps_clients: int | None = None
    used: int | None = None  # bytes of its memory, without the driver's own


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver said. `cuda` is the newest CUDA version that it supports, (12, 8) for example, or None."""

    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    problem: str  # why it could not be asked; empty where it could
    others: Others = Others()  # of the first GPU
    further: tuple[Others, ...] = ()  # of the others, in CUDA's order


def driver() -> Driver:
    """Ask the driver, in a process that may hang or crash without us."""
    command = [sys.executable, "-m", "gpumeter_worker.gpuprobe"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Driver(None, (), f"the driver does not answer within {_PROBE_TIMEOUT_S:.0f} s")
    try:
        return read_probe(done.stdout.decode())
    except (ValueError, KeyError, TypeError):
        return Driver(None, (), f"asking the driver ended with status {done.returncode}")


def read_probe(text: str) -> Driver:
    """What gpuprobe printed. Raises ValueError, KeyError and TypeError when it is not that."""
    found = json.loads(text)
    number = int(found["cuda"])
    return Driver(
        cuda=(number // 1000, number % 1000 // 10) if number else None,
        gpus=tuple(
            Gpu(one["name"], (one["capability"][0], one["capability"][1]), one["total"], one["free"])
            for one in found["devices"]
        ),
        problem=found["problem"],
        others=Others(**(found.get("nvml") or {})),
        further=tuple(Others(**(one or {})) for one in found.get("nvml_further", ())),
    )


def done_pages(pid: int, *, computing: bool, processes: Path = Path("/proc")) -> int | None:
    """What a process and its children did since it began: 4 KiB pages that were read or touched for the first time.

    A rank of a split model may still load while rank 0 waits for it. `computing` adds eight pages for every 10 ms of
    processor time; leave it out where who waits for a device spins. Of /proc/PID/stat, io and task/*/children
    (proc(5)); None where there is no such process, or no such file.
    """
    if (own := _done_pages(processes / str(pid), computing=computing)) is None:
        return None
    children: set[str] = set()
    for listed in (processes / str(pid) / "task").glob("*/children"):
        with suppress(OSError):
            children |= set(listed.read_text().split())
    return own + sum(_done_pages(processes / child, computing=computing) or 0 for child in children)


def _done_pages(process: Path, *, computing: bool) -> int | None:
    """Of one process, and of its children that have ended."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    faults = sum(map(int, fields[7:11]))  # minflt, cminflt, majflt, cmajflt
    ticks = sum(map(int, fields[11:15])) if computing else 0  # utime, stime, cutime, cstime: hundredths of a second
    try:
        read = int((process / "io").read_text().split()[1])  # rchar
    except (OSError, IndexError, ValueError):
        read = 0  # a hardened kernel does not tell; the faults remain
    return faults + 8 * ticks + read // 4096


def device_files(devices: Path = Path("/dev")) -> tuple[str, ...]:
    """The GPU's device files in this container; empty where it was given none."""
    found = [path.name for path in devices.glob("nvidia[0-9]*")]
    found += [name for name in ("nvidia-caps", "dxg") if (devices / name).exists()]
    return tuple(sorted(found))


def engine_runs(processes: Path = Path("/proc")) -> bool:
    """Whether an engine process of a worker is there, in this container or, outside of one, on this machine."""
    for command in processes.glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it is gone, or somebody else's
            if b"gpumeter_worker.engine.process" in command.read_bytes():
                return True
    return False


def mps_pipe(environment: Mapping[str, str] = os.environ, default: Path = _MPS_PIPE) -> str:
    """Where a CUDA program of this container would find an MPS daemon; empty where there is none.

    Kubernetes' device plugin sets the variable in every container that it gives a share of a GPU by MPS; a daemon on a
    plain machine has a control pipe in the default place.
    """
    named = environment.get("CUDA_MPS_PIPE_DIRECTORY", "")
    return named or (str(default) if (default / "control").exists() else "")


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, "" for a CPU build, None where none can be told."""
    text = _source("torch", "version.py")
    found = re.search(r"^cuda\b[^=]*= *(?:'([^']*)'|None)", text, re.MULTILINE)
    return (found[1] or "") if found else None


def model_types() -> frozenset[str] | None:
    """The model types that the installed transformers knows; None where this version keeps them elsewhere."""
    text = _source("transformers", "models/auto/auto_mappings.py")
    _, found, rest = text.partition("CONFIG_MAPPING_NAMES = OrderedDict(")
    names = re.findall(r'^\s+\("([^"]+)", "[^"]+"\),$', rest.partition("\n)")[0], re.MULTILINE)
    return frozenset(names) if found and names else None


def threads() -> int:
    """How many cores this container may use: the cgroup's quota, or what the scheduler allows."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(available, math.ceil(quota))) if quota else available


def memory_bytes() -> int:
    """What this container may use at most, or what the machine has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            return min(total, int(file.read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return total


def shared_memory_bytes(folder: Path = Path("/dev/shm")) -> int:  # noqa: S108 - the one place that is shared memory
    """The size of /dev/shm; 0 where there is none."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_blocks * found.f_frsize


def _source(package: str, file: str) -> str:
    """The text of an installed package's file, found without importing the package."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            return (Path(folder) / file).read_text()
        except OSError:
            continue
    return ""


def _cpu_quota() -> float:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return 0 if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:  # cgroup v1
        root = Path("/sys/fs/cgroup/cpu")
        quota_us = int((root / "cpu.cfs_quota_us").read_text())
        return max(0, quota_us) / int((root / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return 0


def processor() -> str:
    """What this machine's processor calls itself, as far as it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return " ".join(named.split()) or platform.machine()
