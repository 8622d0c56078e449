"""A GPU that is only told: libraries with the C interface of NVML and libcuda, over figures that a test may change.

Owns their build and their script. What loads them is real: NVIDIA's bindings, through the loader's own search path.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

GPU_UUID = "GPU-8f3a6f2e-0c4d-4f7e-9a51-3f0d1c2b4a59"
MIG_UUID = "MIG-5c1e9a72-7b0f-5d63-8e24-91d7f06a3b48"

A100 = {
    "driver": "570.133.20",
    "uuid": GPU_UUID,
    "name": "NVIDIA A100-SXM4-40GB",
    "gpu": 87,
    "memory": 41,
    "total": 40 * 2**30,
    "used": 0,
    "reserved": 600 * 2**20,
    "power_mw": 312_500,
    "energy_mj": 9_000_000_000,
    "temperature_c": 61,
    "sm_mhz": 1410,
    "memory_mhz": 1215,
    "compute_mode": 0,
    "processes": 0,
    "mps_clients": 0,
    "mig.mode": 0,
    "nvlink_sent_kib": 2048,
    "nvlink_received_kib": 1024,
}
"""What a whole and quiet A100 says."""

A100_INSTANCE = A100 | {
    "mig.mode": 1,
    "mig.index": 3,
    "mig.uuid": MIG_UUID,
    "mig.name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "mig.total": 5 * 10**9,
}
"""The same in MIG mode, seen from a container that was given one instance of it."""


class StandIn:
    """One script, and the environment of a process that shall find these libraries first."""

    def __init__(self, libraries: Path, script: Path) -> None:
        self._script = script
        self.environment = {"LD_LIBRARY_PATH": str(libraries), "GPUMETER_STANDIN": str(script)}
        self.say(A100)

    def say(self, figures: dict[str, object]) -> None:
        """From the next call on. A call in the middle sees the old script or the new one, and never half of it."""
        new = self._script.with_suffix(".new")
        new.write_text("".join(f"{name} {value}\n" for name, value in figures.items() if value is not None))
        new.replace(self._script)


def build(folder: Path) -> Path:
    """The folder with both libraries. Skips the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the stand-in for NVML cannot be built")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("standin.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o", library, source], check=True)
    (folder / "libcuda.so.1").unlink(missing_ok=True)
    os.link(library, folder / "libcuda.so.1")
    return folder
