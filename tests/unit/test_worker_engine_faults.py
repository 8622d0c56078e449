"""A step that fails: who is ended for it, and that the others never notice."""

from collections.abc import Sequence as Row

import pytest

from gpumeter_worker.engine.blocks import Copy, PagedBlocks
from gpumeter_worker.engine.loop import Engine, Sampled
from gpumeter_worker.engine.messages import Ended, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.clock import HostClock, StepClock

MESSAGE = "the memory was too small for a step"


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class RandomRunner:
    """Gives each sequence the next number of its own source, and has no memory for more than `room` tokens a step."""

    def __init__(self) -> None:
        self.room = 1000

    def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
        clock.begin()
        drawn = [Sampled(int(work.sequence.random.random() * 10**6)) for work in plan if work.samples]
        if sum(work.count for work in plan) > self.room:
            raise OutOfMemoryError("CUDA out of memory")
        clock.end()
        return drawn

    def copy(self, copies: Row[Copy]) -> None:
        raise AssertionError("nothing is shared here")


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
            events = engine.shed(MESSAGE)
            assert events
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
    assert engine.shed(MESSAGE) == []


def test_steps_that_were_finished_before_a_fault_are_still_reported() -> None:
    class LateClock(HostClock):
        """Knows of a step's end one turn later, as a device does."""

        late = True

        def harvest(self) -> list:  # type: ignore[type-arg]
            return [] if self.late else super().harvest()

    runner, clock = RandomRunner(), LateClock()
    engine = Engine(runner, clock, Limits(8, 256), frozenset(), 512, PagedBlocks(128, 16, prefix=False))
    engine.submit(ask("a"))
    assert engine.turn() == []
    runner.room = 0
    with pytest.raises(OutOfMemoryError):
        engine.turn()
    clock.late = False
    (report,) = engine.last_report()
    assert isinstance(report, StepReport)
    assert [token.session_id for token in report.tokens] == ["a"]


def with_sessions(engine: Engine, *names: str) -> Engine:
    for name in names:
        engine.submit(ask(name))
    return engine
