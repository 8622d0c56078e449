"""Corrections under audit: `verify` recomputes them and names what was changed, which the database refuses."""

import sqlite3
from dataclasses import asdict
from pathlib import Path

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.tables import corrections as corrections_table
from gpumeter_operator.flow.correct import book, weigh
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import Account
from rigs.audited import DIGESTED_NS, audited, digested
from rigs.corrected import BOOKED_AS, CREDIT, an_hour, closed_hour, next_hour
from rigs.ledger import FakeWorker, ended, gone, started, worker
from rigs.pricing import SERVICE, PricedHour, at


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE corrections SET gpu_ns = gpu_ns - 1", "ReportDiffers"),
        ("UPDATE corrections SET reason = 'because'", "ReportBytes"),
        ("UPDATE corrections SET plan_hash = report_digest", "ReportDiffers"),
        ("UPDATE corrections SET report_digest = plan_hash", "CorrectionUnproved"),
        ("UPDATE corrections SET closed_start_ns = closed_start_ns + 1", "CorrectionUnproved"),
        ("UPDATE corrections SET report = 'smollm2-acme-20261121t11'", "CorrectionUnproved"),
        ("UPDATE corrections SET gpu_class = 'l4'", "CorrectionUnproved"),
        ("UPDATE corrections SET booked_end_ns = booked_end_ns - 1800000000000", "CorrectionUnbilled"),
        ("UPDATE corrections SET made_ns = made_ns + 1", "FactChanged"),
        ("DELETE FROM corrections", "FactMissing"),
    ],
)
def test_verify_recomputes_corrections_and_names_one_that_was_changed(
    tmp_path: Path, statement: str, reason: str
) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    next_hour(hour)
    digested(hour.ledger, DIGESTED_NS)
    assert audited(hour.ledger) == []
    hour.ledger.close()
    raw = sqlite3.connect(tmp_path / "ledger.db")
    verb = statement.split(maxsplit=1)[0].lower()
    raw.execute(f"DROP TRIGGER corrections_no_{verb}")
    assert raw.execute(statement).rowcount == 1
    raw.commit()
    raw.close()
    told = audited(Reader(f"sqlite:///{tmp_path / 'ledger.db'}"))
    assert reason in {each.reason for each in told}
    assert told[0].message.startswith(f"corrections ({BOOKED_AS})")


def test_a_correction_on_no_bill_of_a_period_that_is_final_is_told(tmp_path: Path) -> None:
    """As a collector leaves it that knows no corrections and closes the period beside one that does."""
    hour = an_hour(tmp_path)
    correction = weigh(hour.ledger, CREDIT, at(65)).correction
    next_hour(hour)
    with hour.ledger.writing() as connection:
        connection.execute(insert(corrections_table).values(asdict(correction)))
    digested(hour.ledger, DIGESTED_NS)
    told = audited(hour.ledger)
    assert (told[0].reason, told[0].message) == (
        "CorrectionUnbilled",
        f"corrections ({BOOKED_AS}): team-a/smollm2: it stands on no Final report of the period until "
        "2026-11-21T12:00:00Z.",
    )


def ends_of(life: int) -> int:
    """Of each life at another second, so that no two of them come to the same by chance."""
    return at(60 + 5 * life + 4) + life * SECOND_NS


def many_lives(hour: PricedHour, *, last_ends: bool) -> None:
    """A pod that starts anew every five minutes from 11 to 12 o'clock."""
    fake, events = FakeWorker(worker(2), at(60), "boot-0"), []
    for life in range(12):
        begin = at(60 + 5 * life)
        if life:
            fake.restart(f"boot-{life}", begin)
        fake.serve(f"s-{life}", "acme", begin + MINUTE_NS)
        fake.spend(Account.IDLE, begin + 4 * MINUTE_NS)
        events += [started(f"c-{life}", begin), ended(f"c-{life}", ends_of(life))]
    fake.seal()
    hour.ledger.observe(fake.identity, events if last_ends else events[:-1], at(120))
    for life in range(12):
        hour.ledger.take(fake.identity, fake.page(f"boot-{life}", 0), at(120))
    hour.ledger.settle(fake.identity.worker_uid, at(120))


@pytest.mark.parametrize("last_ends", [True, False], ids=["all ended", "one end is known later"])
def test_verify_finds_nothing_where_a_pod_has_many_lives_in_the_hour_of_a_correction(
    tmp_path: Path, *, last_ends: bool
) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    many_lives(hour, last_ends=last_ends)
    assert closed_hour(hour)["acme"]["adjustedGpuNanoseconds"] == "-1200000000"
    if not last_ends:
        hour.ledger.observe(worker(2), [ended("c-11", ends_of(11)), gone(at(126))], at(126))
        hour.run(185)
        assert len(hour.ledger.adjustments(*SERVICE)) == 1
    digested(hour.ledger, DIGESTED_NS)
    assert audited(hour.ledger) == []


def test_the_database_lets_nobody_change_a_correction(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    for statement in ("UPDATE corrections SET gpu_ns = 0", "DELETE FROM corrections"):
        with pytest.raises(IntegrityError, match="append-only"), hour.ledger.writing() as connection:
            connection.exec_driver_sql(statement)
