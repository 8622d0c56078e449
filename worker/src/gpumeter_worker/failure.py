"""What ends a worker for good: one word and one sentence, in log, termination message and condition.

Owns the reasons, how they leave the process, and how another program's error is quoted in a sentence. Does not know how
anything is found out.
"""

import re
import sys
from pathlib import Path

EXIT_CODE = 3
TERMINATION_LOG = Path("/dev/termination-log")

ARCHITECTURE_UNKNOWN = "ArchitectureUnknown"
DRIVER_TOO_OLD = "DriverTooOld"
DTYPE_UNSUPPORTED = "DtypeUnsupported"
ENGINE_HUNG = "EngineHung"
ENGINE_START_FAILED = "EngineStartFailed"
ENGINE_STUCK = "EngineStuck"
GPU_CLASS_WRONG = "GpuClassWrong"
GPU_NOT_FOUND = "GpuNotFound"
GPU_SHARED = "GpuShared"
JOURNAL_UNUSABLE = "JournalUnusable"
MODEL_ACCESS_DENIED = "ModelAccessDenied"
MODEL_CACHE_FULL = "ModelCacheFull"
MODEL_CACHE_UNUSABLE = "ModelCacheUnusable"
MODEL_INVALID = "ModelInvalid"
MODEL_NOT_FOUND = "ModelNotFound"
MODEL_SOURCE_UNREACHABLE = "ModelSourceUnreachable"
MODEL_SOURCE_UNSUPPORTED = "ModelSourceUnsupported"
OUT_OF_MEMORY = "OutOfMemory"
SETTINGS_INVALID = "SettingsInvalid"
SHARED_MEMORY_TOO_SMALL = "SharedMemoryTooSmall"
WORKER_FAILED = "WorkerFailed"


class StartupFailed(Exception):
    """This worker cannot serve here, and trying again will not help until somebody changes something."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def line(self) -> str:
        """`Reason: sentence`, as the termination message and so the service's condition show it."""
        return f"{self.reason}: {self.message}"


class LoadFailed(Exception):
    """The model cannot be served here. `reason` is one of those above."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


_QUERY = re.compile(r"\?[^\s'\")>]+")
_USER = re.compile(r"//[^/\s@]+@")


def first_line(error: BaseException, chars_max: int = 300) -> str:
    """What an error says, short enough for a sentence; its type where it says nothing.

    Without what may open something: the query of an address, as a store signs it, and a name and password in one.
    """
    text = str(error).strip().splitlines()
    said = text[0] if text else type(error).__name__
    return _USER.sub("//", _QUERY.sub("?...", said)).rstrip(".")[:chars_max]


def report(failure: StartupFailed) -> int:
    """Tell the log and the kubelet; returns the exit code."""
    print(failure.line, file=sys.stderr, flush=True)
    try:
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_text(failure.line[:4000])
    except OSError as error:
        print(f"the termination log cannot be written: {error}", file=sys.stderr)
    return EXIT_CODE
