"""What people read of corrections: the command that books one, and the usage that holds it."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gpumeter_operator.adapters.ledger import corrections
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.cli.adjust import adjust
from gpumeter_operator.cli.usage import usage
from gpumeter_operator.flow.correct import book
from rigs.corrected import BOOKED_AS, CREDIT, REPORT, an_hour, closed_hour
from rigs.pricing import SERVICE, at


def run(command: Any, ledger: Ledger, *arguments: str) -> Result:
    return CliRunner().invoke(command, ["--ledger", str(ledger.engine.url), *arguments])


def test_the_command_says_what_it_books_and_books_it_once(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    told = ("-n", "team-a", REPORT, "--gpu-ns", "-1200000000", "--reason", "INC-42.", "--actor", "alice")
    tried = run(adjust, hour.ledger, *told, "--dry-run")
    assert tried.stdout.startswith("Would book correction c-")
    assert "(-0.0012 USD, at the rates of PricePlan default (version 1, " in tried.stdout
    assert corrections.of_service(hour.ledger, *SERVICE) == ()
    done = run(adjust, hour.ledger, *told)
    assert (done.exit_code, done.stdout) == (0, tried.stdout.replace("Would book", "Booked"))
    again = run(adjust, hour.ledger, *told)
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("BookedAlready: The correction c-")
    assert len(corrections.of_service(hour.ledger, *SERVICE)) == 1
    for missing in ("--reason", "--actor", "--gpu-ns"):
        index = told.index(missing)
        assert run(adjust, hour.ledger, *told[:index], *told[index + 2 :]).exit_code == 2


@pytest.mark.parametrize("final", [False, True], ids=["open", "final"])
def test_usage_shows_a_correction_in_the_amount_and_in_words(tmp_path: Path, final: bool) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    if final:
        closed_hour(hour)
    else:
        hour.run(66)
    found = json.loads(run(usage, hour.ledger, "-o", "json").stdout)
    lines: dict[str, dict[str, Any]] = {line["tenant"]: line for line in found["usage"]}
    assert lines["acme"]["adjustedGpuNanoseconds"] == "-1200000000"
    assert Decimal(lines["acme"]["amounts"]["USD"]) == Decimal("1.2") - Decimal("0.0012")
    assert lines["beta"]["adjustedGpuNanoseconds"] == "0"
    (note,) = [each for each in found["notes"] if "correction" in each]
    assert note == (
        f"team-a/smollm2: correction {BOOKED_AS} of -1200000000 ns of acme's report {REPORT}, booked in the period "
        f"until 2026-11-21T12:00:00Z by alice@example.com: {CREDIT.reason}"
    )
    table = run(usage, hour.ledger).stdout
    assert "-1.200000000 GPU-seconds (-1200000000 ns) of corrections are booked besides, and are in AMOUNT." in table
    assert "correction" not in run(usage, hour.ledger, "-t", "beta").stdout
