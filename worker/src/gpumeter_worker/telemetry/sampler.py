"""The worker's end of looking at the GPU: starts the process that does it, keeps the latest sample, starts the next.

Owns that process and how long one may be silent. Nothing here waits for a driver. Does not know what a figure means.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence

from gpumeter_worker.telemetry.sample import FAILED, FOR_GOOD, SILENT, STARTING, Absence, Sample, decode

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "gpumeter_worker.telemetry.process")
INTERVAL_S = 1.0

_SILENT_S = 15.0
"""The first answer of a driver that is not kept loaded may take some seconds a GPU."""

_BACK_OFF_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_LINE_BYTES = 2**16


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

    async def run(self) -> None:
        """Sample until cancelled, or until it is clear that there will never be anything."""
        young = 0
        while True:
            heard = await self._listen()
            young = 0 if heard else young + 1
            if self.absence is not None and self.absence.reason in FOR_GOOD:
                return
            await asyncio.sleep(self._back_off_s[min(young, len(self._back_off_s) - 1)])

    async def _listen(self) -> bool:
        """One process, from its start to its end. True when it brought a sample."""
        heard = False
        process = None
        try:
            process = await asyncio.create_subprocess_exec(
                *self._program,
                str(round(self._interval_s * 1000)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE_BYTES,
            )
            assert process.stdout is not None  # noqa: S101 - a pipe was asked for
            while line := await asyncio.wait_for(process.stdout.readline(), self._silent_s):
                told = decode(line)
                if isinstance(told, Absence):
                    self._lose(told)
                    return heard
                heard = True
                self._keep(told)
            status = await process.wait()
            self._lose(Absence(FAILED, f"the process that asks NVML ended with status {status}; it is started again"))
        except TimeoutError:
            self._lose(
                Absence(SILENT, f"NVML has not answered for {self._silent_s:.0f} s; check the node's driver and GPU")
            )
        except (OSError, ValueError) as error:
            self._lose(Absence(FAILED, f"the process that asks NVML cannot be used: {error}"))
        finally:
            if process is not None and process.returncode is None:
                process.kill()
                with contextlib.suppress(TimeoutError):  # one that waits for a dead driver cannot be ended
                    await asyncio.wait_for(process.wait(), 1.0)
        return heard

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
