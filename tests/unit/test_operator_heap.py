"""What is freed goes back to the machine, though it lies between what stays."""

import ctypes
from pathlib import Path

import pytest

from gpumeter_operator.adapters.heap import give_back

MIB = 2**20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc gives pages back")
def test_what_is_free_between_blocks_that_stay_goes_back_to_the_machine() -> None:
    blocks = [bytes(8_000) for _ in range(12_500)]  # 100 MB; below what glibc takes from the machine one by one
    kept = blocks[::16]
    full = resident_bytes()
    blocks.clear()
    assert resident_bytes() > full - 20 * MIB, "by itself nothing goes back"
    assert give_back()
    assert resident_bytes() < full - 60 * MIB
    assert len(kept) == 782


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1_024 for line in lines if line.startswith("VmRSS:"))
