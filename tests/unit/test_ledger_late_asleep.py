"""What becomes known late of a service that is asleep is booked now, and not in a month that is long past."""

import pytest

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.correct import Wanted
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.correct import book
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity, rfc3339
from gpumeter_usage.record import Account
from rigs.audited import audited, digested
from rigs.databases import Database
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, open_ledger, started, worker

HOUR_NS = 60 * MINUTE_NS
JANUARY_NS = START_NS + 45 * 24 * HOUR_NS + 17 * MINUTE_NS
SERVICE = ("team-a", "smollm2")


def asleep(ledger: Ledger, *, lost: bool = False) -> FakeWorker:
    """One pod from 10 to 11 in November, all of its periods, the day and the month Final; `lost`: its last record and
    its end are not told."""
    ledger.keep_plan("default", 1, b'{"currency":"USD","rates":[{"gpuClass":"h100","perGpuHour":"3.60"}]}', START_NS)
    fake = FakeWorker(worker(), START_NS)
    fake.spend(Account.IDLE, START_NS + 30 * MINUTE_NS)
    fake.serve("s-1", "acme", START_NS + HOUR_NS)
    told = len(fake.boot.links) - 2 if lost else len(fake.boot.links)
    events = [started("c", START_NS), ended("c", START_NS + HOUR_NS)]
    ledger.observe(fake.identity, [events[0], gone(START_NS + HOUR_NS)] if lost else events, START_NS + HOUR_NS)
    if lost:
        ledger.observe(fake.identity, [ended("c", START_NS + HOUR_NS)], START_NS + HOUR_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0, told), START_NS + HOUR_NS)
    ledger.settle(fake.identity.worker_uid, START_NS + HOUR_NS)
    for days in (0.5, 2, 3, 12):
        close(ledger, START_NS + int(days * 24) * HOUR_NS)
    return fake


def close(ledger: Ledger, now_ns: int) -> None:
    Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), now_ns)


def final_ends(ledger: Ledger) -> set[str]:
    return {rfc3339(end) for end, _ in finals(ledger)}


def whole(ledger: Ledger) -> None:
    """No month came to be in between, and an auditor finds nothing."""
    close(ledger, JANUARY_NS + 2 * HOUR_NS)
    assert final_ends(ledger) == {"2026-11-21T11:00:00Z", "2027-01-05T11:00:00Z"}
    months = {each["metadata"]["name"] for each in rollups_of(ledger)}
    assert not any("202612" in name for name in months), months
    digested(ledger, JANUARY_NS + 3 * HOUR_NS)
    assert audited(ledger, JANUARY_NS + 4 * HOUR_NS) == []


def rollups_of(ledger: Ledger) -> list[dict[str, dict[str, str]]]:
    import json

    from gpumeter_operator.adapters.ledger import rollups

    kinds = (Granularity.DAY, Granularity.MONTH)
    return [json.loads(body) for kind in kinds for *_, body in rollups.rollup_bodies(ledger.engine, SERVICE, kind, 0)]


def test_a_correction_is_booked_in_the_period_in_which_it_is_made(database: Database) -> None:
    ledger = open_ledger(database.url, Granularity.HOUR)
    asleep(ledger)
    wanted = Wanted("team-a", "smollm2-acme-20261121t10", -SECOND_NS, "It was a probe.", "alice")
    booked = book(ledger, wanted, JANUARY_NS).correction
    assert rfc3339(booked.booked_end_ns) == "2027-01-05T11:00:00Z"
    whole(ledger)


def test_late_records_are_booked_when_they_come_and_the_same_page_again_books_nothing(database: Database) -> None:
    ledger = open_ledger(database.url, Granularity.HOUR)
    fake = asleep(ledger, lost=True)
    page = fake.page("boot-1", len(fake.boot.links) - 2)
    assert ledger.take(fake.identity, page, JANUARY_NS).inserted == 2
    assert ledger.take(fake.identity, page, JANUARY_NS + 5 * HOUR_NS).inserted == 0
    (late,) = ledger.adjustments(*SERVICE)
    assert rfc3339(late.booked_end_ns) == "2027-01-05T11:00:00Z"
    whole(ledger)


def test_the_late_end_of_a_container_is_booked_when_it_is_told(database: Database) -> None:
    ledger = open_ledger(database.url, Granularity.HOUR)
    fake = asleep(ledger)
    earlier = [started("b", START_NS - 20 * MINUTE_NS), ended("b", START_NS - 10 * MINUTE_NS)]
    ledger.observe(fake.identity, [gone(JANUARY_NS), *earlier], JANUARY_NS)
    assert {rfc3339(each.booked_end_ns) for each in ledger.adjustments(*SERVICE)} == {"2027-01-05T11:00:00Z"}
    whole(ledger)


@pytest.mark.parametrize("hours", [1, 30])
def test_where_a_period_is_open_it_is_booked_there_however_late_the_clock(database: Database, hours: int) -> None:
    """A pod runs again since the day before: its periods are not closed yet, and the first of them has it."""
    ledger = open_ledger(database.url, Granularity.HOUR)
    asleep(ledger)
    ledger.observe(worker(2), [started("d", JANUARY_NS - hours * HOUR_NS)], JANUARY_NS)
    wanted = Wanted("team-a", "smollm2-acme-20261121t10", -SECOND_NS, "It was a probe.", "alice")
    first_ns = -(-(JANUARY_NS - hours * HOUR_NS) // HOUR_NS) * HOUR_NS
    assert book(ledger, wanted, JANUARY_NS).correction.booked_end_ns == first_ns
