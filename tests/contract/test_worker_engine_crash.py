"""The engine process dies or hangs under load: clients are told, the bill stays true, the service comes back."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rigs.enginekill import Client, bill_problems, kill_under_load, leaks, problems, seal
from rigs.engines import is_gone
from rigs.tinymodel import tiny_model
from rigs.worker import Ledger, until, worker

KILLS = 3
"""`make bench-engine-kill` kills fifty times in a row and prints what each of them took."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model = tiny_model(tmp_path_factory.mktemp("model"))
    return {"GPUMETER_MODEL_URI": f"file://{model}", "GPUMETER_MAX_MODEL_LEN": "4096"}


def test_kills_in_a_row_cost_their_requests_and_nothing_else(tmp_path: Path, environment: dict[str, str]) -> None:
    ledger, rounds = Ledger(), []
    with worker(tmp_path, environment) as process:
        process.ready()
        process.collect(ledger)  # so that the files of the journal's reader are open before the first count
        for number in range(KILLS):
            rounds.append(kill_under_load(process))
            assert problems(rounds[-1], "was killed by signal 9") == []
            assert process.metrics()['gpumeter_engine_restarts_total{reason="EngineRestarting"}'] == number + 1
            process.collect(ledger)
        seal(process, ledger)
    assert leaks(rounds) == []
    assert bill_problems(rounds, ledger) == []


def test_an_engine_that_hangs_in_a_step_is_told_killed_and_replaced(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    ledger, rounds = Ledger(), []
    with worker(tmp_path, environment | {"GPUMETER_STEP_TIMEOUT_MS": "2000"}) as process:
        process.ready()
        asking = threading.Thread(target=lambda: rounds.append(kill_under_load(process, number=signal.SIGSTOP)))
        asking.start()
        until(lambda: process.reason() == "EngineHung", "it says that it hung")
        refused = Client(process, stream=False)  # while the next engine loads
        refused.run()
        assert (refused.status, refused.error["code"]) == (503, "EngineHung")
        assert refused.error["message"].endswith("it is being started again")
        asking.join(240)
        assert process.reason() == "Ready"
        assert 2.0 < rounds[0].told_s < 6.0
        for client in rounds[0].clients:
            assert client.error["code"] == "engine_failed"
            assert "hung (no word for 2 s with work at hand) and was killed" in client.error["message"]
        assert process.metrics()['gpumeter_engine_restarts_total{reason="EngineHung"}'] == 1
        seal(process, ledger)
    assert bill_problems(rounds, ledger) == []


def test_a_worker_that_is_told_to_leave_while_its_engine_is_replaced_leaves_at_once(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    ledger = Ledger()
    with worker(tmp_path, environment) as process:
        process.ready()
        (engine,) = process.children()
        os.kill(engine, signal.SIGKILL)
        until(lambda: process.reason() == "EngineRestarting", "it says why it is not ready")
        until(lambda: process.children() not in ([], [engine]), "the next engine loads")
        (loading,) = process.children()
        told_s = time.monotonic()
        seal(process, ledger)
        assert time.monotonic() - told_s < 10
        assert is_gone(loading)
    ledger.check()


def test_the_engine_ends_with_a_worker_that_is_killed_though_it_hangs_itself(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with worker(tmp_path, environment) as process:
        process.ready()
        (engine,) = process.children()
        client = Client(process, stream=True)
        asking = threading.Thread(target=client.run)
        asking.start()
        until(lambda: client.chunks > 3, "steps run")
        os.kill(engine, signal.SIGSTOP)
        process.process.kill()
        process.process.wait()
        until(lambda: is_gone(engine), "the engine is gone", 10)
        asking.join(60)


def test_an_engine_is_quiet_when_idle_and_its_crash_is_told_in_lines_of_the_log(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with worker(tmp_path, environment) as process:
        process.ready()
        Client(process, stream=True, max_tokens=50).run()  # idle after work is another state than idle from the start
        (engine,) = process.children()
        before = _cpu_ticks(engine)
        time.sleep(3)
        assert _cpu_ticks(engine) - before <= 3  # of 300; OpenMP's threads may still go to sleep
        one = kill_under_load(process, streams=1, number=signal.SIGSEGV)  # the interpreter prints a stack of many lines
        assert "was killed by signal 11" in one.clients[0].error["message"]
        until(lambda: "Segmentation fault" in process.log, "the stack is in the log")
        lines = [json.loads(line) for line in process.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
