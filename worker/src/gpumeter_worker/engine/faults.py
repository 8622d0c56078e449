"""What went wrong in a step: whether the engine can go on, and the sentence that says so.

Pure. Owns the distinction between a step for which there was no memory and everything after which the state of the
engine, or of the device, is unknown. Knows no torch: its errors are told by their names, which have not changed since
2.0, and by the words of the driver. A sentence never holds the text of an error that could quote a request.
"""

import traceback
from dataclasses import dataclass
from pathlib import Path

from gpumeter_worker.failure import first_line

_MEMORY_WORDS = ("out of memory", "can't allocate memory")
_DEVICE_WORDS = (
    "CUDA error",
    "cuDNN error",
    "cuBLAS error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "NCCL error",
    "HIP error",
)
_TEXT_MAX = 200


class RankLost(Exception):
    """A step lacks a rank of a split model. The message is a sentence that names it and quotes no request."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`memory`: the step left nothing behind, and a smaller one may run. Otherwise only a new process can go on."""

    memory: bool
    sentence: str


def fault_of(error: BaseException) -> Fault:
    """Judge an exception that a step raised."""
    if isinstance(error, RankLost):
        return Fault(False, str(error))
    names = {one.__name__ for one in type(error).__mro__}
    text = first_line(error, _TEXT_MAX)
    # Device errors first: a fault that poisons the context may also speak of memory, and no later step would be right.
    if "AcceleratorError" in names or any(words in text for words in _DEVICE_WORDS):
        return Fault(False, f"the device failed in a step ({text})")
    if names & {"OutOfMemoryError", "MemoryError"} or any(words in text for words in _MEMORY_WORDS):
        return Fault(True, "the memory was too small for a step")
    where = [frame for frame in traceback.extract_tb(error.__traceback__) if "gpumeter_worker" in frame.filename]
    at = f" at {Path(where[-1].filename).name}:{where[-1].lineno}" if where else ""
    return Fault(False, f"a step raised {type(error).__name__}{at}")
