"""A step that fails: who is ended for it, and that the others never notice."""

from collections.abc import Sequence as Row

import pytest

from gpumeter_worker.engine.blocks import Copy, PagedBlocks
from gpumeter_worker.engine.loop import Engine, Sampled
from gpumeter_worker.engine.messages import Ended, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.clock import HostClock, StepClock, StepTime

MESSAGE = "the memory was too small for a step"


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class DeviceError(RuntimeError):
    """What a kernel raises, as late as its results are read."""


class RandomRunner:
    """Gives each sequence the next number of its own source, and has no memory for more than `room` tokens a step."""

    def __init__(self) -> None:
        self.room = 1000
        self.unreadable = False

    def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
        clock.begin()
        drawn = [Sampled(int(work.sequence.random.random() * 10**6)) for work in plan if work.samples]
        if sum(work.count for work in plan) > self.room:
            raise OutOfMemoryError("CUDA out of memory")
        clock.end()
        if self.unreadable:
            raise DeviceError("CUDA error: device-side assert triggered")
        return drawn

    def copy(self, copies: Row[Copy]) -> None:
        raise AssertionError("nothing is shared here")


class LateClock(HostClock):
    """Knows of a step's end later, as a device does."""

    late = True

    def harvest(self) -> list[StepTime]:
        return [] if self.late else super().harvest()


def engine_of(runner: RandomRunner) -> Engine:
    return Engine(runner, HostClock(), Limits(8, 256), frozenset(), 512, PagedBlocks(128, 16, prefix=False))


def ask(name: str, prompt_tokens: int = 4) -> Submit:
    prompt = [len(name) + number for number in range(prompt_tokens)]
    return Submit(name, prompt, Sampling(max_tokens=20, temperature=1.0, seed=len(name)))


def drive(engine: Engine, turns: int = 1000) -> tuple[dict[str, list[int]], dict[str, Ended]]:
    """Turn until nothing is left to do; sheds what does not fit. The tokens and the end of each session."""
    tokens: dict[str, list[int]] = {}
    ended: dict[str, Ended] = {}
    while engine.busy and turns:
        turns -= 1
        try:
            events = engine.turn()
        except OutOfMemoryError:
            told = engine.shed(MESSAGE)
            assert told
            events = told
        for event in events:
            if isinstance(event, StepReport):
                for token in event.tokens:
                    tokens.setdefault(token.session_id, []).append(token.token)
            elif isinstance(event, Ended):
                assert event.session_id not in ended
                ended[event.session_id] = event
    return tokens, ended


def test_whoever_a_step_without_memory_took_in_is_ended_and_the_others_get_their_tokens() -> None:
    alone, _ = drive(with_sessions(engine_of(RandomRunner()), "a", "bb"))
    runner = RandomRunner()
    engine = with_sessions(engine_of(runner), "a", "bb")
    runner.room = 100
    tokens, _ = drive(engine, turns=5)
    engine.submit(ask("large", 150))
    more, ended = drive(engine)
    assert {name: tokens[name] + more[name] for name in tokens} == alone
    assert ended["large"] == Ended("large", Finish.FAILED, 0, MESSAGE)
    assert {name: one.finish for name, one in ended.items() if name != "large"} == {
        "a": Finish.LENGTH,
        "bb": Finish.LENGTH,
    }


def test_where_a_step_took_nobody_in_the_newest_is_ended() -> None:
    runner = RandomRunner()
    engine = with_sessions(engine_of(runner), "a", "bb", "ccc")
    drive(engine, turns=3)
    runner.room = 2
    _, ended = drive(engine)
    assert {name: one.finish for name, one in ended.items()} == {
        "ccc": Finish.FAILED,
        "a": Finish.LENGTH,
        "bb": Finish.LENGTH,
    }


def test_a_turn_that_fails_elsewhere_than_in_its_step_sheds_nobody() -> None:
    engine = with_sessions(engine_of(RandomRunner()), "a")
    drive(engine, turns=2)
    assert engine.shed(MESSAGE) is None


def test_whom_a_step_without_memory_ends_while_the_device_is_behind_is_told_of_after_the_step_before() -> None:
    class Staging(RandomRunner):
        def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
            if sum(work.count for work in plan) > self.room:
                raise OutOfMemoryError("CUDA out of memory")
            return super().run(plan, clock)

    runner, clock = Staging(), LateClock()
    engine = Engine(runner, clock, Limits(8, 256), frozenset(), 512, PagedBlocks(128, 16, prefix=False))
    engine.submit(ask("a"))
    assert engine.turn() == []
    runner.room = 100
    engine.submit(ask("large", 150))
    with pytest.raises(OutOfMemoryError):
        engine.turn()
    assert engine.shed(MESSAGE) == []  # somebody was ended, and nothing can be told before the step that runs
    clock.late = False
    _, ended = drive(engine)
    assert ended["large"] == Ended("large", Finish.FAILED, 0, MESSAGE)
    assert ended["a"].finish is Finish.LENGTH


def test_steps_that_were_finished_before_a_fault_are_still_reported() -> None:
    runner, clock = RandomRunner(), LateClock()
    engine = Engine(runner, clock, Limits(8, 256), frozenset(), 512, PagedBlocks(128, 16, prefix=False))
    engine.submit(ask("a"))
    assert engine.turn() == []
    runner.room = 0
    with pytest.raises(OutOfMemoryError):
        engine.turn()
    clock.late = False
    report, failed = engine.last_report()
    assert isinstance(report, StepReport)
    assert isinstance(failed, StepReport)
    assert [token.session_id for token in report.tokens] == ["a"]
    assert [token.session_id for token in failed.tokens] == []


@pytest.mark.parametrize("unreadable", [False, True], ids=["half-way", "when its tokens are read"])
def test_a_step_that_fails_is_booked_to_the_platform_as_far_as_it_was_measured(unreadable: bool) -> None:
    runner = RandomRunner()
    engine = with_sessions(engine_of(runner), "a", "bb")
    drive(engine, turns=2)
    runner.room, runner.unreadable = (1000, True) if unreadable else (1, False)
    with pytest.raises(DeviceError if unreadable else OutOfMemoryError):
        engine.turn()
    (report,) = engine.last_report()
    assert isinstance(report, StepReport)
    assert report.gpu_ns == report.ended_ns - report.started_ns > 0
    assert [(part.session_id, part.recompute, part.sampled, part.prompt_tokens) for part in report.parts] == [
        ("a", True, 0, 0),
        ("bb", True, 0, 0),
    ]


def test_after_a_failure_every_time_still_goes_to_its_own_step() -> None:
    runner, clock = RandomRunner(), LateClock()
    engine = Engine(runner, clock, Limits(8, 256), frozenset(), 512, PagedBlocks(128, 16, prefix=False))
    engine.submit(ask("a"))
    assert engine.turn() == []
    runner.unreadable = True  # after the clock's end: it has a time now that no step waited for
    with pytest.raises(DeviceError):
        engine.turn()
    runner.unreadable, clock.late = False, False
    engine.submit(ask("bb", 40))
    assert engine.stepping is False, "two steps are to be told of first"
    reports = [event for _ in range(2) for event in engine.turn() if isinstance(event, StepReport)]
    assert [[(part.session_id, part.new_tokens, part.recompute) for part in one.parts] for one in reports] == [
        [("a", 4, False)],
        [("a", 1, True)],
        [("a", 1, False), ("bb", 40, False)],
    ]


def test_a_step_that_fails_before_its_first_kernel_has_no_time() -> None:
    class Unstaged(RandomRunner):
        def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
            raise DeviceError("no pinned memory")

    engine = with_sessions(engine_of(Unstaged()), "a")
    with pytest.raises(DeviceError):
        engine.turn()
    assert engine.last_report() == []


def test_what_fails_on_a_device_that_tells_nothing_more_leaves_no_step_behind() -> None:
    class DeadClock(HostClock):
        def abort(self) -> bool:
            self._started_ns = None
            return False

    runner = RandomRunner()
    engine = Engine(runner, DeadClock(), Limits(8, 256), frozenset(), 512, PagedBlocks(128, 16, prefix=False))
    engine.submit(ask("a"))
    runner.room = 0
    with pytest.raises(OutOfMemoryError):
        engine.turn()
    runner.room = 1000
    (report,) = [event for event in engine.turn() if isinstance(event, StepReport)]
    assert [part.recompute for part in report.parts] == [False]


def with_sessions(engine: Engine, *names: str) -> Engine:
    for name in names:
        engine.submit(ask(name))
    return engine
