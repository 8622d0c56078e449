"""CUDA events as a clock: nothing lost, nothing doubled, and agreement with the host's clock."""

import time
from itertools import pairwise

import pytest
import torch

from gpumeter_worker.metering.clock import CudaClock, StepTime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def work(size: int = 2048) -> torch.Tensor:
    matrix = torch.ones(size, size, device="cuda")
    for _ in range(8):
        matrix = matrix @ matrix.clamp(max=1e-3)
    return matrix


def harvest_all(clock: CudaClock) -> list[StepTime]:
    torch.cuda.synchronize()
    return clock.harvest()


def test_every_step_is_harvested_once_in_order() -> None:
    clock = CudaClock(pairs=4)
    found = []
    for _ in range(50):
        clock.begin()
        work(256)
        clock.end()
        found += clock.harvest()
    found += harvest_all(clock)
    assert len(found) == 50
    assert all(one.ended_ns <= other.ended_ns for one, other in pairwise(found))
    assert clock.harvest() == []


def test_steps_queued_behind_one_another_keep_their_length_and_never_overlap() -> None:
    work()
    torch.cuda.synchronize()
    clock = CudaClock()
    began_ns = time.monotonic_ns()
    for _ in range(20):  # launched without waiting: prompt chunks that sample nothing
        clock.begin()
        work()
        clock.end()
    found = harvest_all(clock)
    wall_ns = time.monotonic_ns() - began_ns
    total_ns = sum(step.gpu_ns for step in found)
    assert total_ns <= wall_ns
    for one, other in pairwise(found):
        assert other.started_ns >= one.ended_ns - 5_000
        assert abs(other.ended_ns - one.ended_ns - other.gpu_ns) <= max(50_000, other.gpu_ns // 20)
    # The device was busy nearly all of the time, and the events say so.
    assert total_ns >= 0.8 * (found[-1].ended_ns - found[0].started_ns)


def test_time_without_work_is_in_no_step() -> None:
    clock = CudaClock()
    for _ in range(3):
        clock.begin()
        work(256)
        clock.end()
        torch.cuda.synchronize()
        time.sleep(0.05)
    found = harvest_all(clock)
    assert sum(step.gpu_ns for step in found) < 100_000_000


def test_harvesting_never_waits_for_the_device() -> None:
    clock = CudaClock()
    clock.begin()
    work(8192)
    clock.end()
    began_ns = time.monotonic_ns()
    early = clock.harvest()
    assert early == [] or time.monotonic_ns() - began_ns < 5_000_000
    assert len(early + harvest_all(clock)) == 1
