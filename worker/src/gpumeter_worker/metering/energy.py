"""Who a GPU's energy is put down to: an estimate, in whole millijoules, that loses none and makes none up.

Pure. Owns the windows, the idle power and the split. Does not know how energy is measured, and nobody is billed by it:
a counter of the whole board says nothing about which kernel drew what.

The rule: in each window the platform gets what the GPU would have drawn idle, and the rest goes by measured time.

    idle_mj = min(total, idle_mw x duration)        mW x ns = 10^-12 J = 10^-9 mJ
    rest    = largest_remainder(total - idle_mj, ns of each owner)

Idle power is the lowest mean power of a window in which nothing ran and the engine was ready: what it costs to have the
model loaded. Until there was such a window it is the power that was read before the engine came to the GPU, and where
nobody read that, the platform gets all of it. A window without any measured time is the platform's, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpumeter_usage.apportion import largest_remainder

WINDOW_NS = 5 * 10**9
"""What a window lasts at least: the counter moves every 20 to 100 ms, so it is right to two per cent and better."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of things at one moment. `energy_mj` and the times since the worker's start only ever grow.

    `serving`: the engine is ready. `busy`: sessions are in flight, whose step may not be reported yet.
    """

    at_ns: int
    energy_mj: int | None
    power_mw: int | None
    attributed_ns: int
    nonbillable_ns: int
    serving: bool
    busy: bool


@dataclass(frozen=True, slots=True)
class Window:
    """What one window drew, and for whom. `platform_mj` holds the idle share and the platform's own steps."""

    duration_ns: int
    total_mj: int
    attributed_mj: int
    platform_mj: int


@dataclass(frozen=True, slots=True)
class Energy:
    """The estimate so far. `idle_mw` is None while no idle power is known."""

    opened: Reading | None = None
    idle_mw: int | None = None
    idle_is_served: bool = False  # seen while the engine was ready
    was_serving: bool = False
    busy_since_opened: bool = False
    attributed_mj: int = 0
    platform_mj: int = 0
    windows: int = 0
    last: Window | None = None


def split_window(
    total_mj: int, duration_ns: int, idle_mw: int | None, owners_ns: Sequence[int]
) -> tuple[int, list[int]]:
    """The platform's millijoules and each owner's; together they are `total_mj` exactly."""
    if total_mj < 0 or duration_ns < 0:
        raise ValueError("energy and durations cannot be negative")
    if idle_mw is None or not any(owners_ns):
        return total_mj, [0] * len(owners_ns)
    idle_mj = min(total_mj, idle_mw * duration_ns // 10**9)
    return idle_mj, largest_remainder(total_mj - idle_mj, owners_ns)


def read(energy: Energy, reading: Reading) -> Energy:
    """The estimate after one more reading, which closes the window that is open when it is old enough."""
    if reading.energy_mj is None:
        return replace(energy, opened=None)
    energy = _idle_before(energy, reading)
    opened = energy.opened
    if opened is None or opened.energy_mj is None or reading.energy_mj < opened.energy_mj:  # a reloaded driver's is new
        return replace(energy, opened=reading, busy_since_opened=reading.busy)
    energy = replace(energy, busy_since_opened=energy.busy_since_opened or reading.busy)
    duration_ns = reading.at_ns - opened.at_ns
    if duration_ns < WINDOW_NS:
        return energy
    total_mj = reading.energy_mj - opened.energy_mj
    owners_ns = (reading.attributed_ns - opened.attributed_ns, reading.nonbillable_ns - opened.nonbillable_ns)
    if opened.serving and reading.serving and not any(owners_ns) and not energy.busy_since_opened:
        energy = _idle_while_served(energy, total_mj * 10**9 // duration_ns)
    platform_mj, (attributed_mj, nonbillable_mj) = split_window(total_mj, duration_ns, energy.idle_mw, owners_ns)
    window = Window(duration_ns, total_mj, attributed_mj, platform_mj + nonbillable_mj)
    return replace(
        energy,
        opened=reading,
        busy_since_opened=reading.busy,
        attributed_mj=energy.attributed_mj + window.attributed_mj,
        platform_mj=energy.platform_mj + window.platform_mj,
        windows=energy.windows + 1,
        last=window,
    )


def _idle_before(energy: Energy, reading: Reading) -> Energy:
    """The power of a GPU that no engine has come to; the lowest of what was read."""
    energy = replace(energy, was_serving=energy.was_serving or reading.serving)
    if energy.was_serving or energy.idle_is_served or reading.power_mw is None:
        return energy
    known = energy.idle_mw
    return replace(energy, idle_mw=reading.power_mw if known is None else min(known, reading.power_mw))


def _idle_while_served(energy: Energy, mean_mw: int) -> Energy:
    if energy.idle_is_served and energy.idle_mw is not None:
        mean_mw = min(mean_mw, energy.idle_mw)
    return replace(energy, idle_mw=mean_mw, idle_is_served=True)
