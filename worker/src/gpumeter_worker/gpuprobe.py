"""`python -m gpumeter_worker.gpuprobe`: what the NVIDIA driver says of itself and its GPUs, as one JSON object.

Owns the calls into libcuda and NVML, by ctypes. A process of its own, because a broken driver may hang or crash whoever
asks it, and because a library that is never unloaded should not stay in the worker. Judges nothing.
"""

import ctypes
import json
import sys
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def main() -> int:
    """Print what was found; `problem` says why there is nothing."""
    print(json.dumps(_cuda()))
    return 0


def _cuda() -> dict[str, Any]:
    found: dict[str, Any] = {"cuda": 0, "devices": [], "problem": ""}
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return found | {"problem": f"the driver's library libcuda.so.1 is not there ({error})"}
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
        found["cuda"] = version.value
    if (code := library.cuInit(0)) != 0:
        return found | {"problem": f"the driver refuses to start ({_name(library, code)})"}
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    free = _free_bytes()
    for index in range(count.value):
        device = ctypes.c_int()
        if (code := library.cuDeviceGet(ctypes.byref(device), index)) != 0:
            return found | {"problem": f"GPU {index} does not answer ({_name(library, code)})"}
        name = ctypes.create_string_buffer(100)
        library.cuDeviceGetName(name, 100, device)
        total = ctypes.c_size_t()
        library.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        capability = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(value.value)
        found["devices"].append(
            {
                "name": name.value.decode(errors="replace"),
                "capability": capability,
                "total": total.value,
                # NVML counts whole GPUs; inside a MIG instance its figures are another device's, and are not used.
                "free": free[index] if len(free) == count.value and free[index] <= total.value else total.value,
            }
        )
    return found


def _free_bytes() -> list[int]:
    """Free memory of every GPU without making a context on it, which would take some of it."""

    class Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    count, free = ctypes.c_uint(), []
    if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    for index in range(count.value):
        handle, memory = ctypes.c_void_p(), Memory()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
            return []
        if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
            return []
        free.append(int(memory.free))
    library.nvmlShutdown()
    return free


def _name(library: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    if library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value:
        return text.value.decode()
    return f"error {code}"


if __name__ == "__main__":
    sys.exit(main())
