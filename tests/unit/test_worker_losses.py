"""What a whole worker makes of engines that are lost, cannot be taken in or cannot be started, with no model loaded."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from gpumeter_usage.record import Status
from gpumeter_worker.api.sessions import Choice, Session
from gpumeter_worker.engine.link import EngineLink
from gpumeter_worker.engine.messages import Event
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.failure import MODEL_SOURCE_UNREACHABLE, StartupFailed
from gpumeter_worker.loading import Loading
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.readiness import RESTARTING, Loss
from gpumeter_worker.serve import serve
from gpumeter_worker.settings import Settings, from_environment
from gpumeter_worker.sources.aside import fetch_aside
from gpumeter_worker.sources.location import Location
from gpumeter_worker.supervisor import Supervisor
from gpumeter_worker.worker import Worker
from rigs.engines import children, options, program


def settings(folder: Path) -> Settings:
    (folder / "journal").mkdir()
    read = from_environment({"HOME": str(folder)}, dev=True, model="file:///models/none")
    return replace(read, journal_dir=folder / "journal", http_port=0, usage_port=0, http_host="127.0.0.1")


@pytest.fixture
async def worker(tmp_path: Path) -> Worker:
    return Worker(settings(tmp_path), time.monotonic_ns())


def session(worker: Worker, name: str, *, metered: bool = True) -> Session:
    made = Session(name, "acme", [Choice([1], Sampling(max_tokens=9))])
    if metered:
        worker.meter.begin(name, "acme", worker.anchor.utc_ns(made.begun_ns))
    worker.sessions.add(made)
    return made


async def until(what: Callable[[], object], why: str) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline, why
        await asyncio.sleep(0.01)


async def test_an_engine_that_the_worker_cannot_take_in_is_replaced_and_takes_no_work(
    worker: Worker, tmp_path: Path
) -> None:
    once = tmp_path / "once"
    command = program(
        tmp_path,
        f"""
        from gpumeter_worker.metering.calibration import Calibration
        odd = None if os.path.exists({str(once)!r}) else Calibration(None, "no fit")
        open({str(once)!r}, "w").close()
        channel.send([PhaseEntered(Phase.LOAD, time.monotonic_ns())])
        channel.send([PhaseEntered(Phase.WARMUP, time.monotonic_ns())])
        at_ns = time.monotonic_ns()
        channel.send([Ready(at_ns, 1024, 8, 100, frozenset(), "none", "", "float32", 8192, calibration=odd)])
        time.sleep(600)
        """,
    )
    losses: list[Loss] = []
    ready_when_lost: list[bool] = []

    def lost(loss: Loss) -> None:
        losses.append(loss)
        worker._on_lost(loss)

    def take(event: Event) -> None:
        try:
            worker._on_event(event)
        except Exception:
            asyncio.get_running_loop().call_soon(lambda: ready_when_lost.append(worker.engine is not None))
            raise

    worker.engines = Supervisor(take, lost, has_work=lambda: False, sequences_max=8, program=command)
    running = asyncio.create_task(worker.engines.run(options()))
    try:
        await until(lambda: worker.meter.accounts.phase is Phase.SERVING, "the next one is taken in")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert losses == [Loss(RESTARTING, "the worker could not take the engine in (AttributeError; see its log)")]
    assert ready_when_lost == [False]


async def test_a_session_that_cannot_be_ended_with_its_engine_keeps_no_other_and_no_later_engine(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    odd, other = session(worker, "odd", metered=False), session(worker, "other")
    worker._on_lost(Loss(RESTARTING, "the engine process ended with status 1"))
    assert len(worker.sessions) == 0, "what is in flight is what the next engine owes"
    assert other.end is not None and odd.end is not None
    assert (other.end.status, other.end.message) == (
        Status.FAILED,
        "the engine process ended with status 1 while it served this request",
    )
    assert odd.end.status is Status.FAILED
    assert "session odd cannot be ended" in caplog.text


async def test_an_engine_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    command = program(tmp_path, "ready(); time.sleep(600)")
    launcher = tmp_path / "launcher"
    supervisor = Supervisor(
        lambda _: None, lambda _: None, has_work=lambda: False, sequences_max=8, program=(str(launcher), *command)
    )
    running = asyncio.create_task(supervisor.run(options()))
    try:
        await until(lambda: supervisor.loss, "the loss is told")
        assert supervisor.loss is not None
        assert supervisor.loss.reason == RESTARTING
        assert "the engine process cannot be started ([Errno 2] No such file or directory" in supervisor.loss.how
        (tmp_path / "written").write_text('#!/bin/sh\nexec "$@"\n')
        (tmp_path / "written").chmod(0o755)
        (tmp_path / "written").rename(launcher)
        await until(lambda: supervisor.ready, "the next one serves")
        assert supervisor.loss is None
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError, StartupFailed):
            await running


async def test_an_engine_without_a_thread_to_hear_it_is_ended_and_told_as_one_that_did_not_start(
    tmp_path: Path,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing of it is told")

    command = program(tmp_path, "time.sleep(600)")
    before = set(children(os.getpid()))
    former = threading.stack_size(2**46)  # more than any machine has an address for
    try:
        with pytest.raises(OSError, match="thread"):
            EngineLink(options(), 8, never, never, command)
    finally:
        threading.stack_size(former)
    assert set(children(os.getpid())) <= before, "it has ended and was waited for"


def test_an_error_that_nobody_knows_ends_the_worker_with_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    impossible = Path("no\0file")  # ValueError, which nothing on the way expects
    assert serve(settings(tmp_path), impossible, time.monotonic_ns(), []) == 3
    said = capfd.readouterr().err
    assert "WorkerFailed: the worker ended by an error of its own (ValueError: " in said
    assert "the worker ends" in caplog.text, "with its traceback"


def test_a_model_whose_files_cannot_be_counted_is_left_to_who_loads_it(tmp_path: Path) -> None:
    loading = Loading()
    loading.of(tmp_path / "away")
    assert loading.text(time.monotonic()) == ""


ANSWERS = {
    "no JSON": ("print('Segmentation fault')", "said something that is no answer (Segmentation fault)"),
    "no object": ("print('[1]')", "said something that is no answer ([1])"),
    "nothing that it says": ("print('{}')", "said something that is no answer ({})"),
    "a line without end": ("print('x' * 2**18)", "said something that is no answer (a line without end)"),
    "nothing at all": ("sys.exit(7)", "ended with status 7 and without a word"),
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_what_the_process_that_fetches_says_otherwise_is_told_in_a_sentence(tmp_path: Path, what: str) -> None:
    does, told = ANSWERS[what]
    with pytest.raises(StartupFailed) as failed:
        await _fetched(tmp_path, (sys.executable, "-c", f"import sys; sys.stdin.readline(); {does}"))
    assert failed.value.reason == MODEL_SOURCE_UNREACHABLE
    assert told in failed.value.message


async def test_a_process_for_fetching_that_cannot_be_started_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="the process that fetches hf://a/b cannot be started"):
        await _fetched(tmp_path, (str(tmp_path / "away"),))


async def _fetched(folder: Path, command: Sequence[str]) -> Path:
    location = Location("hf://a/b", "main", allow_pickle=False)
    return await asyncio.wait_for(fetch_aside(location, folder, "owner", lambda _: None, command), 30)
