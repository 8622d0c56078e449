from pathlib import Path
from typing import Any

from demo.audit import LATELY_NS, Run, lines_of, ns, runs_of, seconds, since_start, table
from demo.steps import kept_keys

MINUTE_NS = 60 * 10**9
START = "2026-11-21T14:05:00Z"


def pod(*states: dict[str, Any], devices: str = "2") -> dict[str, Any]:
    last, now = states if len(states) == 2 else ({}, *states)
    return {
        "metadata": {"name": "w", "annotations": {"gpumeter.io/devices": devices}},
        "status": {"containerStatuses": [{"name": "main", "lastState": last, "state": now}, {"name": "sidecar"}]},
    }


def report(tenant: str, gpu_ns: int, allocated: int = 0, phase: str = "Final", start: str = START) -> dict[str, Any]:
    end = start.replace("05:00Z", "06:00Z")
    status: dict[str, Any] = {"phase": phase, "gpuNanoseconds": str(gpu_ns)}
    if tenant == "_platform":
        status["accounts"] = {"allocated": str(allocated), "unaccounted": "-5"}
    period = {"start": start, "end": end}
    return {"spec": {"tenant": tenant, "serviceRef": {"name": "s"}, "period": period}, "status": status}


def test_runs_are_read_from_what_ended_and_what_still_runs() -> None:
    ended = {"terminated": {"startedAt": "2026-11-21T14:05:10Z", "finishedAt": "2026-11-21T14:05:20Z"}}
    running = {"running": {"startedAt": "2026-11-21T14:05:30Z"}}
    first, second = runs_of([pod(ended, running)])
    assert (first.ended_ns, second.ended_ns, first.devices) == (ns("2026-11-21T14:05:20Z"), None, 2)
    assert runs_of([pod({"waiting": {"reason": "CrashLoopBackOff"}})]) == []


def test_a_period_adds_up_only_when_reports_statement_and_status_agree() -> None:
    start_ns = ns(START)
    runs = [Run("w", start_ns - MINUTE_NS, start_ns + 30 * 10**9, 2), Run("w", start_ns + 50 * 10**9, None, 2)]
    allocated = 2 * 40 * 10**9
    reports = [report("acme", 7), report("bolt", 3), report("_platform", allocated - 10, allocated)]
    (line,) = lines_of(reports, runs, "s")
    assert (line.allocated_ns, line.reported_ns, line.holds) == (allocated, allocated, True)
    assert "adds up" in table([line])
    for wrong in (
        [report("acme", 8), *reports[1:]],
        [*reports[:2], report("_platform", allocated - 10, allocated + 1)],
    ):
        (line,) = lines_of(wrong, runs, "s")
        assert not line.holds
        assert "DOES NOT ADD UP" in table([line])
    (line,) = lines_of(reports, runs[:1], "s")
    assert not line.holds


def test_the_minute_in_which_the_worker_started_is_audited_too_if_that_was_lately() -> None:
    start_ns = ns(START)
    lines = lines_of([report("acme", 7), report("_platform", 1, 8)], [], "s")
    traffic_ns = start_ns + 2 * MINUTE_NS
    assert since_start(lines, [], traffic_ns) == []
    assert since_start(lines, [Run("w", start_ns + MINUTE_NS // 2, None, 1)], traffic_ns) == lines
    assert since_start(lines, [Run("w", traffic_ns - LATELY_NS - 1, None, 1)], traffic_ns) == []


def test_a_period_with_a_report_that_is_not_final_is_no_line_yet() -> None:
    assert lines_of([report("acme", 7, phase="Open"), report("_platform", 1, 8)], [], "s") == []
    assert lines_of([report("acme", 7)], [], "s") == []
    assert lines_of([report("_platform", 1, 8)], [], "other") == []


def test_seconds_are_exact() -> None:
    assert seconds(1) == "0.000000001"
    assert seconds(-1_500_000_000) == "-1.500000000"


def test_keys_are_made_once_for_their_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = kept_keys(file)
    assert kept_keys(file) == keys
    assert len(set(keys.values())) == len(keys) == 2
    assert file.stat().st_mode & 0o077 == 0
