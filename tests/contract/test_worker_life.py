"""A worker's life as a cluster sees it: killed, restarted, drained, refused. Real processes, the real model."""

import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import openai
import pytest

from gpumeter_usage.record import Kind, Status
from gpumeter_worker.metering.journal import Journal
from gpumeter_worker.metering.meter import Identity
from rigs.worker import COMMAND, Ledger, WorkerProcess, hop_token, model_path, session_id, until, worker

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@contextmanager
def endless_stream(process: WorkerProcess, session: str) -> Iterator[list[str]]:
    """A stream that runs until something ends it; the list grows by pieces and then holds how it ended."""
    seen: list[str] = []
    client = openai.OpenAI(base_url=f"{process.url}/v1", api_key=hop_token(session=session), max_retries=0, timeout=120)

    def read() -> None:
        try:
            for chunk in client.chat.completions.create(
                model="smollm2", messages=CAPITAL, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
            ):
                seen.extend(choice.delta.content or "" for choice in chunk.choices)
            seen.append("<end>")
        except Exception as error:  # whatever the client makes of it
            seen.append(f"<{type(error).__name__}: {error}>")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        until(lambda: len(seen) > 4, "the stream runs")
        yield seen
    finally:
        thread.join(120)


def test_killed_at_any_moment_the_next_boot_continues_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    ledger = Ledger()
    lost, kept = session_id(), session_id()
    with worker(tmp_path) as first:
        first.ready()
        with endless_stream(first, lost):
            until(lambda: (first.collect(ledger), ledger.of_session(lost))[1], "a slice of it is in the ledger")
            first.send(signal.SIGKILL)
            first.process.wait()
    in_ledger = [record.seq for record in ledger.all()]
    with worker(tmp_path, {"GPUMETER_DRAIN_TIMEOUT_MS": "3000"}) as second:
        until(lambda: second.reason() not in ("", "Starting") or len(_boots(second)) == 2, "the journal is open")
        second.collect(ledger, limit=3)  # in small pages, with the engine still loading
        until(
            lambda: (second.collect(ledger), len(_boots(second)) == 1 and len(ledger.records) == 2)[1],
            "the former boot is collected whole, and the first records of this one",
        )
        former, current = ledger.records.values()
        assert [record.seq for record in former][: len(in_ledger)] == in_ledger
        assert (former[-1].kind, former[-1].status) == (Kind.SEAL, Status.RECOVERED)
        assert former[-1].ended_at == max(record.ended_at for record in former[:-1] if record.kind is Kind.ACCOUNT)
        assert current[0].started_at > former[-1].ended_at
        assert ledger.ended(lost) is None  # it was cut off: its open slices are all that is known, and they are billed

        second.ready()
        # The engine alone is killed: its request fails at once, what was measured is kept, and it comes back.
        with endless_stream(second, kept) as seen:
            (engine,) = second.children()
            os.kill(engine, signal.SIGKILL)
            until(lambda: seen[-1].startswith("<"), "the client is told", timeout_s=5)
        assert "engine process was killed by signal 9" in seen[-1]
        assert second.reason() == "EngineRestarting"
        until(lambda: (second.collect(ledger), ledger.ended(kept))[1], "the failed session is in the ledger")
        assert ledger.ended(kept) is Status.FAILED
        assert sum(record.gpu_ns for record in ledger.of_session(kept)) > 0
        second.ready()

        # SIGTERM: what runs is cut off at the drain timeout, the chain sealed, the seal's acknowledgement awaited.
        cut = session_id()
        with endless_stream(second, cut) as seen:
            second.send(signal.SIGTERM)
            until(lambda: second.reason() == "Draining", "it drains")
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(
                    urllib.request.Request(
                        f"{second.url}/v1/chat/completions",
                        json.dumps({"model": "smollm2", "messages": CAPITAL}).encode(),
                        {"Authorization": f"Bearer {hop_token()}"},
                    ),
                    timeout=30,
                )
            assert (refused.value.code, refused.value.headers["Retry-After"]) == (503, "1")
            refused.value.close()
            until(lambda: all(boot.sealed for boot in second.status().boots), "it is sealed", timeout_s=120)
        assert "".join(seen)
        time_sealed = time.monotonic()
        assert second.process.poll() is None  # it waits for the acknowledgement
        second.collect(ledger)
        assert second.process.wait(30) == 0
        assert time.monotonic() - time_sealed < 25
    last = list(ledger.records.values())[-1][-1]
    assert (last.kind, last.status) == (Kind.SEAL, Status.DRAINED)
    assert ledger.ended(cut) in (Status.CANCELLED, Status.FINISHED)
    assert {record.account for record in ledger.all()} >= {"init", "load", "warmup", "attributed", "drain"}
    ledger.check(unmeasured_s=5)  # the step in which the engine was killed


def _boots(process: WorkerProcess) -> tuple[object, ...]:
    try:
        return process.status().boots
    except OSError:
        return ()


def test_sigterm_while_the_model_loads_seals_what_start_up_took(tmp_path: Path) -> None:
    ledger = Ledger()
    with worker(tmp_path) as process:
        until(lambda: _boots(process), "the journal is open")
        process.send(signal.SIGTERM)
        until(lambda: (process.collect(ledger), any(r.kind is Kind.SEAL for r in ledger.all()))[1], "it is sealed")
        assert process.process.wait(30) == 0
    assert ledger.all()[-1].status is Status.DRAINED
    assert sum(record.gpu_ns for record in ledger.all() if record.account == "init") > 0
    ledger.check()


def test_sigterm_while_the_journal_is_being_opened_waits_for_it_and_seals_what_start_up_took(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    Journal(tmp_path / "journal", Identity("pod-of-a-test", "former", "team-a/smollm2", "m", "cpu", "host"), 1).close()
    ledger = Ledger()
    with closing(sqlite3.connect(tmp_path / "journal" / "journal.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # nothing can be written, and so no boot begun
        with worker(tmp_path) as process:
            until(lambda: process.reason() == "Starting", "it listens, and waits for its journal")
            process.send(signal.SIGTERM)
            until(lambda: process.reason() == "Draining", "it was told")
            other.execute("ROLLBACK")
            until(lambda: (process.collect(ledger), len(ledger.records) == 2)[1], "both boots are collected")
            until(lambda: (process.collect(ledger), ledger.all()[-1].kind is Kind.SEAL)[1], "it is sealed")
            assert process.process.wait(30) == 0
    own = list(ledger.records.values())[-1]
    assert own[-1].status is Status.DRAINED
    assert sum(record.gpu_ns for record in own if record.account == "init") > 0
    assert sum(record.gpu_ns for record in own) == own[-1].ended_at - own[0].started_at


def test_sigterm_while_the_engine_warms_up_seals_what_start_up_took(tmp_path: Path) -> None:
    ledger = Ledger()
    with worker(tmp_path) as process:
        until(lambda: process.reason() in ("WarmingUp", "Ready"), "the engine warms up", timeout_s=240)
        told_s = time.monotonic()
        process.send(signal.SIGTERM)
        until(lambda: (process.collect(ledger), any(r.kind is Kind.SEAL for r in ledger.all()))[1], "it is sealed")
        assert process.process.wait(30) == 0
        assert time.monotonic() - told_s < 30
    assert ledger.all()[-1].status is Status.DRAINED
    sums = {name: sum(r.gpu_ns for r in ledger.all() if r.account == name) for name in ("init", "load", "warmup")}
    assert all(sums.values()), sums
    ledger.check()


def test_sigterm_as_early_as_it_can_be_heard_ends_the_worker_in_order(tmp_path: Path) -> None:
    with worker(tmp_path) as process:
        until(lambda: _catches(process.process.pid, signal.SIGTERM), "Python runs", timeout_s=30)
        process.send(signal.SIGTERM)
        assert process.process.wait(30) == 0
    assert "Traceback" not in process.log


def _catches(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (number - 1) & 1)


def test_an_engine_that_is_killed_three_times_while_it_loads_ends_the_worker_with_what_to_do(tmp_path: Path) -> None:
    with worker(tmp_path) as process:

        def killed() -> bool:
            for engine in process.children() if process.process.poll() is None else []:
                os.kill(engine, signal.SIGKILL)
            return process.process.poll() is not None

        until(killed, "the worker gives up", timeout_s=60)
        assert process.process.returncode == 3
        last_words = process.log.strip().splitlines()[-1]
        assert last_words.startswith("OutOfMemory: the engine was killed three times while it loaded the model")
    with worker(tmp_path) as process:  # what it cost to try is on disk: the next boot seals it
        ledger = Ledger()

        def sealed() -> bool:
            with suppress(OSError):  # pages are served before the journal can be written, and 503 is said until then
                process.collect(ledger)
            return any(record.kind is Kind.SEAL for record in ledger.all())

        until(sealed, "it is sealed")
        assert sum(record.gpu_ns for record in ledger.all() if record.account == "init") > 0


def test_without_an_acknowledgement_the_lease_ends_admission_and_one_brings_it_back(tmp_path: Path) -> None:
    ledger, running = Ledger(), session_id()
    with worker(tmp_path, {"GPUMETER_LEASE_TIMEOUT_MS": "6000"}) as process:
        until(lambda: process.reason() == "LeaseExpired", "the lease ran out", timeout_s=240)
        process.collect(ledger)
        assert process.reason() == "Ready"
        with endless_stream(process, running) as seen:
            until(lambda: process.reason() == "LeaseExpired", "the lease ran out in the middle of a stream")
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(
                    urllib.request.Request(
                        f"{process.url}/v1/chat/completions",
                        json.dumps({"model": "smollm2", "messages": CAPITAL}).encode(),
                        {"Authorization": f"Bearer {hop_token()}"},
                    ),
                    timeout=30,
                )
            assert (refused.value.code, refused.value.headers["Retry-After"]) == (503, "5")
            assert json.load(refused.value)["error"]["code"] == "LeaseExpired"
            refused.value.close()
            told = len(seen)
            until(lambda: len(seen) > told + 5, "what runs goes on")
            process.collect(ledger)
            until(lambda: process.reason() == "Ready", "an acknowledgement brings it back")
            assert not seen[-1].startswith("<"), "the stream was never cut off"
            assert ledger.of_session(running)
            process.send(signal.SIGKILL)  # nobody waits for its end


def test_a_damaged_journal_keeps_the_worker_up_but_not_ready(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "journal.sqlite").write_bytes(b"this was never a database" * 100)
    with worker(tmp_path) as process:
        until(lambda: process.reason() == "JournalUnusable", "it says why")
        assert process.children() == []  # no engine is started for what could not be billed
        process.send(signal.SIGTERM)
        assert process.process.wait(30) == 0
    assert (tmp_path / "journal" / "journal.sqlite").read_bytes().startswith(b"this was never")


def refused(tmp_path: Path, **environment: str) -> tuple[str, float]:
    """Start a worker that cannot serve; its last line and how long it took."""
    (tmp_path / "credentials").mkdir(exist_ok=True)
    for name in ("usage-token", "hop-key"):
        (tmp_path / "credentials" / name).write_text("x" * 32)
    own = {
        "PATH": os.environ["PATH"],
        "GPUMETER_SERVICE": "team-a/smollm2",
        "GPUMETER_SERVICE_UID": "uid",
        "GPUMETER_WORKER_UID": "pod",
        "GPUMETER_MODEL_URI": f"file://{model_path()}",
        "GPUMETER_JOURNAL_DIR": str(tmp_path / "journal"),
        "GPUMETER_MODEL_CACHE": str(tmp_path / "cache"),
        "GPUMETER_CREDENTIALS_DIR": str(tmp_path / "credentials"),
        "GPUMETER_HTTP_PORT": "0",
        "GPUMETER_USAGE_PORT": "0",
    }
    started = time.monotonic()
    done = subprocess.run(
        [COMMAND, "serve"], env=own | environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 3, done.stderr
    return done.stderr.strip().splitlines()[-1], time.monotonic() - started


def test_a_missing_model_is_told_before_anything_slow_is_started(tmp_path: Path) -> None:
    line, took_s = refused(tmp_path, GPUMETER_MODEL_URI="file:///nowhere/model")
    assert line == "ModelNotFound: there is no model directory /nowhere/model; check spec.model.uri and its volume"
    assert took_s < 10  # a second on an idle machine; torch alone takes longer than this to import on a busy one


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU, so that none can be missing")
def test_a_missing_gpu_is_told_and_the_cpu_is_never_used_instead(tmp_path: Path) -> None:
    line, took_s = refused(tmp_path, GPUMETER_GPU_COUNT="1")
    assert line.startswith("GpuNotFound: 1 GPU was asked for and this container has none")
    assert took_s < 10


def test_every_wrong_setting_is_told_at_once(tmp_path: Path) -> None:
    line, _ = refused(tmp_path, GPUMETER_DTYPE="int4", GPUMETER_MAX_BATCH_SIZE="many", GPUMETER_GPU_COUNT="two")
    assert line.startswith("SettingsInvalid: ")
    for name in ("GPUMETER_DTYPE", "GPUMETER_MAX_BATCH_SIZE", "GPUMETER_GPU_COUNT"):
        assert name in line


def test_a_source_that_is_not_supported_is_told_with_what_is(tmp_path: Path) -> None:
    line, _ = refused(tmp_path, GPUMETER_MODEL_URI="ftp://host/model")
    assert line.startswith("ModelSourceUnsupported: ftp:// is not a model source")
    assert "use hf://" in line


def test_a_journal_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line, _ = refused(tmp_path, GPUMETER_JOURNAL_DIR=str(tmp_path / "file" / "journal"))
    assert line.startswith("JournalUnusable: the journal directory")


def test_a_model_of_an_unknown_kind_ends_with_a_reason_and_no_stack_trace(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_path().iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((model_path() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-kind"}))
    line, _ = refused(tmp_path, GPUMETER_MODEL_URI=f"file://{folder}")
    assert line.startswith("ArchitectureUnknown: ")
    assert "no-such-kind" in line


def test_a_hub_that_cannot_be_reached_is_told_with_what_to_check(tmp_path: Path) -> None:
    line, _ = refused(tmp_path, GPUMETER_MODEL_URI="hf://nobody/nothing", HF_HUB_OFFLINE="1")
    assert line.startswith("ModelSourceUnreachable: ")
    assert "HF_HUB_OFFLINE" in line


def test_dev_is_refused_where_the_operator_started_the_worker() -> None:
    done = subprocess.run(
        [COMMAND, "serve", "--dev", "--model", "file:///x"],
        env={"PATH": os.environ["PATH"], "HOME": "/tmp", "GPUMETER_SERVICE_UID": "uid"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3
    assert "--dev is refused because the operator started this worker" in done.stderr


def test_diagnose_prints_what_it_found_as_a_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [COMMAND, "diagnose", "--dev", "--model", f"file://{model_path()}"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    rows = {words[0]: words[1:] for line in done.stdout.splitlines() if (words := line.split(maxsplit=2))}
    assert done.returncode == 0, done.stdout
    assert rows["device"] == ["ok", "the CPU, as asked for"]
    assert rows["model"][0] == "ok"
