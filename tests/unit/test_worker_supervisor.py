"""The life of engines as their supervisor leads it, tried with processes that load no model."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from gpumeter_worker.engine.messages import Cancel, Ended, Event, Ready, StepReport
from gpumeter_worker.failure import StartupFailed
from gpumeter_worker.readiness import HUNG, RESTARTING, Loss
from gpumeter_worker.supervisor import Supervisor
from rigs.engines import is_gone, options, program
from rigs.worker import until as poll_until


class Told:
    """What a supervisor told the worker, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.losses: list[Loss] = []
        self.work = True

    def take(self, event: Event) -> None:
        self.events.append(event)

    def lose(self, loss: Loss) -> None:
        self.losses.append(loss)

    @property
    def starts(self) -> int:
        return sum(isinstance(event, Ready) for event in self.events)


@asynccontextmanager
async def supervised(
    command: tuple[str, ...],
    step_timeout_ms: int = 0,
    start_timeout_ms: int = 0,
    told: Told | None = None,
) -> AsyncIterator[tuple[Supervisor, Told]]:
    told = told or Told()
    supervisor = Supervisor(
        told.take,
        told.lose,
        has_work=lambda: told.work,
        sequences_max=8,
        step_timeout_ms=step_timeout_ms,
        start_timeout_ms=start_timeout_ms,
        program=command,
    )
    running = asyncio.create_task(supervisor.run(options()))
    supervisor_run[supervisor] = running
    try:
        yield supervisor, told
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError, StartupFailed):
            await running
        del supervisor_run[supervisor]


supervisor_run: dict[Supervisor, "asyncio.Task[None]"] = {}


async def until(what: Callable[[], object], why: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, why
        await asyncio.sleep(0.01)


async def failure(supervisor: Supervisor) -> StartupFailed:
    with pytest.raises(StartupFailed) as raised:
        await asyncio.wait_for(asyncio.shield(supervisor_run[supervisor]), 60)
    return raised.value


SERVES = """
    ready()
    while True:
        command = channel.receive()
        step(Token(command.session_id, 0, 1))
"""


async def test_an_engine_that_served_is_replaced_at_once_as_often_as_it_is_lost(tmp_path: Path) -> None:
    async with supervised(program(tmp_path, SERVES)) as (supervisor, told):
        for number in range(7):
            await until(lambda number=number: told.starts == number + 1, "it is ready")
            assert supervisor.loss is None
            supervisor.send(Cancel(f"s-{number}"))
            await until(
                lambda number=number: sum(isinstance(one, StepReport) for one in told.events) == number + 1, "a step"
            )
            os.kill(supervisor.pid, signal.SIGKILL)
            await until(lambda number=number: len(told.losses) == number + 1, "the loss is told")
            assert supervisor.ready is None
            assert supervisor.loss == Loss(RESTARTING, "the engine process was killed by signal 9")
            # One that had finished no step would make its successor wait for 30 s by the seventh time.
            await until(lambda: not supervisor.lost.is_set(), "the next one starts", timeout_s=20)


async def test_engines_that_finish_no_step_make_the_next_one_wait_longer_and_longer(tmp_path: Path) -> None:
    times = tmp_path / "times"
    dying = program(tmp_path, f"open({str(times)!r}, 'a').write(f'{{time.monotonic()}} '); ready(); sys.exit(1)")
    async with supervised(dying) as (supervisor, told):
        await until(lambda: len(told.losses) == 4, "four were lost")
        assert supervisor.loss == Loss(RESTARTING, "the engine process ended with status 1")
    at_s = [float(one) for one in times.read_text().split()]
    assert at_s[2] - at_s[1] >= 1.0
    assert at_s[3] - at_s[2] >= 2.0


async def test_an_engine_that_ends_itself_says_why(tmp_path: Path) -> None:
    giving_up = program(tmp_path, "ready(); channel.send([Failed('the device failed in a step')]); sys.exit(1)")
    async with supervised(giving_up) as (_, told):
        await until(lambda: told.losses, "it is lost")
    assert told.losses[0] == Loss(RESTARTING, "the engine process ended itself (the device failed in a step)")


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(600)"])
async def test_an_engine_that_is_silent_with_work_at_hand_is_killed_and_replaced(tmp_path: Path, how: str) -> None:
    once = tmp_path / "once"
    hanging = program(
        tmp_path,
        f"""
        ready()
        step(Token("s", 0, 1))
        if not os.path.exists({str(once)!r}):
            open({str(once)!r}, "w").close()
            {how}
        while True:
            channel.receive()
            step(Token("s", 0, 1))
        """,
    )
    async with supervised(hanging, step_timeout_ms=1000) as (supervisor, told):
        await until(lambda: told.starts == 1, "it is ready")
        ready_s = time.monotonic()
        await until(lambda: told.losses, "it is taken for hung")
        assert time.monotonic() - ready_s >= 1
        assert told.losses == [Loss(HUNG, "the engine process hung (no word for 1 s with work at hand) and was killed")]
        told.work = False
        await until(lambda: told.starts == 2, "the next one serves")
        assert supervisor.loss is None


@pytest.mark.parametrize(
    ("before", "doing"), [("", "it started"), ("channel.send([PhaseEntered(Phase.LOAD, 1)])", "it loaded the model")]
)
async def test_an_engine_that_starts_and_then_does_nothing_is_killed_and_replaced(
    tmp_path: Path, before: str, doing: str
) -> None:
    once = tmp_path / "once"
    hanging = program(
        tmp_path,
        f"""
        if not os.path.exists({str(once)!r}):
            open({str(once)!r}, "w").close()
            {before or "pass"}
            time.sleep(600)
        ready()
        time.sleep(600)
        """,
    )
    async with supervised(hanging, start_timeout_ms=2000) as (supervisor, told):
        told.work = False
        await until(lambda: told.losses, "it is taken for hung")
        assert told.losses[0].reason == HUNG
        assert f"(nothing read and nothing done for 2 s while {doing}" in told.losses[0].how
        await until(lambda: told.starts == 1, "the next one serves")
        assert supervisor.loss is None


@pytest.mark.parametrize(
    "work", ["sum(range(4_000_000))", "file.read(2**18) or file.seek(0)", "held.append(bytearray(2**19))"]
)
async def test_an_engine_that_loads_slowly_and_gets_on_is_waited_for(tmp_path: Path, work: str) -> None:
    large = tmp_path / "weights"
    large.write_bytes(bytes(2**24))
    slow = program(
        tmp_path,
        f"""
        file, held, began_s = open({str(large)!r}, "rb", buffering=0), [], time.monotonic()
        while time.monotonic() - began_s < 3.5:
            {work}
            time.sleep(0.05)
        ready()
        time.sleep(600)
        """,
    )
    async with supervised(slow, start_timeout_ms=2000) as (_, told):
        told.work = False
        await until(lambda: told.starts == 1, "it is ready")
        assert told.losses == []


async def test_an_engine_that_waits_for_a_rank_that_loads_is_waited_for(tmp_path: Path) -> None:
    rank = "import time\nfile = open('/dev/zero', 'rb', buffering=0)\nwhile file.read(2**21): time.sleep(0.05)"
    waiting = program(
        tmp_path,
        f"""
        subprocess.Popen([sys.executable, "-c", {rank!r}])
        time.sleep(3.5)
        ready()
        time.sleep(600)
        """,
    )
    async with supervised(waiting, start_timeout_ms=2000) as (_, told):
        told.work = False
        await until(lambda: told.starts == 1, "it is ready")
        assert told.losses == []


async def test_an_event_that_cannot_be_handled_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Choking(Told):
        def take(self, event: Event) -> None:
            super().take(event)
            if isinstance(event, Cancel):
                raise RuntimeError("a defect")

    batch = program(
        tmp_path, "ready(); channel.send([Cancel('not an event'), Ended('s', Finish.STOP)]); time.sleep(600)"
    )
    async with supervised(batch, told=Choking()) as (_, told):
        await until(lambda: told.events and isinstance(told.events[-1], Ended), "what came after it arrives")
    assert "a message of the engine (Cancel) could not be handled" in caplog.text
    assert "a defect" in caplog.text


async def test_an_engine_that_hangs_says_where_its_threads_and_those_of_its_ranks_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rank = """
import faulthandler, signal, time
faulthandler.register(signal.SIGUSR2)
def a_rank_that_never_comes():
    print(flush=True)
    time.sleep(600)
a_rank_that_never_comes()
"""
    hanging = program(
        tmp_path,
        f"""
        import faulthandler
        faulthandler.register(signal.SIGUSR2)
        def a_kernel_that_never_returns():
            time.sleep(600)
        rank = subprocess.Popen([sys.executable, "-c", {rank!r}], stdout=subprocess.PIPE)
        rank.stdout.readline()
        ready()
        a_kernel_that_never_returns()
        """,
    )
    async with supervised(hanging, step_timeout_ms=1000) as (_, told):
        await until(lambda: told.losses, "it is taken for hung")
        await until(lambda: "a_kernel_that_never_returns" in caplog.text, "its stack is in the log")
        await until(lambda: "a_rank_that_never_comes" in caplog.text, "so is that of a rank")


async def test_an_engine_without_work_is_left_alone_however_silent(tmp_path: Path) -> None:
    async with supervised(program(tmp_path, SERVES), step_timeout_ms=1000) as (supervisor, told):
        told.work = False
        await until(lambda: told.starts == 1, "it is ready")
        await asyncio.sleep(2.5)  # longer than the bound and the looks that it takes
        supervisor.send(Cancel("s"))
        await until(lambda: any(isinstance(event, StepReport) for event in told.events), "it answers")
        assert told.losses == []


async def test_three_kills_while_loading_are_told_as_too_little_memory(tmp_path: Path) -> None:
    async with supervised(program(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")) as (supervisor, told):
        failed = await failure(supervisor)
        assert failed.reason == "OutOfMemory"
        assert "killed three times while it loaded the model" in failed.message
        assert len(told.losses) == 3


async def test_three_kills_of_a_rank_while_loading_are_told_as_too_little_memory_too(tmp_path: Path) -> None:
    lost = "channel.send([Failed('rank 1 of 2 was killed by signal 9', 9)]); sys.exit(1)"
    async with supervised(program(tmp_path, lost)) as (supervisor, told):
        assert (await failure(supervisor)).reason == "OutOfMemory"
        how = "the engine process ended itself (rank 1 of 2 was killed by signal 9)"
        assert told.losses == [Loss(RESTARTING, how)] * 3


async def test_a_rank_that_crashes_at_every_start_is_told_as_that(tmp_path: Path) -> None:
    lost = "channel.send([Failed('rank 1 of 2 was killed by signal 11', 11)] * 2); sys.exit(1)"
    async with supervised(program(tmp_path, lost)) as (supervisor, told):
        failed = await failure(supervisor)
        assert failed.reason == "EngineStartFailed"
        assert "rank 1 of 2 was killed by signal 11" in failed.message
        assert len(told.losses) >= 2, "who tells it twice has not failed twice"


async def test_a_start_that_fails_three_times_in_the_same_way_ends_the_worker_with_a_sentence(tmp_path: Path) -> None:
    failing = program(tmp_path, "channel.send([Failed('start-up raised KeyError')]); sys.exit(1)")
    async with supervised(failing) as (supervisor, told):
        failed = await failure(supervisor)
        assert failed.reason == "EngineStartFailed"
        assert "failed 3 times in a row before it was ready (start-up raised KeyError)" in failed.message
        assert len(told.losses) >= 2


async def test_starts_that_fail_in_different_ways_are_tried_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    body = f"""
        open({str(count)!r}, "a").write("x")
        if (number := len(open({str(count)!r}).read())) == 4:
            ready()
            channel.receive()
        channel.send([Failed(f"start-up raised {{'KeyError' if number % 2 else 'OSError'}}")])
        sys.exit(1)
        """
    async with supervised(program(tmp_path, body)) as (_, told):
        await until(lambda: told.starts == 1, "the fourth one serves")
        assert len(told.losses) == 3


async def test_three_starts_that_hang_are_told_as_what_they_are_and_not_as_too_little_memory(tmp_path: Path) -> None:
    hanging = program(
        tmp_path,
        """
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        channel.send([PhaseEntered(Phase.LOAD, 1)])
        time.sleep(600)
        """,
    )
    async with supervised(hanging, start_timeout_ms=1000) as (supervisor, told):
        failed = await failure(supervisor)
        assert failed.reason == HUNG
        assert failed.message.startswith("three starts of the engine in a row hung; the last time the engine process")
        assert "look at the model's volume" in failed.message
        assert [loss.reason for loss in told.losses] == [HUNG] * 3


async def test_a_loss_that_cannot_be_handled_is_followed_by_the_next_engine_all_the_same(tmp_path: Path) -> None:
    class Choking(Told):
        def lose(self, loss: Loss) -> None:
            self.losses.append(loss)
            raise RuntimeError("a defect")

    told = Choking()
    async with supervised(program(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"), told=told) as (supervisor, _):
        assert (await failure(supervisor)).reason == "OutOfMemory"
        assert len(told.losses) == 3


async def test_what_will_not_get_better_ends_the_worker_with_the_engines_words(tmp_path: Path) -> None:
    async with supervised(program(tmp_path, "channel.send([Fatal('ModelInvalid', 'why')])")) as (supervisor, _):
        assert (await failure(supervisor)).line == "ModelInvalid: why"


async def test_a_worker_that_leaves_starts_no_further_engine(tmp_path: Path) -> None:
    async with supervised(program(tmp_path, SERVES)) as (supervisor, told):
        await until(lambda: told.starts == 1, "it is ready")
        supervisor.leave()
        os.kill(supervisor.pid, signal.SIGKILL)
        await until(lambda: told.losses, "its loss is told")
        await asyncio.sleep(0.5)
        assert told.starts == 1
        assert supervisor.loss is None  # nothing is being started again


async def test_a_worker_that_ends_as_its_engine_is_gone_does_not_miss_that_it_is_to_end(tmp_path: Path) -> None:
    async with supervised(program(tmp_path, SERVES)) as (supervisor, told):
        await until(lambda: told.starts == 1, "it is ready")
        supervisor.leave()
        assert supervisor._link is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        await supervisor._link.gone()  # at the very moment at which the supervisor's own wait for it ends
        running = supervisor_run[supervisor]
        running.cancel()
        await asyncio.wait([running], timeout=30)
        missed = not running.done()
        running.cancel()
    assert not missed


WORKER = """
import os, socket, subprocess, sys, time
ours, theirs = socket.socketpair()
engine = subprocess.Popen(
    [sys.executable, "-m", "gpumeter_worker.engine.process", str(theirs.fileno()), str(os.getpid())],
    pass_fds=(theirs.fileno(),),
)
print(engine.pid, flush=True)
time.sleep(600)
"""


def test_an_engine_ends_with_its_worker_even_where_it_cannot_look_at_the_channel() -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    engine = int(worker.stdout.readline())
    try:
        poll_until(lambda: _catches(engine, signal.SIGUSR2), "it has asked the kernel, which comes before")
        os.kill(engine, signal.SIGSTOP)
        worker.kill()
        poll_until(lambda: is_gone(engine), "the engine is gone")
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()


def _catches(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (number - 1) & 1)
