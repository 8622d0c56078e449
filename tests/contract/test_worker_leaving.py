"""A worker's way out under the worst of circumstances, within the time that its pod has. Real processes."""

import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpumeter_operator.decide.spec import GRACE_AFTER_DRAIN_S
from gpumeter_usage.page import Page
from gpumeter_usage.record import ENDED, Kind, Status, parse
from gpumeter_worker.deadline import AFTER_DRAIN_S
from gpumeter_worker.metering.journalpages import Reader
from rigs.worker import Ledger, WorkerProcess, hop_token, model_path, session_id, until, worker

SECOND = 10**9

MOVABLE_CLOCK = """
import os, sys
from pathlib import Path
from gpumeter_worker.log import configure_logging
from gpumeter_worker.metering.clock import Anchor, process_started_ns
from gpumeter_worker.metering.journalfile import check_directory
from gpumeter_worker.serve import serve
from gpumeter_worker.settings import from_environment

started_ns, model, ahead_ns = process_started_ns(), Path(sys.argv[1]), Path(sys.argv[2])

def read_anchor():
    return Anchor(Anchor.now().offset_ns + int(ahead_ns.read_text()))

configure_logging()
settings = from_environment(os.environ)
check_directory(settings.journal_dir)
sys.exit(serve(settings, model, started_ns, [], read_anchor))
"""


@dataclass(frozen=True)
class Hung:
    """A worker that was told to leave while its engine hangs: its exit code, and how many seconds that took."""

    journal: Path
    session: str
    left: Future[tuple[int, float]]


@pytest.fixture(scope="module", autouse=True)
def hung(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hung]:
    """It takes all the time that it has, and no processor: the other tests of this file run meanwhile."""
    folder, hangs, ledger = tmp_path_factory.mktemp("hung"), session_id(), Ledger()
    patience = {"GPUMETER_DRAIN_TIMEOUT_MS": "1000", "GPUMETER_SEAL_GRACE_MS": "3600000"}
    with ThreadPoolExecutor(2) as threads, worker(folder, patience) as process:
        process.ready()
        threads.submit(_ask, process, hangs)
        until(lambda: (process.collect(ledger), ledger.of_session(hangs))[1], "a slice of it is in the ledger")
        (engine,) = process.children()
        os.kill(engine, signal.SIGSTOP)
        told_s = time.monotonic()
        process.send(signal.SIGTERM)

        def leaves() -> tuple[int, float]:
            return process.process.wait(180), time.monotonic() - told_s

        yield Hung(folder / "journal", hangs, threads.submit(leaves))


def test_the_pod_outlives_the_workers_deadline_and_its_last_responses() -> None:
    assert AFTER_DRAIN_S + 10 <= GRACE_AFTER_DRAIN_S


def test_a_request_is_not_aborted_five_seconds_after_sigterm(tmp_path: Path) -> None:
    events: list[bytes] = []
    with worker(tmp_path, {"GPUMETER_DRAIN_TIMEOUT_MS": "180000"}) as process:
        process.ready()
        asking = threading.Thread(target=_stream, args=(process, events))
        asking.start()
        until(lambda: len(events) > 2, "the stream runs", timeout_s=180)
        process.send(signal.SIGTERM)
        told_s = time.monotonic()
        until(lambda: process.reason() == "Draining", "it drains")
        until(lambda: time.monotonic() - told_s > 6, "servers that give a request five seconds would have cut it off")
        seen = len(events)
        until(lambda: len(events) > seen + 2 or not asking.is_alive(), "it is answered further", timeout_s=150)
        assert asking.is_alive() or b"[DONE]" in events[-1], "either it goes on, or it came to its own end"
    asking.join(30)


def test_a_clock_that_is_set_right_ends_the_boot_and_the_next_one_goes_by_it(tmp_path: Path) -> None:
    ledger, ahead = Ledger(), tmp_path / "ahead-ns"
    ahead.write_text(str(90 * SECOND))  # more than a ledger lets a record lie in its future
    command = (sys.executable, "-c", MOVABLE_CLOCK, str(model_path()), str(ahead))
    with worker(tmp_path, {"GPUMETER_SEAL_GRACE_MS": "60000"}, command) as process:
        until(lambda: _collected(process, ledger), "the first records are there")
        assert ledger.all()[0].ended_at > time.time_ns() + 60 * SECOND
        (tmp_path / "right").write_text("0")
        (tmp_path / "right").replace(ahead)
        until(lambda: process.reason() == "ClockJumped", "it says why it is not ready")
        until(lambda: (process.collect(ledger), ledger.all()[-1].kind is Kind.SEAL)[1], "the boot is sealed")
        assert process.process.wait(60) == 0
    assert ledger.all()[-1].status is Status.DRAINED
    assert "the node's clock was moved by -90.0 s" in process.log
    with worker(tmp_path, {}, command) as process:
        until(lambda: _collected(process, ledger) == 2, "a new boot writes")
        assert abs(ledger.all()[-1].ended_at - time.time_ns()) < 60 * SECOND
    ledger_boots = list(ledger.records.values())
    assert [records[-1].kind is Kind.SEAL for records in ledger_boots] == [True, False]


def test_an_engine_that_hangs_and_a_collector_that_is_away_do_not_outlast_the_pods_grace(hung: Hung) -> None:
    code, took_s = hung.left.result()
    assert code == 0
    assert took_s < 1 + GRACE_AFTER_DRAIN_S
    records = [parse(link.body) for link in _page(hung.journal).links]
    assert (records[-1].kind, records[-1].status) == (Kind.SEAL, Status.DRAINED)
    assert [record.status for record in records if record.session_id == hung.session][-1] in ENDED


def _collected(process: WorkerProcess, ledger: Ledger) -> int:
    """Of how many boots records were collected so far; the journal may not be open yet."""
    with suppress(OSError):
        process.collect(ledger)
    return len(ledger.records)


def _ask(process: WorkerProcess, session: str) -> None:
    with suppress(OSError):  # it is cut off; how is not what is asked here
        urllib.request.urlopen(_request(process, session), timeout=180).close()


def _stream(process: WorkerProcess, events: list[bytes]) -> None:
    request = _request(process, session_id(), stream=True)
    with suppress(OSError), urllib.request.urlopen(request, timeout=180) as answer:  # the worker is killed in the end
        for line in answer:
            events += [line] if line.startswith(b"data: ") else []


def _request(process: WorkerProcess, session: str, **more: object) -> urllib.request.Request:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 900}
    return urllib.request.Request(
        f"{process.url}/v1/chat/completions",
        json.dumps(body | {"ignore_eos": True} | more).encode(),
        {"Authorization": f"Bearer {hop_token(session=session)}", "Content-Type": "application/json"},
    )


def _page(journal: Path) -> Page:
    reader = Reader(journal, "pod-of-a-test", "team-a/smollm2")
    try:
        boot = reader.status().boots[-1]
        page = reader.page(boot.boot_id, boot.acknowledged_seq, 5000)
    finally:
        reader.close()
    assert page is not None
    return page
