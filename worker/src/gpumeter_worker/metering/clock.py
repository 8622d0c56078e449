"""The clocks: the process's own start, the worker's line of UTC time, and the measured duration of a step.

Owns how a step is timed on the host and by CUDA events. Does not know what a step contains or who pays for it. The
only module of metering that may import torch, and only where a GPU is.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

_READINGS = 5
_CLOSE_NS = 1_000_000
_TOLERANCE_NS = 5 * 10**9
"""What UTC may move before a boot's line is given up: beyond a leap second or a slow clock that is set right, and well
below the minute by which a ledger lets records lie in its future."""

_DRIFT_AFTER_NS = 10 * 10**9
_OVERLAP = "a step began inside another; forwards that overlap would be billed twice"


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
    """Times one step after another, on one stream: begin right before the first kernel, end right after the last.

    `begun` counts the steps that began. Each of them is harvested once, in order, unless `abort` said otherwise.
    """

    kind: str
    begun: int

    @property
    def drift_ppb(self) -> int | None:
        """How much faster than the host's clock this one runs, in parts per billion; None while that is not known."""

    def begin(self) -> None:
        """The step's first kernel is next. Raises RuntimeError inside another step: forwards must not overlap."""

    def end(self) -> None:
        """The step's last kernel was just launched."""

    def abort(self) -> bool:
        """The step that began last has failed, before or after its end: it lasts until the device has done with it.

        Waits for the device, as only a failure may. False where the device does not tell any more: that step is never
        harvested.
        """

    def harvest(self) -> list[StepTime]:
        """The steps that are known to be finished and were not returned yet, oldest first. Never waits."""


class HostClock:
    """Without CUDA a step lasts as long as the host says; its records carry the clock `host`."""

    kind = "host"
    drift_ppb = None

    def __init__(self) -> None:
        self.begun = 0
        self._started_ns: int | None = None
        self._finished: list[StepTime] = []

    def begin(self) -> None:
        """See StepClock."""
        if self._started_ns is not None:
            raise RuntimeError(_OVERLAP)
        self.begun += 1
        self._started_ns = time.monotonic_ns()

    def end(self) -> None:
        """See StepClock."""
        if self._started_ns is None:
            raise RuntimeError("a step ended that had not begun")
        ended_ns = time.monotonic_ns()
        self._finished.append(StepTime(self._started_ns, ended_ns, ended_ns - self._started_ns))
        self._started_ns = None

    def abort(self) -> bool:
        """See StepClock."""
        if self._started_ns is not None:
            self.end()
        return True

    def harvest(self) -> list[StepTime]:
        """See StepClock."""
        finished, self._finished = self._finished, []
        return finished


class TimedEvent(Protocol):
    """What is used of `torch.cuda.Event(enable_timing=True)`, on the current stream."""

    def record(self) -> None:
        """Take the device's time when everything launched so far is done."""

    def query(self) -> bool:
        """Whether that is so. Never waits."""

    def synchronize(self) -> None:
        """Wait until it is."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to a later event, in float32's precision."""


class CudaClock:
    """A ring of reused event pairs on the compute stream, read back by `query()`: never a synchronise for its sake.

    Where the device is idle at a step's begin, an anchor event ties its time to the host's. Ends are added up from
    there in whole nanoseconds, one short interval after the other, because `elapsed_time` is float32 milliseconds: good
    to a nanosecond over a step, to a quarter of a millisecond over an hour. So steps queued behind one another keep
    their true order and length. From anchor to anchor the two clocks are compared, which is the drift.
    """

    kind = "cuda"

    def __init__(
        self,
        pairs: int = 64,
        make_event: Callable[[], TimedEvent] | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`make_event` is CUDA's where none is given."""
        make = make_event or _cuda_events()
        self.begun = 0
        self._now_ns = now_ns
        self._pairs = pairs
        # One pair more than may be in flight: the end of the step before is what the next one is measured from.
        self._free: deque[_Pair] = deque((make(), make()) for _ in range(pairs + 1))
        self._current: _Pair | None = None
        self._pending: deque[_Pair] = deque()
        self._reference: tuple[TimedEvent, int] | None = None
        self._reference_pair: _Pair | None = None
        self._anchor, self._anchor_before = make(), make()
        self._anchored_ns: int | None = None
        self._compares_from_ns: int | None = None
        self._device_ns = self._host_ns = 0
        self._finished: list[StepTime] = []
        self._last_ended_ns = 0

    @property
    def drift_ppb(self) -> int | None:
        """See StepClock. Told after ten seconds, when a launch's few microseconds are below one part per million."""
        if self._host_ns < _DRIFT_AFTER_NS:
            return None
        return (self._device_ns - self._host_ns) * 10**9 // self._host_ns

    def begin(self) -> None:
        """See StepClock."""
        if self._current is not None:
            raise RuntimeError(_OVERLAP)
        if (
            len(self._pending) == self._pairs
        ):  # the ring is longer than any launch queue should be: wait rather than lose a step
            self._pending[0][1].synchronize()
            self._collect()
        if not self._pending:
            self._tie_to_host()
        self.begun += 1
        self._current = self._free.popleft()
        self._current[0].record()

    def end(self) -> None:
        """See StepClock."""
        if self._current is None:
            raise RuntimeError("a step ended that had not begun")
        self._current[1].record()
        self._pending.append(self._current)
        self._current = None

    def abort(self) -> bool:
        """See StepClock."""
        try:
            if self._current is not None:
                self.end()
            if self._pending:
                self._pending[-1][1].synchronize()
        except Exception:  # a device that failed answers nothing any more, and says so in its own kind of error
            log.exception("the device does not tell how long the failed step took")
            self._current = None
            return False
        return True

    def harvest(self) -> list[StepTime]:
        """See StepClock. Where the device answers no more, what it had told before comes first, and then its error."""
        try:
            self._collect()
        except Exception:
            if not self._finished:
                raise
        finished, self._finished = self._finished, []
        return finished

    def _tie_to_host(self) -> None:
        """The device is idle: it takes the anchor's time as soon as it is launched."""
        self._anchor, self._anchor_before = self._anchor_before, self._anchor
        self._compares_from_ns = self._anchored_ns
        self._anchored_ns = self._now_ns()
        self._anchor.record()
        self._refer(self._anchor, self._anchored_ns, None)

    def _refer(self, event: TimedEvent, line_ns: int, pair: "_Pair | None") -> None:
        if self._reference_pair is not None:
            self._free.append(self._reference_pair)
        self._reference, self._reference_pair = (event, line_ns), pair

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():
            first, last = self._pending[0]
            if self._reference is None:
                raise RuntimeError("a step ended before any anchor")
            self._compare()
            event, line_ns = self._reference
            gpu_ns, line_ns = _nanoseconds(first, last), line_ns + _nanoseconds(event, last)
            self._pending.popleft()
            self._refer(last, line_ns, (first, last))
            ended_ns = max(min(line_ns, self._now_ns()), self._last_ended_ns)
            self._finished.append(StepTime(max(ended_ns - gpu_ns, self._last_ended_ns), ended_ns, gpu_ns))
            self._last_ended_ns = ended_ns

    def _compare(self) -> None:
        """Once an anchor: the time since the one before, by both clocks. Float32's share of it is 0.06 ppm at most."""
        if self._compares_from_ns is None or self._anchored_ns is None:
            return
        self._device_ns += _nanoseconds(self._anchor_before, self._anchor)
        self._host_ns += self._anchored_ns - self._compares_from_ns
        self._compares_from_ns = None


_Pair = tuple[TimedEvent, TimedEvent]


def _nanoseconds(first: TimedEvent, last: TimedEvent) -> int:
    return round(first.elapsed_time(last) * 1e6)


def _cuda_events() -> Callable[[], TimedEvent]:
    import torch  # noqa: PLC0415 - only a process that drives a GPU loads it

    def make() -> TimedEvent:
        event: TimedEvent = torch.cuda.Event(enable_timing=True)
        return event

    return make


def step_clock(device: str) -> StepClock:
    """The clock for a torch device name."""
    return CudaClock() if device.startswith("cuda") else HostClock()
