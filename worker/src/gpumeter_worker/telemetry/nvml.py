"""Asks NVML about one GPU or MIG instance, through NVIDIA's own bindings.

Owns the calls, their units, and what an error means: a figure that is not told, or a GPU that is gone. Blocks for as
long as the driver does, and a broken driver may never answer: run it in a process of its own. Judges nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from gpumeter_worker.telemetry.sample import (
    DRIVER_NOT_LOADED,
    FAILED,
    GPU_LOST,
    GPU_NOT_FOUND,
    LIBRARY_NOT_FOUND,
    Absence,
    Sample,
    mig_profile,
)

_ALL_LINKS = 2**32 - 1

_GONE = frozenset(
    {
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
"""Errors of the device or the driver; every other one says that a single figure cannot be told."""


class NvmlAbsent(Exception):
    """NVML, or the GPU, does not answer."""

    def __init__(self, absence: Absence) -> None:
        super().__init__(absence.message)
        self.absence = absence


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU that was found. `whole` is the GPU of a MIG instance, and the same as `handle` elsewhere."""

    handle: Any
    whole: Any
    uuid: str
    name: str
    mig_profile: str
    driver: str | None


def open_device(cudas_first: Callable[[], tuple[str, ...]]) -> Device:
    """The GPU that CUDA takes first. `cudas_first` tells how its UUID may read; it is asked where there are several,
    because NVML counts them in another order.

    Raises NvmlAbsent. What is opened stays open until the process ends.
    """
    return _translated(lambda: _open(cudas_first))


def look(device: Device, now_ns: Callable[[], int] = time.monotonic_ns) -> Sample:
    """Every figure that the device tells. Raises NvmlAbsent where it is gone."""
    return _translated(lambda: _look(device, now_ns))


def free_bytes() -> list[int]:
    """Free memory of every GPU, without making a context on it, which would take some of it. Raises NvmlAbsent."""
    return _translated(_free_bytes)


def used_bytes(device: Device) -> int | None:
    """What processes take of its memory: without the driver's own part, where the driver tells them apart."""
    memory = _told(pynvml.nvmlDeviceGetMemoryInfo, device.handle, pynvml.nvmlMemory_v2)
    return None if memory is None else int(memory.used)


_Answer = TypeVar("_Answer")


def _translated(ask: Callable[[], _Answer]) -> _Answer:
    try:
        return ask()
    except pynvml.NVMLError as error:
        raise NvmlAbsent(_absence(error)) from None


def _absence(error: pynvml.NVMLError) -> Absence:
    told = str(error)
    match error.value:
        case pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return Absence(
                LIBRARY_NOT_FOUND,
                "the driver's library libnvidia-ml.so.1 is not in this container, so the GPU's utilisation, power and "
                "energy are not told; have the container toolkit give it the capability `utility`",
            )
        case pynvml.NVML_ERROR_DRIVER_NOT_LOADED | pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            return Absence(DRIVER_NOT_LOADED, f"NVML finds no driver that fits ({told}); reload the node's driver")
        case pynvml.NVML_ERROR_NOT_FOUND:
            return Absence(GPU_NOT_FOUND, "NVML shows no GPU in this container")
        case pynvml.NVML_ERROR_GPU_IS_LOST | pynvml.NVML_ERROR_RESET_REQUIRED:
            return Absence(GPU_LOST, f"the GPU does not answer any more ({told}); drain the node and reset it")
        case _:
            return Absence(FAILED, f"NVML does not work here ({told}); check the node with nvidia-smi")


def _told(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns, or None where this device, driver or container does not tell."""
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        if error.value in _GONE:
            raise
        return None


def _open(cudas_first: Callable[[], tuple[str, ...]]) -> Device:
    pynvml.nvmlInit()
    count = pynvml.nvmlDeviceGetCount()
    if not count:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    uuids = cudas_first() if count > 1 else ()
    named = next((found for uuid in uuids if (found := _told(pynvml.nvmlDeviceGetHandleByUUID, uuid))), None)
    handle, whole = _instance(named or pynvml.nvmlDeviceGetHandleByIndex(0))
    name = str(pynvml.nvmlDeviceGetName(handle))
    return Device(
        handle=handle,
        whole=whole,
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        name=name,
        mig_profile=mig_profile(name),
        driver=_told(pynvml.nvmlSystemGetDriverVersion),
    )


def _instance(handle: Any) -> tuple[Any, Any]:
    """The MIG instance that a container was given of a GPU, and the GPU. Without MIG both are the GPU."""
    is_instance = _told(pynvml.nvmlDeviceIsMigDeviceHandle, handle)
    if is_instance is not None and is_instance.value:
        return handle, _told(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle) or handle
    mode = _told(pynvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return handle, handle
    for index in range(_told(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        instance = _told(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if instance is not None:  # what belongs to other containers is not shown here
            return instance, handle
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)


def _look(device: Device, now_ns: Callable[[], int]) -> Sample:
    handle, whole = device.handle, device.whole
    alone = None if device.mig_profile else handle  # whose power and links would be everybody's
    rates = _told(pynvml.nvmlDeviceGetUtilizationRates, handle)
    memory = _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    processes = _told(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    clients = _told(pynvml.nvmlDeviceGetMPSComputeRunningProcesses, handle)
    mode = _told(pynvml.nvmlDeviceGetComputeMode, whole)
    sent, received = _nvlink(alone) if alone is not None else (None, None)
    at_ns = now_ns()
    return Sample(
        at_ns=at_ns,
        uuid=device.uuid,
        name=device.name,
        mig_profile=device.mig_profile,
        driver=device.driver,
        gpu_percent=None if rates is None else int(rates.gpu),
        memory_percent=None if rates is None else int(rates.memory),
        memory_used_bytes=None if memory is None else int(memory.used),
        memory_total_bytes=None if memory is None else int(memory.total),
        power_mw=None if alone is None else _told(pynvml.nvmlDeviceGetPowerUsage, alone),
        energy_mj=None if alone is None else _told(pynvml.nvmlDeviceGetTotalEnergyConsumption, alone),
        temperature_c=_told(pynvml.nvmlDeviceGetTemperature, whole, pynvml.NVML_TEMPERATURE_GPU),
        sm_mhz=_told(pynvml.nvmlDeviceGetClockInfo, whole, pynvml.NVML_CLOCK_SM),
        memory_mhz=_told(pynvml.nvmlDeviceGetClockInfo, whole, pynvml.NVML_CLOCK_MEM),
        nvlink_sent_bytes=sent,
        nvlink_received_bytes=received,
        processes=None if processes is None else len(processes),
        mps_clients=None if clients is None else len(clients),
        exclusive=None if mode is None else mode == pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS,
    )


def _nvlink(handle: Any) -> tuple[int | None, int | None]:
    """Bytes of payload over all links; NVML counts KiB."""
    fields = (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)
    values = _told(pynvml.nvmlDeviceGetFieldValues, handle, [(field, _ALL_LINKS) for field in fields])
    if values is None:
        return None, None
    sent, received = (
        int(value.value.ullVal) * 1024 if value.nvmlReturn == pynvml.NVML_SUCCESS else None for value in values
    )
    return sent, received


def _free_bytes() -> list[int]:
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles]
