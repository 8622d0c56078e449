"""The way out has one end, and a clock that was moved is told from one that drifts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumeter_worker.deadline import AFTER_DRAIN_S, Deadline, leave_by
from gpumeter_worker.metering.clock import Anchor

SECOND = 10**9
SECONDS = st.floats(0, 200)


@given(told_s=SECONDS, drain_s=SECONDS, limits_s=st.lists(SECONDS, max_size=10), late_s=SECONDS)
def test_steps_that_all_take_their_whole_limit_end_at_the_deadline(
    told_s: float, drain_s: float, limits_s: list[float], late_s: float
) -> None:
    deadline = leave_by(told_s, drain_s)
    now_s = told_s + late_s
    for limit_s in limits_s:
        left_s = deadline.left_s(now_s, limit_s)
        assert 0 <= left_s <= limit_s
        now_s += left_s
    assert now_s <= max(told_s + late_s, told_s + drain_s + AFTER_DRAIN_S) + 1e-6


def test_a_step_has_its_own_limit_while_there_is_time() -> None:
    assert Deadline(100).left_s(50, 20) == 20
    assert Deadline(100).left_s(90, 20) == 10
    assert Deadline(100).left_s(110, 20) == 0


@pytest.mark.parametrize("moved_s", [0, 1, -5, 5])
def test_a_leap_second_or_a_small_correction_is_no_jump(moved_s: int) -> None:
    assert Anchor(10**18).problem(Anchor(10**18 + moved_s * SECOND)) == ""


@pytest.mark.parametrize(("moved_s", "told"), [(6, "+6.0 s"), (-90, "-90.0 s")])
def test_a_clock_that_was_moved_is_told_with_how_far(moved_s: int, told: str) -> None:
    assert f"moved by {told} since this worker started" in Anchor(10**18).problem(Anchor(10**18 + moved_s * SECOND))


def test_a_process_reads_its_own_clocks_as_unmoved() -> None:
    assert Anchor.now().problem(Anchor.now()) == ""
