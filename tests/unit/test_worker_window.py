"""When a step starts: at once while the engine is busy; from idle after a while, or with enough company."""

from gpumeter_worker.engine.window import Window

MS = 10**6


def from_idle(max_wait_ms: int, sequences: int) -> Window:
    window = Window(max_wait_ms * MS, sequences)
    assert window.patience_ns(0, waiting=0, busy=False) is None
    return window


def test_with_nothing_to_do_it_waits_for_ever() -> None:
    window = from_idle(5, 4)
    assert window.patience_ns(10**12, waiting=0, busy=False) is None


def test_from_idle_the_first_waits_for_company_as_long_as_the_window_says() -> None:
    window = from_idle(5, 4)
    assert window.patience_ns(100 * MS, waiting=1, busy=False) == 5 * MS
    assert window.patience_ns(103 * MS, waiting=2, busy=False) == 2 * MS
    assert window.patience_ns(105 * MS, waiting=2, busy=False) == 0
    assert window.patience_ns(140 * MS, waiting=2, busy=False) == 0


def test_a_full_batch_waits_no_longer() -> None:
    window = from_idle(5, 4)
    assert window.patience_ns(100 * MS, waiting=3, busy=False) == 5 * MS
    assert window.patience_ns(101 * MS, waiting=4, busy=False) == 0


def test_while_the_engine_is_busy_a_step_starts_at_once() -> None:
    window = from_idle(5, 4)
    assert window.patience_ns(100 * MS, waiting=0, busy=True) == 0
    assert window.patience_ns(100 * MS, waiting=1, busy=True) == 0


def test_who_came_during_the_last_step_of_the_others_does_not_wait_again() -> None:
    window = from_idle(5, 4)
    window.patience_ns(100 * MS, waiting=1, busy=True)
    assert window.patience_ns(101 * MS, waiting=1, busy=False) == 0


def test_a_window_opens_anew_after_the_engine_was_idle() -> None:
    window = from_idle(5, 4)
    window.patience_ns(100 * MS, waiting=1, busy=False)
    window.patience_ns(105 * MS, waiting=0, busy=True)
    assert window.patience_ns(106 * MS, waiting=0, busy=False) is None
    assert window.patience_ns(200 * MS, waiting=1, busy=False) == 5 * MS


def test_a_window_whose_only_sequence_was_cancelled_closes() -> None:
    window = from_idle(5, 4)
    window.patience_ns(100 * MS, waiting=1, busy=False)
    assert window.patience_ns(101 * MS, waiting=0, busy=False) is None
    assert window.patience_ns(104 * MS, waiting=1, busy=False) == 5 * MS


def test_without_a_wait_the_first_step_starts_at_once() -> None:
    assert from_idle(0, 4).patience_ns(7, waiting=1, busy=False) == 0
