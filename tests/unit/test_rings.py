"""Which rings of tests run beside which, and how a ring that runs beside others is run."""

import os
import sys
from pathlib import Path

import pytest

from rings import BESIDE_NICE, RINGS, Outcome, Ring, call, lanes, main, print_summary, run


def nothing() -> None:
    return None


PURE, ALONE, LATER = Ring("pure", nothing, shared=True), Ring("alone", nothing), Ring("later", nothing)


def test_what_needs_only_a_processor_runs_beside_what_waits_for_servers() -> None:
    assert lanes([PURE, ALONE, LATER], processors=2) == ([ALONE, LATER], [PURE])


def test_one_runs_after_the_other_where_there_is_one_processor_or_nothing_to_run_beside() -> None:
    assert lanes([PURE, ALONE], processors=1) == ([PURE, ALONE], [])
    assert lanes([PURE, PURE], processors=8) == ([PURE, PURE], [])


def test_every_ring_is_in_exactly_one_lane() -> None:
    front, beside = lanes(RINGS, processors=2)
    assert sorted(one.label for one in front + beside) == sorted(one.label for one in RINGS)
    assert all(one.shared for one in beside)


def test_every_test_of_the_contract_is_in_one_of_its_two_parts() -> None:
    first, second = (one.marks for one in RINGS if one.name == "contract")
    assert second == f"not {first}"


def test_what_runs_beside_writes_into_its_file_and_has_less_right_to_the_processors(tmp_path: Path) -> None:
    output = tmp_path / "words"
    assert call([sys.executable, "-c", "import os; print(os.nice(0))"], output) == 0
    assert int(output.read_text()) == min(os.nice(0) + BESIDE_NICE, 19)


def test_a_ring_that_misses_something_is_skipped_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(Ring("gpu", lambda: "There is no GPU."))
    assert (outcome.failed, outcome.note) == (0, "skipped: There is no GPU.")
    assert "There is no GPU." in capsys.readouterr().out


def test_a_ring_that_was_not_run_is_in_the_last_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    gone = Ring("gpu", lambda: "No GPU.")
    print_summary([run(gone), Outcome("unit", passed=3)])
    assert capsys.readouterr().out.splitlines()[-1] == "3 passed, 0 failed, 0 skipped; not run here: gpu"


def test_help_names_the_rings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "contract, e2e, gpu" in capsys.readouterr().out
