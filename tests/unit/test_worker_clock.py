"""The ring of events without a GPU: its reuse, its order, its arithmetic, and a device that fails."""

from itertools import pairwise

import pytest

from gpumeter_worker.metering.clock import CudaClock, HostClock, StepTime
from rigs.events import DeviceLost, VirtualDevice

MS = 10**6
HOUR_NS = 3600 * 10**9


def clock_of(device: VirtualDevice, pairs: int = 4) -> CudaClock:
    return CudaClock(pairs, device.event, device.read)


def step(clock: CudaClock, device: VirtualDevice, duration_ns: int) -> None:
    clock.begin()
    device.work(duration_ns)
    clock.end()


def test_a_step_is_known_when_the_device_has_come_to_its_end_and_never_sooner() -> None:
    device = VirtualDevice()
    clock = clock_of(device)
    step(clock, device, 7 * MS)
    assert clock.harvest() == []
    device.now_ns += 6 * MS
    assert clock.harvest() == []
    device.finish()
    (found,) = clock.harvest()
    assert found.gpu_ns == 7 * MS
    assert found.ended_ns - found.started_ns == found.gpu_ns
    assert clock.harvest() == []
    assert device.synchronized == 0


def test_events_are_reused_and_no_step_is_lost_or_doubled() -> None:
    device = VirtualDevice()
    clock = clock_of(device)
    made = device.made
    found: list[StepTime] = []
    for number in range(1, 201):
        step(clock, device, number * 1000)
        if number % 3 == 0:
            device.finish()
        found += clock.harvest()
    device.finish()
    found += clock.harvest()
    assert [one.gpu_ns for one in found] == [number * 1000 for number in range(1, 201)]
    assert device.made == made
    assert clock.begun == 200
    assert device.synchronized == 0


def test_a_ring_that_is_full_waits_for_its_oldest_step_rather_than_losing_one() -> None:
    device = VirtualDevice()
    clock = clock_of(device, pairs=2)
    for number in range(1, 6):
        step(clock, device, number * MS)
    assert device.synchronized == 3
    device.finish()
    assert [one.gpu_ns for one in clock.harvest()] == [number * MS for number in range(1, 6)]


def test_steps_that_queue_keep_their_length_and_never_overlap() -> None:
    device = VirtualDevice()
    clock = clock_of(device, pairs=64)
    for _ in range(50):
        step(clock, device, 3 * MS + 17)
    device.finish()
    found = clock.harvest()
    assert {one.gpu_ns for one in found} == {3 * MS + 17}
    for one, other in pairwise(found):
        assert other.started_ns >= one.ended_ns
        assert other.ended_ns - one.ended_ns == 3 * MS + 17
    assert found[-1].ended_ns <= device.now_ns


def test_an_hour_without_an_idle_moment_is_added_up_to_the_nanosecond() -> None:
    """One `elapsed_time` over an hour is a quarter of a millisecond off; the steps' own are not."""
    device = VirtualDevice(launch_ns=0)
    clock = clock_of(device)
    began_ns = device.now_ns
    found: list[StepTime] = []
    duration_ns = 99_999_937
    step(clock, device, duration_ns)
    for _ in range(36_000 - 1):
        step(clock, device, duration_ns)  # the one before still runs
        device.now_ns += duration_ns
        found += clock.harvest()
    device.finish()
    found += clock.harvest()
    assert len(found) == 36_000
    # Float32 holds 99.999937 ms to 7.6 ns; 36,000 of them are as far off as one alone.
    assert abs(found[-1].ended_ns - began_ns - 36_000 * duration_ns) <= 36_000 * 4
    assert all(abs(one.gpu_ns - duration_ns) <= 4 for one in found)
    assert abs((found[-1].ended_ns - began_ns) - HOUR_NS) < 3 * MS


def test_idle_time_is_in_no_step_and_ties_the_clock_to_the_hosts_again() -> None:
    device = VirtualDevice(ppm=500)
    clock = clock_of(device)
    for _ in range(10):
        step(clock, device, 2 * MS)
        device.finish()
        (found,) = clock.harvest()
        assert found.gpu_ns == 2 * MS + 1000
        # A device whose clock is fast never claims an end that the host has not seen.
        assert device.now_ns - 10_000 <= found.ended_ns <= device.now_ns
        device.now_ns += 60 * 10**9


@pytest.mark.parametrize("ppm", [0, 40, -250])
def test_the_drift_of_the_devices_clock_is_told_in_parts_per_billion(ppm: int) -> None:
    device = VirtualDevice(ppm)
    clock = clock_of(device)
    for number in range(100):
        assert (clock.drift_ppb is None) == (number <= 10), "too little time has passed, or enough"
        step(clock, device, 5 * MS)
        device.finish()
        clock.harvest()
        device.now_ns += 10**9
    assert clock.drift_ppb == pytest.approx(ppm * 1000, abs=200)


def test_the_host_is_the_measure_and_has_no_drift() -> None:
    assert HostClock().drift_ppb is None


def test_a_step_that_failed_half_way_lasts_until_the_device_is_done_with_it() -> None:
    device = VirtualDevice()
    clock = clock_of(device)
    step(clock, device, 2 * MS)
    clock.begin()
    device.work(3 * MS)
    assert clock.abort()
    assert [one.gpu_ns for one in clock.harvest()] == [2 * MS, 3 * MS]
    step(clock, device, MS)
    device.finish()
    assert [one.gpu_ns for one in clock.harvest()] == [MS]


def test_a_step_that_failed_after_its_end_keeps_its_length() -> None:
    device = VirtualDevice()
    clock = clock_of(device)
    step(clock, device, 2 * MS)
    assert clock.abort()
    assert [one.gpu_ns for one in clock.harvest()] == [2 * MS]


def test_a_device_that_is_lost_tells_what_it_had_told_before_and_then_its_error() -> None:
    device = VirtualDevice()
    clock = clock_of(device, pairs=1)
    step(clock, device, 2 * MS)
    step(clock, device, 3 * MS)  # the ring is full: the first is read back here
    device.lost = True
    assert not clock.abort()
    assert [one.gpu_ns for one in clock.harvest()] == [2 * MS]
    with pytest.raises(DeviceLost):
        clock.harvest()


@pytest.mark.parametrize("clock", [HostClock(), clock_of(VirtualDevice())], ids=["host", "cuda"])
def test_forwards_that_overlap_are_refused(clock: HostClock | CudaClock) -> None:
    with pytest.raises(RuntimeError, match="had not begun"):
        clock.end()
    clock.begin()
    with pytest.raises(RuntimeError, match="inside another"):
        clock.begin()
    clock.end()


def test_a_device_whose_clock_runs_fast_never_has_a_step_end_in_the_future() -> None:
    device = VirtualDevice(ppm=5000)
    clock = clock_of(device, pairs=64)
    for _ in range(60):
        step(clock, device, 10 * MS)
    device.finish()
    found = clock.harvest()
    assert all(one.ended_ns <= device.now_ns for one in found)
    assert all(one.started_ns >= before.ended_ns for before, one in pairwise(found))
    assert {one.gpu_ns for one in found} == {10_050_000}
