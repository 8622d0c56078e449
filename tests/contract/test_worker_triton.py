"""Triton's kernels without a GPU: run in the interpreter, and compiled to machine code for every kind of GPU."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.shared

ROOT = Path(__file__).parent.parent.parent
SHARED_MEMORY = {75: 65_536, 80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}
"""What one block of threads may have of it, by compute capability (CUDA's programming guide, table of limits)."""


def test_the_kernels_give_what_sdpa_gives_in_the_interpreter() -> None:
    """The very tests that a GPU runs. The interpreter must be asked for before Triton is imported, so by a child."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU: the gpu ring runs these tests on it")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/gpu/test_worker_paged_attention.py",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", ran.stdout)[-1]) >= 30
    assert "skipped" not in ran.stdout.splitlines()[-1]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_for_a_gpu_within_its_shared_memory_and_registers(capability: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        ran = subprocess.run(
            [sys.executable, "-m", "rigs.kernels", str(capability)],
            cwd=ROOT / "tests",
            env=environment | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = re.findall(r"^(.*): shared (\d+), (\d+) spilled$", ran.stdout, re.MULTILINE)
    assert len(found) == 8
    for name, shared, spilled in found:
        assert int(shared) <= SHARED_MEMORY[capability], name
        assert int(spilled) <= 128, name
