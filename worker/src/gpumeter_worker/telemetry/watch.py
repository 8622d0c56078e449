"""Joins what NVML says with what the meter measured: energy by owner, and how busy each of them says the GPU is.

Owns the latest of both and the rule for a disagreement. Lives in the event loop of the API process, where a sample
costs some arithmetic. Decides nothing about sessions, readiness or bills.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from gpumeter_worker.metering import energy
from gpumeter_worker.telemetry.sample import NO_GPU, Absence, Sample
from gpumeter_worker.telemetry.sampler import Sampler

log = logging.getLogger(__name__)

_CPU = Absence(NO_GPU, "this worker computes on the CPU; NVML has nothing to tell")

_COMPARE_NS = 10 * 10**9
_APART = 0.2
_WINDOWS = 3
"""So many windows in a row have to disagree: NVML's own sampling period is up to a second, and a step may be long."""


@dataclass(frozen=True, slots=True)
class Metered:
    """What the meter has booked up to now, and whether a step may be out that it does not know of."""

    attributed_ns: int
    nonbillable_ns: int
    serving: bool
    busy: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """One window of at least ten seconds. Both are shares of its time, 0 to 1.

    `measured` is the time inside steps. `nvml` is the time in which any kernel ran, whosever it was; less than
    `measured` where a step waits for its launches.
    """

    measured: float
    nvml: float


@dataclass(frozen=True, slots=True)
class _Open:
    sample: Sample
    metered: Metered
    percents: tuple[int, ...] = ()


class GpuWatch:
    """What is known of a worker's GPU. With `gpus` 0 there is none, and nothing is started.

    With several, the first is looked at, which all others step with. Its energy says nothing of theirs, so no energy is
    told then.
    """

    def __init__(
        self,
        gpus: int,
        metered: Callable[[], Metered],
        on_device: Callable[[Sample], None],
        sampler: Callable[[Callable[[Sample], None]], Sampler] = Sampler,
        on_window: Callable[[energy.Window], None] = lambda _: None,
    ) -> None:
        self._gpus = max(gpus, 1)
        self._sampler = sampler(self._on_sample) if gpus else None
        self._metered = metered
        self._on_device = on_device
        self._on_window = on_window
        self._device = ""
        self.energy = energy.Energy()
        self.comparison: Comparison | None = None
        self._open: _Open | None = None
        self._apart = 0

    @property
    def sample(self) -> Sample | None:
        """The latest look; None where there is none, and `absence` says why."""
        return self._sampler.latest if self._sampler else None

    @property
    def absence(self) -> Absence | None:
        """Why there is no sample."""
        return self._sampler.absence if self._sampler else _CPU

    @property
    def foreign(self) -> bool:
        """Whether NVML has for a while seen the GPU busier than this worker's steps can be."""
        return self._apart >= _WINDOWS

    async def run(self) -> None:
        """Look until cancelled, or until there is nothing to look at."""
        if self._sampler is not None:
            await self._sampler.run()

    def facts(self) -> dict[str, Any]:
        """For the usage status: JSON, absences and estimates named as what they are."""
        sample, absence, spent = self.sample, self.absence, self.energy
        return {
            "absence": asdict(absence) if absence else None,
            "sample": asdict(sample) if sample else None,
            "comparison": asdict(self.comparison) if self.comparison else None,
            "foreign_work": self.foreign,
            "energy_estimate": {
                "attributed_mj": spent.attributed_mj,
                "platform_mj": spent.platform_mj,
                "idle_mw": spent.idle_mw,
                "windows": spent.windows,
            }
            if spent.windows
            else None,
        }

    def _on_sample(self, sample: Sample) -> None:
        metered = self._metered()
        if sample.uuid != self._device:
            self._device = sample.uuid
            self._on_device(sample)
            self.energy = replace(self.energy, opened=None)  # another device counts from another number
            self._open = None
        windows = self.energy.windows
        self.energy = energy.read(
            self.energy,
            energy.Reading(
                at_ns=sample.at_ns,
                energy_mj=sample.energy_mj if self._gpus == 1 else None,
                power_mw=sample.power_mw,
                attributed_ns=metered.attributed_ns,
                nonbillable_ns=metered.nonbillable_ns,
                serving=metered.serving,
                busy=metered.busy,
            ),
        )
        if self.energy.windows > windows and self.energy.last is not None:
            self._on_window(self.energy.last)
        self._compare(sample, metered)

    def _compare(self, sample: Sample, metered: Metered) -> None:
        if sample.gpu_percent is None or not metered.serving:
            self._open, self._apart = None, 0
            return
        if self._open is None or not self._open.metered.serving:
            self._open = _Open(sample, metered)
            return
        opened = self._open
        percents = (*opened.percents, sample.gpu_percent)
        wall_ns = sample.at_ns - opened.sample.at_ns
        if wall_ns < _COMPARE_NS:
            self._open = _Open(opened.sample, opened.metered, percents)
            return
        measured_ns = (
            metered.attributed_ns
            + metered.nonbillable_ns
            - opened.metered.attributed_ns
            - opened.metered.nonbillable_ns
        )
        self.comparison = Comparison(measured_ns / self._gpus / wall_ns, sum(percents) / len(percents) / 100)
        self._open = _Open(sample, metered)
        apart = self.comparison.nvml - self.comparison.measured > _APART
        self._apart = self._apart + 1 if apart else 0
        if self._apart == _WINDOWS:
            log.warning(
                "NVML shows the GPU busy for %.0f %% of the time and this worker's steps took %.0f %%: somebody else "
                "computes on it, and measured steps hold their work, too; give the worker a GPU of its own",
                self.comparison.nvml * 100,
                self.comparison.measured * 100,
            )
