"""The channel between the two processes: bounded both ways, and nothing of an engine is left behind."""

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from textwrap import dedent

import pytest

from gpumeter_worker.engine.channel import decode, encode
from gpumeter_worker.engine.ending import END_S
from gpumeter_worker.engine.group import alive
from gpumeter_worker.engine.link import EVENTS_MAX, EngineLink
from gpumeter_worker.engine.messages import Cancel, Event, Ready, StepReport, Token
from gpumeter_worker.engine.output import EngineOutput
from gpumeter_worker.metering.parts import Part
from rigs.engines import children, is_gone, options, program


class Heard:
    """What a link told, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.how: list[str] = []

    def on_events(self, _: EngineLink, events: Sequence[Event]) -> None:
        self.events += events

    def on_lost(self, _: EngineLink, how: str) -> None:
        self.how.append(how)


@asynccontextmanager
async def link(
    command: tuple[str, ...], sequences_max: int = 8, end_s: float = 60
) -> AsyncIterator[tuple[EngineLink, Heard]]:
    heard = Heard()
    made = EngineLink(options(), sequences_max, heard.on_events, heard.on_lost, command, end_s=end_s)
    try:
        yield made, heard
    finally:
        made.kill()
        await asyncio.wait_for(made.gone(), 30)


async def until(what: Callable[[], object], why: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, why
        await asyncio.sleep(0.01)


def test_a_report_comes_out_as_it_went_in() -> None:
    parts = (Part("s-1", 1, 2, True, 1, 3, 4, True), Part("s-2", 5, 6, False, 0))
    tokens = (Token("s-1", 1, 77, -0.25, ((7, -1.5), (8, -2.0))), Token("s-2", 0, 5))
    report = StepReport(1, 2, 3, parts, tokens, 4, 5)
    assert decode(encode([report])) == [report]
    assert [type(one) for one in decode(encode(report)).parts] == [Part, Part]
    assert [type(one) for one in decode(encode(report)).tokens] == [Token, Token]


async def test_an_event_loop_that_is_busy_makes_the_engine_wait_and_loses_nothing(tmp_path: Path) -> None:
    count = tmp_path / "count"
    flood = program(
        tmp_path,
        f"""
        padding = tuple(Token("s", 0, number) for number in range(256))
        sent = os.open({str(count)!r}, os.O_WRONLY | os.O_CREAT)
        for number in range(2000):
            step(Token("s", 0, number), *padding)
            os.pwrite(sent, b"%8d" % number, 0)
        """,
    )
    async with link(flood) as (made, heard):
        await until(lambda: made.received > 0, "the engine sends")
        stands, seen = 0, -1
        while stands < 20:  # the loop does not turn while this thread sleeps
            time.sleep(0.05)  # noqa: ASYNC251
            now = int(count.read_text() or 0)
            stands, seen = (stands + 1 if now == seen else 0), now
        assert made.unhandled <= EVENTS_MAX
        assert seen < 1000, "the engine waits with most of its reports unsent"
        await until(lambda: heard.how, "everything was handled")
    assert [event.tokens[0].token for event in heard.events if isinstance(event, StepReport)] == list(range(2000))
    assert heard.how == ["ended with status 0"]


async def test_an_engine_that_takes_no_commands_is_killed_before_they_pile_up(tmp_path: Path) -> None:
    async with link(program(tmp_path, "time.sleep(600)"), sequences_max=2) as (made, heard):
        for number in range(20_000):
            made.send(Cancel(f"s-{number}" * 20))
            if number % 100 == 0:
                await asyncio.sleep(0.001)
            if heard.how:
                break
        await until(lambda: heard.how, "it was killed")
        assert made.unsent <= 4 * 2 + 16
    assert heard.how == ["was killed by signal 9"]


async def test_everything_that_was_sent_before_a_kill_comes_before_the_loss(tmp_path: Path) -> None:
    dying = program(
        tmp_path,
        """
        ready()
        for number in range(10):
            step(Token("s", 0, number))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    async with link(dying) as (_, heard):
        await until(lambda: heard.how, "it is lost")
        assert isinstance(heard.events[2], Ready)
        assert [event.tokens[0].token for event in heard.events[3:] if isinstance(event, StepReport)] == list(range(10))
    assert heard.how == ["was killed by signal 9"]


async def test_a_process_that_closes_its_channel_and_stays_is_told_at_once_and_ended(tmp_path: Path) -> None:
    async with link(program(tmp_path, "channel.close(); time.sleep(600)"), end_s=END_S) as (made, heard):
        await until(lambda: heard.how, "clients are told", timeout_s=10)
        assert heard.how == ["closed its channel and did not end"]
        assert made.killed_by == 0, "it was ended by us"
        await asyncio.wait_for(made.gone(), 10)
        assert is_gone(made.pid)


async def test_what_an_engine_started_ends_with_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    parent = program(
        tmp_path,
        f"""
        started = subprocess.Popen(["sleep", "600"])
        open({str(child)!r}, "w").write(str(started.pid))
        ready()
        time.sleep(600)
        """,
    )
    async with link(parent) as (made, heard):
        await until(lambda: heard.events, "it is ready")
        made.kill()
        await asyncio.wait_for(made.gone(), 30)
        await until(lambda: is_gone(int(child.read_text())), "its child is gone")


async def test_an_engine_is_not_gone_while_one_of_its_ranks_still_ends(tmp_path: Path) -> None:
    rank = tmp_path / "rank"
    parent = program(
        tmp_path,
        f"""
        started = subprocess.Popen(["sleep", "600"])
        open({str(rank)!r}, "w").write(str(started.pid))
        ready()
        time.sleep(600)
        """,
    )
    held = True
    asked: list[int] = []

    def ending_late(group: int) -> list[int]:  # a driver holds it for a while, which no test can have a kernel do
        asked.append(group)
        return [int(rank.read_text())] if held else alive(group)

    heard = Heard()
    made = EngineLink(options(), 8, heard.on_events, heard.on_lost, parent, alive_of=ending_late)
    try:
        await until(lambda: heard.events, "it is ready")
        assert made.left == ()
        made.kill()
        await until(lambda: heard.how and len(asked) > 3, "clients are told before it is gone")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(made.gone(), 0.2)
        assert made.left == [int(rank.read_text())], "who is stuck can be told"
    finally:
        held = False
        made.kill()
        await asyncio.wait_for(made.gone(), 30)
    assert set(asked) == {made.pid}
    assert made.left == ()
    assert is_gone(int(rank.read_text()))


def test_a_process_is_alive_while_any_of_its_threads_is_and_a_zombie_is_not() -> None:
    last_thread = """
        import ctypes, os, sys, threading, time
        threading.Thread(target=time.sleep, args=(600,)).start()
        print(flush=True)
        sys.stdin.read(1)
        ctypes.CDLL(None).pthread_exit(None)  # the first thread alone
        """
    first = Popen(["sleep", "600"], process_group=0)
    second = Popen(
        [sys.executable, "-c", dedent(last_thread)], process_group=first.pid, stdin=PIPE, stdout=PIPE, bufsize=0
    )
    try:
        assert second.stdin is not None and second.stdout is not None
        second.stdout.read(1)
        assert alive(first.pid) == sorted([first.pid, second.pid])
        second.stdin.write(b"x")
        deadline = time.monotonic() + 30
        while not is_gone(second.pid):
            assert time.monotonic() < deadline, "its first thread is a zombie"
            time.sleep(0.01)
        assert second.pid in alive(first.pid)
        second.kill()
        first.kill()
        while alive(first.pid):
            assert time.monotonic() < deadline, "zombies that nobody has buried are not alive"
            time.sleep(0.01)
        assert {first.pid, second.pid} <= set(children(os.getpid()))
    finally:
        for process in (second, first):
            process.kill()
            process.communicate()


async def test_what_an_engine_prints_becomes_lines_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING, "gpumeter_worker.engine.output")
    printing = program(
        tmp_path,
        """
        print("a library says something")
        print('{"time": "2026-01-01", "message": "its own line"}', file=sys.stderr)
        os.write(2, b"x" * 100_000)
        os.write(2, b"no newline at the end")
        """,
    )
    async with link(printing) as (made, _):
        await asyncio.wait_for(made.gone(), 30)
    told = [record.getMessage() for record in caplog.records if record.name == "gpumeter_worker.engine.output"]
    assert told[0] == "a library says something"
    assert "".join(told[1:]) == "x" * 100_000 + "no newline at the end"
    assert max(map(len, told)) < 100_000
    assert capfd.readouterr().err.splitlines() == ['{"time": "2026-01-01", "message": "its own line"}']


async def test_an_output_that_ends_before_the_loop_looks_at_it_is_told_whole_and_closed_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = EngineOutput()
    os.write(output.target, b"last words")
    output.started()  # nobody else holds it: the next read finds its end
    output.close()
    output.close()
    told = [record.getMessage() for record in caplog.records if record.name == "gpumeter_worker.engine.output"]
    assert told == ["last words"]


async def test_an_engine_that_cannot_be_started_leaves_nothing_open(tmp_path: Path) -> None:
    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()  # what earlier tests left open is closed now, and not while it is counted
    before = held()
    for _ in range(3):
        with pytest.raises(OSError, match="no-such-program"):
            EngineLink(options(), 8, lambda *_: None, lambda *_: None, (str(tmp_path / "no-such-program"),))
    assert held() <= before


async def test_engines_one_after_the_other_leave_no_thread_file_or_zombie(tmp_path: Path) -> None:
    command = program(tmp_path, "ready(); time.sleep(600)")

    def held() -> tuple[int, int]:
        task, opened = Path("/proc/self/task"), Path("/proc/self/fd")
        return len(list(task.iterdir())), len(list(opened.iterdir()))

    counts = []
    for _ in range(8):
        async with link(command) as (made, heard):
            await until(lambda heard=heard: heard.events, "it is ready")
            os.kill(made.pid, signal.SIGKILL)
            await asyncio.wait_for(made.gone(), 30)
            assert made.pid not in children(os.getpid())
        await until(lambda: not counts or held() <= counts[0], f"{held()} as at first: {counts}")
        counts.append(held())
