"""What the engine asks of the GPU itself: how it computes, how much memory it has, how many processors.

Owns torch's switches and the reading of memory. Does not know the model. Every switch is set by a call that torch 2.6
has and later versions keep; nothing is decided by a version's number.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

import torch

from gpumeter_worker.engine.memory import Facts


def configure() -> None:
    """Set what results and timings depend on, so that no image's or library's default decides it.

    Products of float32 stay float32: who serves float32 asks for its precision, and in a model of a smaller type the
    only such product makes the angles of rotary embeddings, which TF32's ten bits would bend from position 2048 on.
    Products in bfloat16 and float16 run on tensor cores with or without it.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False  # a trial of algorithms inside somebody's step would be billed
    if torch.cuda.is_available():
        torch.cuda.init()
        show_triton_the_driver(Path("/proc/self/maps").read_text(), os.environ)


def show_triton_the_driver(maps: str, environment: MutableMapping[str, str]) -> None:
    """Tell Triton where the driver's library lies that this process has mapped (`maps`: /proc/self/maps).

    Triton asks ldconfig's cache, which nobody could bring up to date in a container whose root is read-only.
    """
    for line in maps.splitlines():
        path = Path(line.partition("/")[1] + line.partition("/")[2])
        if path.name.startswith("libcuda.so"):
            environment.setdefault("TRITON_LIBCUDA_PATH", str(path.parent))
            return


def multiprocessors() -> int:
    """How many streaming multiprocessors the current device has."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def forget_peak() -> None:
    """Give back what loading left over, and measure the allocator's peak from here on."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def facts(*, weights: int, graphs: int, block: int, needed: int, max_model_len: int) -> Facts:
    """What `memory.size_cache` wants to know, right after a warm-up of the largest step; bytes."""
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return Facts(
        total=total,
        free=free,
        held=torch.cuda.memory_reserved(),
        peak=peak,
        weights=weights,
        graphs=graphs,
        block=block,
        needed=needed,
        max_model_len=max_model_len,
    )
