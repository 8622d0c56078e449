"""Retention: what may go, what stays, what is told of it, and that nothing else can go; on both databases."""

import json
from collections.abc import Iterator
from hashlib import sha256

import pytest
from click.testing import CliRunner
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger.days import DAY_NS
from gpumeter_operator.adapters.ledger.retention import Removed, remove_old
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.cli.accounts import accounts, audit
from gpumeter_operator.cli.verify import verify
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.removals import removed_of
from gpumeter_usage.period import SECOND_NS, Granularity
from gpumeter_usage.record import Account
from rigs.audited import digested
from rigs.databases import Database
from rigs.ledger import START_NS, FakeWorker, ended, gone, open_ledger, started, worker

HOUR_NS = 3600 * SECOND_NS
MIDNIGHT_NS = START_NS + 14 * HOUR_NS
POD = worker()
SERVICE = ("team-a", "smollm2")
OLD_ENOUGH_NS = MIDNIGHT_NS + 90 * DAY_NS


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    """A pod that served through midnight, and whose hours are all Final; another day's records follow."""
    ledger = open_ledger(database.url, Granularity.HOUR)
    yield ledger
    ledger.close()


def serve(ledger: Ledger, until_ns: int, *, close: bool = True) -> FakeWorker:
    fake = FakeWorker(POD, MIDNIGHT_NS - 30 * 60 * SECOND_NS)
    ledger.observe(POD, [started("c", fake.frontier_ns)], until_ns)
    while fake.frontier_ns < until_ns:
        fake.serve(f"s-{fake.frontier_ns}", "acme", fake.frontier_ns + 300 * SECOND_NS)
        fake.spend(Account.IDLE, fake.frontier_ns + 300 * SECOND_NS)
    fake.seal()
    ledger.observe(POD, [ended("c", until_ns), gone(until_ns)], until_ns)
    ledger.take(POD, fake.page("boot-1", 0), until_ns + HOUR_NS)
    if close:
        Closer(ledger, SECOND_NS).close_all(Pricing({}, {}), until_ns + 4 * HOUR_NS)
    return fake


def kept(ledger: Ledger) -> list[tuple[int, str]]:
    return [(row[1], row[2]) for row in ledger.bodies(POD.worker_uid)]


def test_a_whole_final_day_goes_after_its_time_and_a_fact_says_what_went(ledger: Ledger, database: Database) -> None:
    fake = serve(ledger, MIDNIGHT_NS + 2 * HOUR_NS)
    before, reports = kept(ledger), ledger.final_reports(*SERVICE)
    assert remove_old(ledger, 90, OLD_ENOUGH_NS - 1) == []
    assert kept(ledger) == before

    removed = remove_old(ledger, 90, OLD_ENOUGH_NS)
    stay = kept(ledger)
    went = [row for row in before if row not in stay]
    assert removed == [Removed(MIDNIGHT_NS, 1, len(went))]
    assert went
    assert stay
    with database.raw() as raw:
        [fact] = raw.execute(text("SELECT * FROM removals")).mappings().all()
    assert (fact["first_seq"], fact["last_seq"], fact["last_hash"]) == (went[0][0], went[-1][0], went[-1][1])
    assert fact["digest"] == sha256("".join(digest for _, digest in went).encode()).hexdigest()
    assert (fact["retention_days"], fact["removed_ns"], fact["service"]) == (90, OLD_ENOUGH_NS, "team-a/smollm2")
    removed, unproved = removed_of(ledger, SERVICE, None, OLD_ENOUGH_NS)
    assert (removed.day_ends_ns, unproved) == ({MIDNIGHT_NS}, [])
    assert ledger.final_reports(*SERVICE) == reports, "the bills stay"
    assert audit(ledger, SERVICE, OLD_ENOUGH_NS) == []
    assert remove_old(ledger, 90, OLD_ENOUGH_NS) == []

    ledger.take(POD, fake.page("boot-1", 0), OLD_ENOUGH_NS)  # a journal that was found in a drawer
    ledger.take(POD, fake.page("boot-1", 3), OLD_ENOUGH_NS)
    assert kept(ledger) == stay, "what was removed was committed, and is not taken again"
    assert ledger.alarms() == []


def test_what_is_damaged_beside_a_removal_is_found_all_the_same(ledger: Ledger, database: Database) -> None:
    serve(ledger, MIDNIGHT_NS + 2 * HOUR_NS)
    remove_old(ledger, 90, OLD_ENOUGH_NS)
    first = kept(ledger)[0][0]
    database.disarm()
    database.run("DELETE FROM records WHERE seq = :seq", seq=first)
    assert any("is not in the ledger" in problem for problem in audit(ledger, SERVICE, OLD_ENOUGH_NS))


def test_a_day_with_an_open_period_stays_however_old_it_is(ledger: Ledger) -> None:
    serve(ledger, MIDNIGHT_NS + 2 * HOUR_NS, close=False)
    before = kept(ledger)
    assert remove_old(ledger, 90, MIDNIGHT_NS + 1000 * DAY_NS) == []
    assert kept(ledger) == before


def test_a_late_record_goes_with_the_period_in_which_it_is_booked(ledger: Ledger) -> None:
    fake = FakeWorker(POD, MIDNIGHT_NS - 2 * HOUR_NS)
    ledger.observe(POD, [started("c", fake.frontier_ns)], MIDNIGHT_NS)
    fake.spend(Account.IDLE, MIDNIGHT_NS - HOUR_NS)
    Closer(ledger, SECOND_NS).close_all(Pricing({}, {}), MIDNIGHT_NS + HOUR_NS // 2)
    ledger.take(POD, fake.page("boot-1", 0), MIDNIGHT_NS + HOUR_NS // 2)
    before = kept(ledger)
    assert len(ledger.adjustments(*SERVICE, MIDNIGHT_NS + HOUR_NS)) == 1
    assert remove_old(ledger, 90, OLD_ENOUGH_NS) == []
    assert kept(ledger) == before, "the adjustment of an open period needs them"


def test_nothing_else_than_what_a_fact_names_can_be_removed(ledger: Ledger, database: Database) -> None:
    serve(ledger, MIDNIGHT_NS + 2 * HOUR_NS)
    before = kept(ledger)
    forged = "INSERT INTO removals SELECT worker_uid, boot_id, :day, min(seq), max(seq), '', count(*), '', service, " \
        "min(booked_end_ns), :day, {days}, :now FROM records WHERE booked_end_ns <= :day {only} " \
        "GROUP BY worker_uid, boot_id, service"  # fmt: skip
    for days, now_ns in ((89, OLD_ENOUGH_NS), (90, OLD_ENOUGH_NS - 1)):
        with pytest.raises(IntegrityError, match=r"removals_(keep_90_days|are_old)"):
            database.run(forged.format(days=days, only=""), day=MIDNIGHT_NS, now=now_ns)
    database.run(forged.format(days=90, only="AND seq > 2"), day=MIDNIGHT_NS, now=OLD_ENOUGH_NS)
    drop = "DELETE FROM records" if database.kind == "sqlite" else f"SELECT ledger_drop_day({MIDNIGHT_NS})"
    with pytest.raises(IntegrityError, match="append-only"):
        database.run(drop)
    assert kept(ledger) == before


def test_less_than_ninety_days_are_refused_in_words(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="for 90 days at least"):
        remove_old(ledger, 89, OLD_ENOUGH_NS)


@pytest.mark.parametrize(("days", "recomputed", "compared"), [(0, 4, 0), (1, 2, 2), (2, 0, 4)])
def test_accounts_and_verify_say_how_much_was_recomputed_and_how_much_only_compared(
    database: Database, days: int, recomputed: int, compared: int
) -> None:
    """A thousand days ago: the commands ask the clock of the machine whether a removal can be true."""
    midnight_ns = MIDNIGHT_NS - 1000 * DAY_NS
    ledger, fake = open_ledger(database.url, Granularity.HOUR), FakeWorker(POD, midnight_ns - 2 * HOUR_NS)
    until_ns = midnight_ns + 2 * HOUR_NS
    ledger.observe(POD, [started("c", fake.frontier_ns)], until_ns)
    fake.serve("s-1", "acme", until_ns)
    fake.seal()
    ledger.observe(POD, [ended("c", until_ns), gone(until_ns)], until_ns)
    ledger.take(POD, fake.page("boot-1", 0), until_ns)
    Closer(ledger, SECOND_NS).close_all(Pricing({}, {}), until_ns + 4 * HOUR_NS)
    digested(ledger, until_ns + 5 * HOUR_NS)
    assert len(remove_old(ledger, 90, midnight_ns + (90 + days - 1) * DAY_NS)) == days
    records = len(kept(ledger))
    ledger.close()

    run = CliRunner().invoke
    told = run(accounts, ["--check", "--ledger", database.url])
    assert told.exit_code == 0, told.output
    last = told.output.splitlines()[-1]
    assert f"reports of {recomputed} closed periods recomputed from {records} raw records" in last
    assert (f"those of {compared} closed periods only compared" in last) is (compared > 0)
    data = json.loads(run(accounts, ["--check", "-o", "json", "--ledger", database.url]).stdout)
    assert data["lookedAt"] == {"records": records, "periods": recomputed, "periodsOnlyCompared": compared}
    assert data["checkedFromRawRecords"] is (compared == 0)

    told = run(verify, ["--ledger", database.url])
    assert f"{records:,} records, " in told.output
    assert f"{recomputed} closed periods recomputed from raw records" in told.output
    assert (f"{compared} closed periods only compared with" in told.output) is (compared > 0)
    data = json.loads(run(verify, ["-o", "json", "--ledger", database.url]).stdout)
    assert (data["lookedAt"]["periods"], data["lookedAt"]["periodsOnlyCompared"]) == (recomputed, compared)
    assert data["findings"] == []
