"""A real worker times planned steps before it is ready, and its records name the parameters that it found.

Whether a calibration is good enough depends on what else this machine does; that it is told, named and kept does not.
"""

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from apiserver import schema_of
from gpumeter_operator.adapters.starting import read
from gpumeter_usage.record import Account, Kind
from gpumeter_worker.metering.attribution import Costs, Rule
from gpumeter_worker.metering.calibration import Calibration, Fit, Quality, Subject
from gpumeter_worker.metering.profiles import Profiles, adopt
from rigs.tinymodel import tiny_model
from rigs.worker import USAGE_TOKEN, Ledger, WorkerProcess, hop_token, session_id, until, worker

STATUS = schema_of("inferenceservices")["properties"]["status"]["properties"]
COSTS = Costs(10**9, 2 * 10**9, 10**8, 10**6, 10**5)
QUALITY = Quality(steps=30, median_error_ppm=20_000, tail_error_ppm=90_000, explained_ppm=990_000)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model = tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    return {"GPUMETER_MODEL_URI": f"file://{model}", "GPUMETER_CALIBRATION_MS": "3000"}


@pytest.fixture
def calibrated(tmp_path: Path, environment: dict[str, str]) -> Iterator[WorkerProcess]:
    with worker(tmp_path, environment) as process:
        yield process.ready()


def profile(process: WorkerProcess, token: str = USAGE_TOKEN) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{process.usage}/usage/v1/profile", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def attribution(process: WorkerProcess) -> dict[str, str]:
    with urllib.request.urlopen(f"{process.url}/readyz", timeout=10) as answer:
        return json.load(answer)["attribution"]  # type: ignore[no-any-return]


def capacity(process: WorkerProcess) -> dict[str, Any]:
    with urllib.request.urlopen(f"{process.url}/readyz", timeout=10) as answer:
        return json.load(answer)["capacity"]  # type: ignore[no-any-return]


def complete(process: WorkerProcess, session: str) -> None:
    request = urllib.request.Request(
        f"{process.url}/v1/completions",
        json.dumps({"model": "smollm2", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}).encode(),
        {"Authorization": f"Bearer {hop_token(session=session)}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


def named(ledger: Ledger) -> set[str]:
    """The profiles that attributed time was split by."""
    return {record.profile_hash for record in ledger.all() if record.account == Account.ATTRIBUTED}


def test_records_name_a_profile_that_an_auditor_can_read_back_and_that_outlives_engine_and_worker(
    calibrated: WorkerProcess, tmp_path: Path, environment: dict[str, str]
) -> None:
    ledger, session = Ledger(), session_id()
    complete(calibrated, session)
    until(lambda: (calibrated.collect(ledger), ledger.ended(session))[1], "the session is in the ledger")
    document, told = profile(calibrated), attribution(calibrated)
    assert named(ledger) == {document["current"]}
    entry = next(one for one in document["profiles"] if one["hash"] == document["current"])
    assert sha256(json.dumps(entry["profile"], sort_keys=True, separators=(",", ":")).encode()).hexdigest() in named(
        ledger
    )
    assert told["reason"] == entry["reason"]
    assert told["message"] in calibrated.log, "the sentence is the same wherever it is told"
    good = told["reason"] == "Calibrated"
    sample = f'gpumeter_attribution_as_asked{{profile_hash="{entry["hash"]}",reason="{told["reason"]}"}}'
    assert calibrated.metrics()[sample] == int(good)
    if good:
        assert entry["profile"]["name"].startswith("knee-1 smollm2 ")
        assert entry["subject"]["dtype"] == "float32"
        assert entry["quality"]["steps"] >= 12
    else:  # this machine was busy: nothing is lost but the fineness of the split
        assert told["reason"] == "CalibrationPoor"
        assert entry["profile"]["name"] == "uncalibrated-host-1"
    warm_up_ns = sum(record.gpu_ns for record in ledger.all() if record.account == Account.WARMUP)
    assert warm_up_ns > 10**9, "calibrating is warm-up, and nobody's"

    (engine,) = calibrated.children()
    os.kill(engine, signal.SIGKILL)
    until(lambda: calibrated.children() not in ([], [engine]), "the next engine starts")
    calibrated.ready()
    again = session_id()
    complete(calibrated, again)
    until(lambda: (calibrated.collect(ledger), ledger.ended(again))[1], "the second session is in the ledger")
    calibrated.stop()
    kept = Profiles(tmp_path / "journal")
    kept.open()
    if not good:  # as a start on a quiet machine would have left it
        subject = Subject(**entry["subject"])
        kept.use(adopt(Calibration(subject, Fit(COSTS, QUALITY)), Rule.KNEE, "host", "smollm2"))
    expected = document["current"] if good else kept.current
    with worker(tmp_path, environment) as second:
        second.ready()
        assert attribution(second)["reason"] == "Calibrated"
        can = capacity(second)
        assert can["profileHash"] == expected
        assert {one["batchSize"] for one in can["batches"]} == {1, 2, 4, 8}
        assert read(json.dumps({"ready": True, "reason": "", "message": "", "capacity": can}).encode()).capacity == can
        assert set(can) <= set(STATUS["capacity"]["properties"]), "the status has a field for each"
        assert "planned steps in" not in second.log, "nothing is timed twice"
        last = session_id()
        complete(second, last)
        until(lambda: (second.collect(ledger), ledger.ended(last))[1], "the last session is in the ledger")
        found = profile(second)
    assert found["current"] == expected
    assert {record.profile_hash for record in ledger.of_session(last)} == {expected}
    assert named(ledger) <= {one["hash"] for one in found["profiles"]}
    ledger.check()
    assert any(record.kind is Kind.SESSION for record in ledger.all())


def test_by_tokens_nothing_is_timed_and_records_name_that_rule(tmp_path: Path, environment: dict[str, str]) -> None:
    ledger, session = Ledger(), session_id()
    with worker(tmp_path, environment | {"GPUMETER_ATTRIBUTION": "tokens"}) as process:
        process.ready()
        assert attribution(process)["reason"] == "ByTokens"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            profile(process, "somebody else's token")
        complete(process, session)
        until(lambda: (process.collect(ledger), ledger.ended(session))[1], "the session is in the ledger")
        document = profile(process)
        assert "planned steps" not in process.log
    (entry,) = document["profiles"]
    assert entry["profile"]["rule"] == "tokens"
    assert named(ledger) == {entry["hash"]}
