"""The engine process when a step fails: what is reported before the end, and what is said of it."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from gpumeter_worker.engine.link import EngineLink
from gpumeter_worker.engine.messages import Cancel, Ended, Event, Failed, Shutdown, StepReport, Submit
from gpumeter_worker.engine.sequence import Finish, Sampling
from rigs.engines import options, stepping


async def told_by(command: tuple[str, ...], enough: Callable[[list[Event]], bool], *sessions: str) -> list[Event]:
    """What an engine says to a few requests, until it said enough or is lost. The first has run when others come."""
    events: list[Event] = []
    how: list[str] = []
    link = EngineLink(options(), 8, lambda _, said: events.extend(said), lambda _, said: how.append(said), command)

    async def until(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not how and not what():
            assert time.monotonic() < deadline, events
            await asyncio.sleep(0.001)

    try:
        for session in sessions:
            link.send(Submit(session, [1, 2, 3], Sampling(max_tokens=400, temperature=0)))
            await until(lambda: steps(events) > 0)
        await until(lambda: enough(events))
    finally:
        link.kill()
        await link.gone()
    return events


def steps(events: list[Event], *, failed: bool = False) -> int:
    """Steps that came to something, or those whose time is the platform's because they did not."""
    return sum(
        isinstance(event, StepReport) and all(part.recompute for part in event.parts) is failed for event in events
    )


async def test_an_exception_in_a_step_ends_the_engine_with_a_sentence_after_all_that_was_measured(
    tmp_path: Path,
) -> None:
    command = stepping(
        tmp_path,
        """
        def check(runner, plan):
            if runner.steps == 4:
                raise ValueError("the prompt was: a secret")
        """,
    )
    events = await told_by(command, lambda _: False, "s-1")
    assert (steps(events), steps(events, failed=True)) == (3, 1)
    assert isinstance(events[-1], Failed)
    assert events[-1].cause.startswith("a step raised ValueError at loop.py:")
    assert "secret" not in events[-1].cause


async def test_a_device_error_is_told_in_the_drivers_words(tmp_path: Path) -> None:
    command = stepping(
        tmp_path,
        """
        def check(runner, plan):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        """,
    )
    events = await told_by(command, lambda _: False, "s-1")
    assert events[-1] == Failed("the device failed in a step (CUDA error: an illegal memory access was encountered)")


async def test_a_step_without_memory_ends_one_request_and_the_engine_serves_on(tmp_path: Path) -> None:
    command = stepping(
        tmp_path,
        """
        def check(runner, plan):
            time.sleep(0.001)
            if len(plan) > 1:
                raise OutOfMemoryError("CUDA out of memory")
        """,
    )
    events = await told_by(command, lambda said: sum(isinstance(event, Ended) for event in said) == 2, "s-1", "s-2")
    ends = {event.session_id: event for event in events if isinstance(event, Ended)}
    assert ends["s-2"] == Ended("s-2", Finish.FAILED, 0, "the memory was too small for a step")
    assert ends["s-1"].finish is Finish.LENGTH
    assert (steps(events), steps(events, failed=True)) == (400, 1)
    assert not any(isinstance(event, Failed) for event in events)


async def test_steps_that_never_get_memory_end_the_engine(tmp_path: Path) -> None:
    command = stepping(
        tmp_path,
        """
        def check(runner, plan):
            time.sleep(0.001)
            if runner.steps > 200:
                raise OutOfMemoryError("CUDA out of memory")
        """,
    )
    events = await told_by(command, lambda _: False, *(f"s-{number}" for number in range(8)))
    failed = [event.session_id for event in events if isinstance(event, Ended) and event.finish is Finish.FAILED]
    assert len(failed) == 3
    assert events[-1] == Failed("the memory was too small for a step")


async def test_what_ended_with_the_last_command_is_still_told(tmp_path: Path) -> None:
    command = stepping(
        tmp_path,
        """
        def check(runner, plan):
            time.sleep(0.3)  # the cancel and the word to leave come while a step runs, and are read together
        """,
    )
    events: list[Event] = []
    link = EngineLink(options(), 8, lambda _, said: events.extend(said), lambda _, said: None, command)
    link.send(Submit("s-1", [1, 2, 3], Sampling(max_tokens=400, temperature=0)))
    deadline = time.monotonic() + 30
    while not steps(events):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)
    link.send(Cancel("s-1"))
    link.send(Shutdown())
    await link.gone()
    assert [event.finish for event in events if isinstance(event, Ended)] == [Finish.CANCELLED]
