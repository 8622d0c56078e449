"""The clocks: the process's own start, the worker's line of UTC time, and the measured duration of a step.

Owns how a step is timed on the host and by CUDA events. Does not know what a step contains or who pays for it. The
only module of metering that may import torch, and only where a GPU is.
"""

import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_READINGS = 5
_CLOSE_NS = 1_000_000
_TOLERANCE_NS = 5 * 10**9
"""What UTC may move before a boot's line is given up: beyond a leap second or a slow clock that is set right, and well
below the minute by which a ledger lets records lie in its future."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """Ties the monotonic clock to UTC once per boot, so that no later correction of UTC bends a duration."""

    offset_ns: int

    @staticmethod
    def now() -> "Anchor":
        """The middle of two readings of the monotonic clock is when UTC was read; the closest two of a few."""
        readings = []
        for _ in range(_READINGS):
            before_ns, utc_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
            readings.append((after_ns - before_ns, utc_ns - (before_ns + after_ns) // 2))
            if after_ns - before_ns < _CLOSE_NS:
                break
        return Anchor(min(readings)[1])

    def utc_ns(self, monotonic_ns: int) -> int:
        """UTC nanoseconds of a reading of CLOCK_MONOTONIC, in this process or another of the same machine."""
        return monotonic_ns + self.offset_ns

    def problem(self, now: "Anchor") -> str:
        """A sentence when UTC, read anew, is too far from this line to bill by it; else empty."""
        moved_ns = now.offset_ns - self.offset_ns
        if abs(moved_ns) <= _TOLERANCE_NS:
            return ""
        return (
            f"the node's clock was moved by {moved_ns / 1e9:+.1f} s since this worker started, and its records go by "
            "the clock of then; it drains, and starts anew by the clock as it is now"
        )


def process_started_ns() -> int:
    """When this process was started, on CLOCK_MONOTONIC: before its interpreter ran, so that start-up is counted.

    The kernel states it in ticks since boot (field 22 of /proc/self/stat), 10 ms apart, on CLOCK_BOOTTIME.
    """
    now_ns = time.monotonic_ns()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        since_boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        return now_ns
    age_ns = since_boot_ns - ticks * (10**9 // os.sysconf("SC_CLK_TCK"))
    return now_ns - max(0, age_ns)


@dataclass(frozen=True, slots=True)
class StepTime:
    """When a step ran, on CLOCK_MONOTONIC as the host saw it, and how long the device worked for it."""

    started_ns: int
    ended_ns: int
    gpu_ns: int


class StepClock(Protocol):
    """Times one step after another. Begin right before the first kernel, end right after the last."""

    kind: str

    def begin(self) -> None:
        """The step's first kernel is next."""

    def end(self) -> None:
        """The step's last kernel was just launched."""

    def harvest(self) -> list[StepTime]:
        """The steps that are known to be finished and were not returned yet, oldest first. Never waits."""


class HostClock:
    """Without CUDA a step lasts as long as the host says; its records carry the clock `host`."""

    kind = "host"

    def __init__(self) -> None:
        self._started_ns = 0
        self._finished: list[StepTime] = []

    def begin(self) -> None:
        """See StepClock."""
        self._started_ns = time.monotonic_ns()

    def end(self) -> None:
        """See StepClock."""
        ended_ns = time.monotonic_ns()
        self._finished.append(StepTime(self._started_ns, ended_ns, ended_ns - self._started_ns))

    def harvest(self) -> list[StepTime]:
        """See StepClock."""
        finished, self._finished = self._finished, []
        return finished


class CudaClock:
    """A ring of reused event pairs on the compute stream, read back by `query()`: never a synchronise for its sake.

    Where the device is idle at a step's begin, an anchor event ties its time to the host's; until the next such moment
    the ends of steps are read relative to it, so that steps queued behind one another keep their true order and length.
    """

    kind = "cuda"

    def __init__(self, pairs: int = 64) -> None:
        import torch  # noqa: PLC0415 - only a process that drives a GPU loads it

        self._free: deque[tuple[Any, Any]] = deque(
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(pairs)
        )
        self._anchor = torch.cuda.Event(enable_timing=True)
        self._anchored_ns = 0
        self._current: tuple[Any, Any] | None = None
        self._pending: deque[tuple[Any, Any]] = deque()
        self._finished: list[StepTime] = []
        self._last_ended_ns = 0

    def begin(self) -> None:
        """See StepClock."""
        if (
            self._current is None and not self._free
        ):  # the ring is longer than any launch queue should be: wait rather than lose a step
            self._pending[0][1].synchronize()
            self._collect()
        if not self._pending:
            self._anchored_ns = time.monotonic_ns()
            self._anchor.record()
        self._current = self._current or self._free.popleft()  # one that began and failed gives its pair to the next
        self._current[0].record()

    def end(self) -> None:
        """See StepClock."""
        if self._current is None:
            raise RuntimeError("a step ended that had not begun")
        self._current[1].record()
        self._pending.append(self._current)
        self._current = None

    def harvest(self) -> list[StepTime]:
        """See StepClock."""
        self._collect()
        finished, self._finished = self._finished, []
        return finished

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():
            first, last = self._pending.popleft()
            # elapsed_time is float32 milliseconds: whole nanoseconds for a step, and never summed as a float.
            gpu_ns = round(first.elapsed_time(last) * 1e6)
            ended_ns = self._anchored_ns + round(self._anchor.elapsed_time(last) * 1e6)
            ended_ns = max(min(ended_ns, time.monotonic_ns()), self._last_ended_ns)
            self._finished.append(StepTime(max(ended_ns - gpu_ns, self._last_ended_ns), ended_ns, gpu_ns))
            self._last_ended_ns = ended_ns
            self._free.append((first, last))


def step_clock(device: str) -> StepClock:
    """The clock for a torch device name."""
    return CudaClock() if device.startswith("cuda") else HostClock()
