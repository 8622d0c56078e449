"""Compiles every kernel to machine code for a GPU that need not be here: `python -m rigs.kernels 90` for 9.0.

Prints, for each, the shared memory that a block of threads takes and the bytes of registers that ptxas had to spill.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpumeter_worker.engine import triton_attention as kernels

INTEGERS = ("window", "table_stride", "splits")
"""Arguments that kernels are not specialised on; all others are multiples of 16 in a model."""


def main(capability: int) -> None:
    half = "fp16" if capability < 80 else "bf16"
    shapes = [
        (half, 64, 3, False, True, False),
        (half, 128, 4, True, False, False),
        (half, 256, 2, True, False, True),
        ("fp32", 64, 3, True, True, False),
        ("fp32", 128, 4, True, False, True),
        (half, 80, 1, True, False, False),
    ]
    cases = {f"attend {shape}": (attend(*shape, capability), 4) for shape in shapes}
    cases |= {"join": (join(half, 128), 4), "write": (write(half, 80), 1)}
    for name, (one, warps) in cases.items():
        options = {"num_warps": warps, "num_stages": 2}
        compiled = triton.compile(one, target=GPUTarget("cuda", capability, 32), options=options)
        print(
            f"{name}: shared {compiled.metadata.shared}, {spilled(compiled.asm['ptx'], capability)} spilled", flush=True
        )


def spilled(ptx: str, capability: int) -> int:
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    blackwell = folder / "ptxas-blackwell"
    ptxas = blackwell if capability >= 100 and blackwell.exists() else folder / "ptxas"
    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(said.split(" bytes spill stores")[0].split()[-1])


def attend(  # noqa: PLR0917
    dtype: str, dim: int, group: int, chunk: bool, split: bool, bent: bool, capability: int
) -> ASTSource:
    tile = kernels.tiles(dim, 4 if dtype == "fp32" else 2, divmod(capability, 10))
    block_q = kernels.block_q(tile, group, 1) if chunk else 1
    constants = {
        "GROUP": group,
        "HEAD_DIM": dim,
        "PADDED_DIM": triton.next_power_of_2(dim),
        "BLOCK_TOKENS": 16,
        "TILE": tile.keys,
        "BLOCK_Q": block_q,
        "BLOCK_M": max(16, triton.next_power_of_2(block_q * group)),
        "SPLIT": split,
        "WINDOW": bent,
        "SOFTCAP": bent,
    }
    pointers = dict.fromkeys(("query", "keys", "values", "out"), f"*{dtype}")
    pointers |= dict.fromkeys(("part", "part_max", "part_sum"), "*fp32" if split else f"*{dtype}")
    pointers |= dict.fromkeys(("table", "lengths", "query_start", "program_sequence", "program_first"), "*i32")
    return source(kernels._attend, constants, pointers, ("scale", "softcap"))


def join(dtype: str, dim: int) -> ASTSource:
    constants = {"HEAD_DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "MAX_SPLITS": kernels.MAX_SPLITS}
    pointers = dict.fromkeys(("part", "part_max", "part_sum"), "*fp32") | {"out": f"*{dtype}"}
    return source(kernels._join, constants, pointers, ())


def write(dtype: str, dim: int) -> ASTSource:
    constants = {"HEAD_DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "BLOCK_TOKENS": 16}
    pointers = dict.fromkeys(("key", "value", "keys", "values"), f"*{dtype}") | {"slots": "*i32"}
    return source(kernels._write, constants, pointers, ())


def source(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], floats: tuple[str, ...]) -> ASTSource:
    kinds = dict.fromkeys(constants, "constexpr") | pointers | dict.fromkeys(floats, "fp32")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = [
        index
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in INTEGERS)
    ]
    return ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned})


if __name__ == "__main__":
    main(int(sys.argv[1]))
