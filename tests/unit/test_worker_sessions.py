"""What the worker makes of an engine's messages: slow clients, and messages that it cannot use."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpumeter_usage.record import Status
from gpumeter_worker.api.sessions import LINE_ENTRIES_MAX, Choice, Session
from gpumeter_worker.engine.messages import Ended, StepReport, Token
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.parts import Part
from gpumeter_worker.settings import from_environment
from gpumeter_worker.worker import Worker

TOP = tuple((number, -1.0) for number in range(20))


@pytest.fixture
async def worker(tmp_path: Path) -> Worker:
    settings = from_environment({"HOME": str(tmp_path)}, dev=True, model="file:///models/none")
    return Worker(replace(settings, journal_dir=tmp_path / "journal"), time.monotonic_ns())


def session(worker: Worker, name: str) -> Session:
    made = Session(name, "acme", [Choice([1], Sampling(max_tokens=9))])
    worker.meter.begin(name, "acme", worker.anchor.utc_ns(made.begun_ns))
    worker.sessions.add(made)
    return made


def step(*parts: Part, tokens: tuple[Token, ...]) -> StepReport:
    now_ns = time.monotonic_ns()
    return StepReport(now_ns - 1000, now_ns, 1000, parts, tokens, len(parts), 1)


async def test_a_client_that_does_not_read_is_cut_off_and_what_it_used_stays_billed(worker: Worker) -> None:
    slow, quick = session(worker, "slow"), session(worker, "quick")
    steps = 0
    while slow.cut_off is None:
        parts = (Part("slow", 1, steps, False, 1), Part("quick", 1, steps, False, 1))
        worker._on_event(step(*parts, tokens=(Token("slow", 0, 5, -1.0, TOP), Token("quick", 0, 5))))
        quick.line.get_nowait()
        steps += 1
    assert steps == -(-LINE_ENTRIES_MAX // 21) + 1
    assert slow.line.entries < LINE_ENTRIES_MAX + 21
    worker._on_event(step(Part("slow", 1, steps, False, 1), tokens=(Token("slow", 0, 5, -1.0, TOP),)))
    assert slow.line.entries < LINE_ENTRIES_MAX + 21
    worker._on_event(Ended("slow", Finish.CANCELLED))
    assert slow.end is not None and slow.end.cut_off is not None
    assert slow.end.status is Status.CANCELLED
    assert slow.end.cut_off.code == "client_too_slow"
    assert slow.end.totals.completion_tokens == steps + 1
    assert slow.end.totals.gpu_ns > 0
    assert quick.end is None


async def test_a_line_that_is_read_forgets_what_it_held() -> None:
    line = Session("s", "acme", []).line
    for _ in range(3):
        line.put_nowait(Token("s", 0, 5, -1.0, TOP))
    assert line.entries == 63
    for _ in range(3):
        await line.get()
    assert line.entries == 0


async def test_a_message_that_cannot_be_used_ends_its_sessions_and_no_other(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    odd, other = session(worker, "odd"), session(worker, "other")
    worker._on_event(step(Part("odd", 1, 0, False, 1), tokens=(Token("odd", 7, 5),)))  # it has no choice 7
    assert odd.end is not None
    assert (odd.end.status, odd.end.message) == (Status.FAILED, "the worker failed while it served this request")
    assert odd.end.totals.gpu_ns > 0, "what it used is known and billed"
    assert "was not understood" in caplog.text
    assert other.end is None
    worker._on_event(Ended("other", Finish.STOP))
    assert other.end is not None
    assert other.end.status is Status.FINISHED
