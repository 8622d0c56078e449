"""`python -m gpumeter_worker.gpuprobe`: what the NVIDIA driver says of itself and its GPUs, as one JSON object.

Owns the calls into libcuda, by ctypes; telemetry.nvml asks NVML. A process of its own, because a broken driver may hang
or crash whoever asks it, and because a library that is never unloaded should not stay in the worker. Judges nothing.
"""

import ctypes
import json
import sys
import uuid
from typing import Any

from gpumeter_worker.telemetry import nvml

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def main() -> int:
    """Print what was found; `problem` says why there is nothing."""
    print(json.dumps(_cuda()))
    return 0


def _cuda() -> dict[str, Any]:
    found: dict[str, Any] = {"cuda": 0, "devices": [], "nvml": None, "problem": ""}
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
    found["nvml"] = _nvml(0)
    found["nvml_further"] = [_nvml(index) for index in range(1, count.value)]
    return found


def first_uuids() -> tuple[str, ...]:
    """See _uuids, of the device that CUDA takes first."""
    return _uuids(0)


def _uuids(index: int) -> tuple[str, ...]:
    """How NVML may write the UUID of a device by CUDA's number; empty where the driver does not tell.

    CUDA tells the sixteen bytes of a GPU or of a MIG instance, and not of which of the two.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
        device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        if library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), index):
            return ()
        if library.cuDeviceGetUuid_v2(raw, device):
            return ()
    except (OSError, AttributeError):
        return ()
    text = str(uuid.UUID(bytes=bytes(raw)))
    return (f"GPU-{text}", f"MIG-{text}")


def _nvml(index: int) -> dict[str, Any] | None:
    """Who else uses a device, as far as NVML tells. Nobody here has made a context on it yet."""
    try:
        device = nvml.open_device(lambda: _uuids(index))
        seen = nvml.look(device)
        return {
            "processes": seen.processes,
            "mps_clients": seen.mps_clients,
            "used": nvml.used_bytes(device),
        }
    except nvml.NvmlAbsent:
        return None


def _free_bytes() -> list[int]:
    try:
        return nvml.free_bytes()
    except nvml.NvmlAbsent:
        return []


def _name(library: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    if library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value:
        return text.value.decode()
    return f"error {code}"


if __name__ == "__main__":
    sys.exit(main())
