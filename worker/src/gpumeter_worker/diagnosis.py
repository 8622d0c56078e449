"""Looks at the machine before anything costly starts: device, model files, memory, threads.

Owns the fatal reasons and the sentences that an operator of the cluster reads in a condition. Imports no torch, so
that a wrong machine is told within a second. Does not know how a model is loaded.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from gpumeter_worker.settings import Settings

EXIT_CODE = 3
TERMINATION_LOG = Path("/dev/termination-log")

MODEL_NOT_FOUND = "ModelNotFound"
MODEL_INVALID = "ModelInvalid"
MODEL_SOURCE_UNSUPPORTED = "ModelSourceUnsupported"
GPU_NOT_FOUND = "GpuNotFound"
SETTINGS_INVALID = "SettingsInvalid"
JOURNAL_UNUSABLE = "JournalUnusable"
OUT_OF_MEMORY = "OutOfMemory"
ENGINE_STUCK = "EngineStuck"


class StartupFailed(Exception):
    """This worker cannot serve here, and trying again will not help until somebody changes something."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def line(self) -> str:
        """`Reason: sentence`, as the termination message and so the service's condition show it."""
        return f"{self.reason}: {self.message}"


def report(failure: StartupFailed) -> int:
    """Tell the log and the kubelet; returns the exit code."""
    print(failure.line, file=sys.stderr, flush=True)
    try:
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_text(failure.line[:4000])
    except OSError as error:
        print(f"the termination log cannot be written: {error}", file=sys.stderr)
    return EXIT_CODE


def check_device(settings: Settings, devices: Path = Path("/dev")) -> None:
    """Raises StartupFailed when a GPU was asked for and the container was given none."""
    if settings.gpu_count == 0:
        return
    found = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    if not found and not (devices / "nvidia-caps").exists() and not (devices / "dxg").exists():
        raise StartupFailed(
            GPU_NOT_FOUND,
            f"{settings.gpu_count} GPU was asked for and this container has none (no {devices}/nvidia* device); "
            "schedule it on a node with the NVIDIA driver and container toolkit, or set resources.gpu.count to 0",
        )


def check_model_files(path: Path) -> None:
    """Raises StartupFailed when the folder cannot be a model: which file is missing or cut short."""
    if not path.is_dir():
        raise StartupFailed(MODEL_NOT_FOUND, f"there is no model directory {path}; check spec.model.uri and its volume")
    config = _json_file(path / "config.json")
    if "model_type" not in config:
        raise StartupFailed(MODEL_INVALID, f"{path / 'config.json'} names no model_type; copy the whole model again")
    if not (path / "tokenizer.json").is_file():
        raise StartupFailed(MODEL_INVALID, f"{path / 'tokenizer.json'} is missing; copy the whole model again")
    weights = _weight_files(path)
    for file in weights:
        _check_safetensors(file)


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


def use_writable_places(settings: Settings, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment lacks so that libraries write only where a read-only container lets them."""
    home = environment.get("HOME", "")
    wanted = {
        "HF_HOME": str(settings.model_cache / "huggingface"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",  # noqa: S108 - the container's own
        "TRITON_CACHE_DIR": "/tmp/triton",  # noqa: S108
    }
    if not home or not os.access(home, os.W_OK):
        wanted["HOME"] = "/tmp"  # noqa: S108
    return {name: value for name, value in wanted.items() if name == "HOME" or name not in environment}


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


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        named = _json_file(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise StartupFailed(MODEL_INVALID, f"{index} has no weight_map; copy the whole model again")
        files = [path / str(name) for name in sorted(set(named.values()))]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        other = next(iter(sorted(path.glob("*.bin")) + sorted(path.glob("*.gguf"))), None)
        found = f" ({other.name} is of a kind that is not loaded)" if other else ""
        raise StartupFailed(MODEL_INVALID, f"{path} holds no *.safetensors weights{found}; convert or copy the model")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise StartupFailed(MODEL_INVALID, f"{path} lacks the weights {', '.join(missing)}; copy the whole model again")
    return files


def _check_safetensors(file: Path) -> None:
    """The header says how long the file is: a copy that was cut short is seen without reading it."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_size <= min(size, 100 * 2**20):
                raise ValueError("its header has no sensible length")
            header = json.loads(stream.read(header_size))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    except OSError as error:
        raise StartupFailed(MODEL_INVALID, f"{file} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StartupFailed(MODEL_INVALID, f"{file} is damaged ({error!s:.80}); copy the model again") from None
    expected = 8 + header_size + max(ends, default=0)
    if size < expected:
        raise StartupFailed(MODEL_INVALID, f"{file} is cut short ({size} of {expected} bytes); copy the model again")


def _json_file(file: Path) -> dict[str, object]:
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise StartupFailed(MODEL_INVALID, f"{file} is missing; copy the whole model again") from None
    except (OSError, ValueError) as error:
        raise StartupFailed(MODEL_INVALID, f"{file} cannot be read ({error!s:.120}); copy the model again") from None
    if not isinstance(values, dict):
        raise StartupFailed(MODEL_INVALID, f"{file} is not a JSON object; copy the model again")
    return values
