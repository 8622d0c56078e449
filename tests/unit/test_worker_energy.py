"""The energy estimate: nothing lost or made up, idle power to the platform, the rest by measured time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumeter_worker.metering.energy import Energy, Reading, Window, read, split_window

S = 10**9


def reading(  # noqa: PLR0917
    at_s: float,
    energy_j: float | None,
    attributed_s: float = 0,
    nonbillable_s: float = 0,
    power_w: float | None = None,
    serving: bool = True,
    busy: bool = False,
) -> Reading:
    return Reading(
        at_ns=int(at_s * S),
        energy_mj=None if energy_j is None else int(energy_j * 1000),
        power_mw=None if power_w is None else int(power_w * 1000),
        attributed_ns=int(attributed_s * S),
        nonbillable_ns=int(nonbillable_s * S),
        serving=serving,
        busy=busy,
    )


def fold(*readings: Reading) -> Energy:
    energy = Energy()
    for one in readings:
        energy = read(energy, one)
    return energy


def test_idle_power_is_the_platforms_and_the_rest_goes_by_measured_time() -> None:
    # 10 s at 300 W, of which 70 W are idle: 2,300 J go to 4 s and 1 s of measured time.
    assert split_window(3_000_000, 10 * S, 70_000, [4 * S, S]) == (700_000, [1_840_000, 460_000])


def test_a_window_in_which_nothing_was_measured_is_the_platforms() -> None:
    assert split_window(900_000, 10 * S, 70_000, [0, 0]) == (900_000, [0, 0])
    assert split_window(900_000, 10 * S, 70_000, []) == (900_000, [])


def test_while_no_idle_power_is_known_nobody_but_the_platform_gets_anything() -> None:
    assert split_window(900_000, 10 * S, None, [5 * S]) == (900_000, [0])


def test_a_gpu_that_drew_less_than_idle_leaves_nothing_to_share() -> None:
    assert split_window(500, 10 * S, 70_000, [5 * S]) == (500, [0])


@given(
    total=st.integers(0, 10**12),
    duration=st.integers(0, 10**11),
    idle=st.none() | st.integers(0, 10**7),
    owners=st.lists(st.integers(0, 10**12), max_size=40),
)
def test_every_millijoule_has_one_owner(total: int, duration: int, idle: int | None, owners: list[int]) -> None:
    platform, shares = split_window(total, duration, idle, owners)
    assert platform + sum(shares) == total
    assert len(shares) == len(owners)
    assert min([platform, *shares]) >= 0
    assert all(share == 0 for share, owner in zip(shares, owners, strict=True) if owner == 0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        split_window(-1, 1, 0, [1])


def test_idle_power_is_first_what_was_read_before_the_engine_came_to_the_gpu() -> None:
    energy = fold(
        reading(0, 1000, power_w=55, serving=False),
        reading(1, 1055, power_w=52, serving=False),
        reading(2, 1200, power_w=190, serving=False),  # loading
    )
    assert (energy.idle_mw, energy.idle_is_served) == (52_000, False)


def test_then_it_is_the_lowest_window_in_which_a_ready_engine_ran_nothing() -> None:
    energy = fold(
        reading(0, 0, power_w=50, serving=False),
        reading(10, 900),
        reading(15, 1500),  # 120 W: it has just warmed up
        reading(20, 1950),  # 90 W: the cost of a loaded model
        reading(25, 2450),  # 100 W
    )
    assert (energy.idle_mw, energy.idle_is_served) == (90_000, True)


@pytest.mark.parametrize("kind", ["steps", "a session in flight"])
def test_a_window_with_work_in_it_tells_no_idle_power(kind: str) -> None:
    work = {"attributed_s": 0.1} if kind == "steps" else {"busy": True}
    energy = fold(reading(0, 0), reading(2, 100, **work), reading(5, 300, attributed_s=0.1))  # type: ignore[arg-type]
    assert energy.idle_mw is None
    assert energy.platform_mj == 300_000


def test_windows_last_five_seconds_at_least_and_sum_to_the_counter() -> None:
    steps = [
        reading(second, 70 + 250 * second, attributed_s=second / 2, nonbillable_s=second / 4) for second in range(60)
    ]
    energy = fold(reading(-10, 0, serving=False, power_w=60), *steps)
    assert energy.windows == 12  # 10 s before the first step, then eleven of five; the last four seconds are open
    assert energy.attributed_mj + energy.platform_mj == 70_000 + 250_000 * 55
    assert energy.last == Window(5 * S, 1_250_000, 633_333, 616_667)


def test_a_counter_that_starts_again_opens_a_new_window_and_nothing_is_negative() -> None:
    energy = fold(reading(0, 500), reading(4, 900), reading(5, 10), reading(10, 310))
    assert (energy.windows, energy.platform_mj) == (1, 300_000)


def test_a_gpu_that_tells_no_energy_has_no_estimate_and_a_gap_is_in_no_window() -> None:
    energy = fold(reading(0, None, attributed_s=0), reading(10, None, attributed_s=5))
    assert (energy.windows, energy.opened) == (0, None)
    energy = fold(reading(0, 0), reading(3, None), reading(6, 600), reading(12, 1200))
    assert (energy.windows, energy.platform_mj) == (1, 600_000)
