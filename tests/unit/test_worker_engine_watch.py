"""When an engine is taken for hung, and what a failed step says of itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumeter_worker.engine.faults import fault_of
from gpumeter_worker.engine.watch import LONGEST_NS, SHORTEST_NS, StepWatch

SECOND = 10**9
DURATIONS = st.integers(0, 10**12)


def looks(watch: StepWatch, seconds: int, *, received: int = 1, owes: bool = True, from_s: int = 1) -> int | None:
    """Look every second; after how many the engine is taken for hung."""
    for second in range(from_s, from_s + seconds):
        if watch.look(second * SECOND, received, owes=owes):
            return second
    return None


def test_an_engine_that_is_silent_with_work_at_hand_hangs_after_a_minute() -> None:
    assert looks(StepWatch(0, 64, 0), 300) == 62  # the first look only sees how much was said


def test_an_engine_without_work_may_be_silent_for_ever() -> None:
    assert looks(StepWatch(0, 64, 0), 10_000, owes=False) is None


def test_a_word_of_the_engine_ends_its_silence() -> None:
    watch = StepWatch(0, 64, 0)
    assert looks(watch, 50, received=1) is None
    assert looks(watch, 50, received=2, from_s=51) is None
    assert looks(watch, 100, received=2, from_s=101) == 112


def test_a_worker_that_was_stopped_itself_does_not_count_that_time() -> None:
    watch = StepWatch(0, 64, 0)
    assert looks(watch, 10) is None
    assert not watch.look(10_000 * SECOND, 1, owes=True)  # hours passed between two looks
    assert not watch.look(10_001 * SECOND, 1, owes=True)


def test_a_setting_replaces_the_measured_bound() -> None:
    watch = StepWatch(3 * SECOND, 2048, 0)
    watch.warmed_up(10**12)
    watch.step(10**12, 1)
    assert watch.timeout_ns == 3 * SECOND


def test_the_bound_is_twenty_times_the_slowest_step_at_its_full_size() -> None:
    watch = StepWatch(0, 2048, 500_000_000)
    watch.step(SECOND, 64)  # so 2048 tokens would take 32 s
    assert watch.timeout_ns == 640 * SECOND + 500_000_000
    watch.step(30 * SECOND, 2048)  # and did take less
    assert watch.timeout_ns == 640 * SECOND + 500_000_000
    watch.step(40 * SECOND, 2048)
    assert watch.timeout_ns == 800 * SECOND + 500_000_000


def test_a_decode_of_one_token_is_not_taken_for_a_sixtyfourth_of_a_chunk() -> None:
    watch = StepWatch(0, 64, 0)
    watch.step(SECOND, 1)
    assert watch.timeout_ns == SHORTEST_NS


def test_before_the_first_step_the_warm_up_is_what_is_known_and_a_compiler_may_work_again() -> None:
    watch = StepWatch(0, 64, 0)
    watch.warmed_up(5 * SECOND)
    assert watch.timeout_ns == 100 * SECOND
    watch.step(SECOND // 10, 64)
    assert watch.timeout_ns == SHORTEST_NS
    watch.warmed_up(300 * SECOND)  # compiled
    assert watch.timeout_ns == 300 * SECOND


@given(
    warm_up_ns=DURATIONS, steps=st.lists(st.tuples(DURATIONS, st.integers(1, 4096))), step_tokens=st.integers(1, 4096)
)
def test_the_bound_is_at_least_every_step_seen_and_never_beyond_its_limits(
    warm_up_ns: int, steps: list[tuple[int, int]], step_tokens: int
) -> None:
    watch = StepWatch(0, step_tokens, 0)
    watch.warmed_up(warm_up_ns)
    for took_ns, tokens in steps:
        watch.step(took_ns, tokens)
    assert SHORTEST_NS <= watch.timeout_ns <= LONGEST_NS
    assert watch.timeout_ns >= min(LONGEST_NS, max((took_ns for took_ns, _ in steps), default=0))


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class AcceleratorError(RuntimeError):
    """As torch 2.8 and later names it."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_step_without_memory_is_one_that_the_engine_survives(error: Exception) -> None:
    assert fault_of(error).memory


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported"),
        AcceleratorError("CUDA error: out of memory"),
        RuntimeError("cuBLAS error: CUBLAS_STATUS_EXECUTION_FAILED"),
    ],
)
def test_after_an_error_of_the_device_only_a_new_process_goes_on_and_the_sentence_says_which(error: Exception) -> None:
    fault = fault_of(error)
    assert not fault.memory
    assert fault.sentence == f"the device failed in a step ({str(error).splitlines()[0]})"


def test_a_defect_is_told_by_its_kind_and_place_and_never_by_a_text_that_may_quote_a_request() -> None:
    with pytest.raises(ValueError) as raised:
        StepWatch(0, 1, 0).step("a prompt", int("a prompt"))  # type: ignore[arg-type]
    fault = fault_of(raised.value)
    assert (fault.memory, fault.sentence) == (False, "a step raised ValueError")
    with pytest.raises(TypeError) as raised_inside:
        StepWatch(0, 1, 0).step("a prompt", None)  # type: ignore[arg-type]
    assert fault_of(raised_inside.value).sentence.startswith("a step raised TypeError at watch.py:")
