"""A device with a clock of its own, and events on its stream, for a clock that knows no CUDA.

Owns virtual time: nothing here waits. An event answers as CUDA's does: not before the device has come to it, and
elapsed times in float32's milliseconds.
"""

import struct


class DeviceLost(RuntimeError):
    """Every call to a device that failed answers with this."""


class VirtualDevice:
    """One stream. `ppm` is how much faster than the host's its clock runs; `launch_ns` how late a launch gets there."""

    def __init__(self, ppm: float = 0, launch_ns: int = 5_000) -> None:
        self.now_ns = 10**15
        self.rate = 1 + ppm / 1e6
        self.launch_ns = launch_ns
        self.lost = False
        self.made = 0
        self.synchronized = 0
        self._free_at_ns = 0

    def event(self) -> "VirtualEvent":
        self.made += 1
        return VirtualEvent(self)

    def read(self) -> int:
        return self.now_ns

    def work(self, duration_ns: int) -> None:
        self._free_at_ns = self.reached() + duration_ns

    def finish(self) -> None:
        self.now_ns = max(self.now_ns, self._free_at_ns)

    def reached(self) -> int:
        return max(self._free_at_ns, self.now_ns + self.launch_ns)


class VirtualEvent:
    """See gpumeter_worker.metering.clock.TimedEvent."""

    def __init__(self, device: VirtualDevice) -> None:
        self._device = device
        self.at_ns: int | None = None

    def record(self) -> None:
        self._refuse_if_lost()
        self.at_ns = self._device.reached()
        self._device._free_at_ns = self.at_ns

    def query(self) -> bool:
        self._refuse_if_lost()
        return self.at_ns is not None and self._device.now_ns >= self.at_ns

    def synchronize(self) -> None:
        self._refuse_if_lost()
        assert self.at_ns is not None
        self._device.synchronized += 1
        self._device.now_ns = max(self._device.now_ns, self.at_ns)

    def elapsed_time(self, end_event: "VirtualEvent") -> float:
        if not self.query() or not end_event.query() or self.at_ns is None or end_event.at_ns is None:
            raise RuntimeError("both events must be recorded and reached before their time can be calculated")
        milliseconds = (end_event.at_ns - self.at_ns) * self._device.rate / 1e6
        return float(struct.unpack("f", struct.pack("f", milliseconds))[0])

    def _refuse_if_lost(self) -> None:
        if self._device.lost:
            raise DeviceLost("CUDA error: unspecified launch failure")
