"""The worker's end of looking at the GPU: starts the process that does it, keeps the latest sample, starts the next.

Owns that process, the thread that listens to it, and how long it may be silent. The event loop waits for neither. Does
not know what a figure means.
"""

import asyncio
import logging
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from gpumeter_worker.telemetry.sample import FAILED, FOR_GOOD, SILENT, STARTING, Absence, Sample, decode

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "gpumeter_worker.telemetry.process")
INTERVAL_S = 1.0

_SILENT_S = 15.0
"""The first answer of a driver that is not kept loaded may take some seconds a GPU."""

_BACK_OFF_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_LINE_BYTES_MAX = 2**16
_END_S = 1.0


class Sampler:
    """The latest look at the GPU. Where there is none, `absence` says why."""

    def __init__(
        self,
        on_sample: Callable[[Sample], None],
        *,
        interval_s: float = INTERVAL_S,
        silent_s: float = _SILENT_S,
        back_off_s: Sequence[float] = _BACK_OFF_S,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.latest: Sample | None = None
        self.absence: Absence | None = Absence(STARTING, "NVML was not heard yet")
        self._on_sample = on_sample
        self._interval_s = interval_s
        self._silent_s = silent_s
        self._back_off_s = back_off_s
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    async def run(self) -> None:
        """Sample until cancelled, or until it is clear that there will never be anything."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell(what: Callable[..., None], *about: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(what, *about)

        stop = threading.Event()
        threading.Thread(target=self._work, args=(tell, ended.set, stop), name="gpu-sampler", daemon=True).start()
        try:
            await ended.wait()
        finally:
            stop.set()
            if self._process is not None:
                self._process.kill()

    def _work(self, tell: Callable[..., None], ended: Callable[[], None], stop: threading.Event) -> None:
        """The thread: one process after the other. What was heard is handed to the event loop."""
        young = 0
        while not stop.is_set():
            last: Sample | Absence | None = None
            for last in self._listen(stop):
                if isinstance(last, Sample):
                    young = 0
                    tell(self._keep, last)
            if isinstance(last, Absence) and not stop.is_set():  # ended by us: says nothing of the GPU
                tell(self._lose, last)
                if last.reason in FOR_GOOD:
                    break
            stop.wait(self._back_off_s[min(young, len(self._back_off_s) - 1)])
            young += 1
        tell(ended)

    def _listen(self, stop: threading.Event) -> Iterator[Sample | Absence]:
        """What one process says, from its start to its end; at last why it ended."""
        try:
            process = subprocess.Popen(
                [*self._program, str(round(self._interval_s * 1000))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        except OSError as error:
            yield Absence(FAILED, f"the process that asks NVML cannot be started: {error}")
            return
        self._process = process
        try:
            if stop.is_set():
                return
            for line in _lines(process, self._silent_s):
                told = decode(line)
                yield told
                if isinstance(told, Absence):
                    return
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            yield Absence(
                FAILED, f"the process that asks NVML ended with status {process.returncode}; it is started again"
            )
        except TimeoutError:
            yield Absence(SILENT, f"NVML has not answered for {self._silent_s:.0f} s; check the node's driver and GPU")
        except ValueError as error:
            yield Absence(FAILED, f"the process that asks NVML cannot be understood: {error}")
        except Exception as error:  # a thread that ends in silence would leave its last sample standing for ever
            log.exception("the process that asks NVML cannot be listened to")
            yield Absence(FAILED, f"the process that asks NVML cannot be listened to: {type(error).__name__}")
        finally:
            _end(process)

    def _keep(self, sample: Sample) -> None:
        if self.latest is None or self.absence is not None:
            log.info("NVML shows %s (%s), driver %s", sample.name, sample.uuid, sample.driver or "unknown")
        self.latest, self.absence = sample, None
        try:
            self._on_sample(sample)
        except Exception:
            log.exception("a sample of the GPU could not be used")

    def _lose(self, absence: Absence) -> None:
        """A fact that is told once, and again only when it has become another."""
        if self.absence is None or self.absence.reason != absence.reason:
            log.warning("%s: %s", absence.reason, absence.message)
        self.latest, self.absence = None, absence


def _lines(process: "subprocess.Popen[bytes]", silent_s: float) -> Iterator[bytes]:
    """Its lines until it ends. Raises TimeoutError when the next takes too long, and ValueError for one without end."""
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN | select.POLLHUP)
    kept, until_s = b"", time.monotonic() + silent_s
    while True:
        if not poll.poll(max(0.0, until_s - time.monotonic()) * 1000):
            raise TimeoutError
        found = process.stdout.read1(_LINE_BYTES_MAX)  # type: ignore[attr-defined]
        if not found:
            return
        *lines, kept = (kept + found).split(b"\n")
        if len(kept) > _LINE_BYTES_MAX:
            raise ValueError("a line without an end")
        if lines:
            until_s = time.monotonic() + silent_s
        yield from lines


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Nothing of it stays, except where it waits for a dead driver: the kernel ends it when the driver lets go."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
