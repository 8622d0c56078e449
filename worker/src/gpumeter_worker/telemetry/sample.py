"""One look at a GPU, and why there is none: the data that the sampling process sends and everybody else reads.

Owns the fields, their units and their JSON. A figure that a device, a driver or a container does not tell is None: a
stated absence, never a zero. Knows no NVML and no clock.
"""

import json
import re
from dataclasses import asdict, dataclass, fields

NO_GPU = "NoGpu"
STARTING = "NvmlStarting"
LIBRARY_NOT_FOUND = "NvmlLibraryNotFound"
DRIVER_NOT_LOADED = "NvmlDriverNotLoaded"
GPU_NOT_FOUND = "NvmlGpuNotFound"
GPU_LOST = "NvmlGpuLost"
FAILED = "NvmlFailed"
SILENT = "NvmlSilent"

FOR_GOOD = frozenset({NO_GPU, LIBRARY_NOT_FOUND})
"""What no later look would change: a library does not come into a running container."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one GPU, or one MIG instance, said at `at_ns` (CLOCK_MONOTONIC).

    Of a MIG instance, `temperature_c` and the clocks are its GPU's. Power, energy and NVLink are not told for it: its
    GPU's are those of all its instances together.
    """

    at_ns: int
    uuid: str  # GPU-... or MIG-..., as NVML and Kubernetes' device plugin write it
    name: str
    mig_profile: str  # 1g.5gb for example; empty on a whole GPU
    driver: str | None = None
    gpu_percent: int | None = None  # of the last sampling period, how long any kernel ran
    memory_percent: int | None = None  # of the same, how long memory was read or written
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_mw: int | None = None
    energy_mj: int | None = None  # since the driver was loaded
    temperature_c: int | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    nvlink_sent_bytes: int | None = None  # all links, since the driver was loaded
    nvlink_received_bytes: int | None = None
    processes: int | None = None  # that compute on it, ours among them where this container may see them
    mps_clients: int | None = None
    exclusive: bool | None = None  # compute mode EXCLUSIVE_PROCESS: one process, or MPS


@dataclass(frozen=True, slots=True)
class Absence:
    """Why nothing is told: one word, and a sentence that says what would help."""

    reason: str
    message: str


def gpu_class(named: str, sample: Sample) -> str:
    """How records name the class of GPU: as the operator does, with the profile of a MIG instance.

    `gpu` is what it says where nobody named a class; then the device's own name, which tells the profile already.
    """
    if named in ("", "gpu"):
        return sample.name
    return named if names_profile(named, sample.mig_profile) else f"{named}.{priced_profile(sample.mig_profile)}"


def mig_profile(name: str) -> str:
    """The profile in a device's name, as CUDA and NVML tell it (NVIDIA A100-SXM4-40GB MIG 1g.5gb); empty on a whole
    GPU."""
    found = re.search(r"\bMIG (\S+)", name)
    return found[1] if found else ""


def names_profile(named: str, profile: str) -> bool:
    """Whether a price class says which slice of a GPU it is; a whole GPU's (`profile` empty) need not."""
    return not profile or named.endswith(priced_profile(profile))


def priced_profile(profile: str) -> str:
    """A MIG profile as price classes and the device plugin's resources write it: 1g.10gb+me is 1g.10gb.me."""
    return profile.lower().replace("+", ".")


def encode(told: Sample | Absence) -> str:
    """One line of JSON."""
    return json.dumps({"sample" if isinstance(told, Sample) else "absence": asdict(told)})


def decode(line: bytes) -> Sample | Absence:
    """The inverse of `encode`. Raises ValueError for what is not such a line."""
    said = json.loads(line)
    if not isinstance(said, dict) or len(said) != 1:
        raise ValueError("a line of the sampling process is no object with one member")
    ((kind, values),) = said.items()
    told: type[Sample] | type[Absence] = Sample if kind == "sample" else Absence
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(told)}:
        raise ValueError(f"a line of the sampling process is neither a sample nor an absence: {kind!r:.40}")
    return told(**values)
