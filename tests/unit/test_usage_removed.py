"""`gpumeter usage` of days whose records retention removed: the bill is whole, and what is left out is named."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gpumeter_operator.adapters.ledger.days import DAY_NS
from gpumeter_operator.adapters.ledger.retention import remove_old
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.tariff import canonical_spec
from gpumeter_operator.cli.usage import usage
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import SECOND_NS, Granularity
from gpumeter_usage.record import Account
from rigs.databases import Database
from rigs.ledger import START_NS, FakeWorker, ended, gone, open_ledger, started, worker

HOUR_NS = 3600 * SECOND_NS
MIDNIGHT_NS = START_NS + 14 * HOUR_NS
OLD_ENOUGH_NS = MIDNIGHT_NS + 90 * DAY_NS
FIRST_DAY, SECOND_DAY = "2026-11-21", "2026-11-22"


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    """Two days of two services, one of which had two models; every hour is Final and priced."""
    ledger = open_ledger(database.url, Granularity.HOUR)
    spec = canonical_spec({"currency": "USD", "rates": [{"gpuClass": "h100", "perGpuHour": "3.60"}]})
    newest = ledger.keep_plan("default", 1, spec, START_NS)
    serve(ledger, 1, service="smollm2", model="smollm2")
    serve(ledger, 2, service="other", model="old")
    serve(ledger, 3, service="other", model="new")
    Closer(ledger, SECOND_NS).close_all(Pricing({}, {"default": newest}), MIDNIGHT_NS + 6 * HOUR_NS)
    yield ledger
    ledger.close()


def serve(ledger: Ledger, number: int, *, service: str, model: str) -> None:
    """A pod that serves two tenants through midnight, from half an hour before it to an hour after."""
    until_ns = MIDNIGHT_NS + HOUR_NS
    fake = FakeWorker(replace(worker(number, service=service), model=model), MIDNIGHT_NS - HOUR_NS // 2)
    ledger.observe(fake.identity, [started(f"c-{number}", fake.frontier_ns)], fake.frontier_ns)
    fake.serve(f"first-{number}", "acme", fake.frontier_ns + 300 * SECOND_NS)
    fake.serve(f"gone-{number}", "ghost", fake.frontier_ns + 200 * SECOND_NS)
    fake.spend(Account.IDLE, MIDNIGHT_NS - 60 * SECOND_NS)
    fake.serve(f"across-{number}", "beta", MIDNIGHT_NS + 90 * SECOND_NS)
    fake.serve(f"after-{number}", "acme", MIDNIGHT_NS + 400 * SECOND_NS)
    fake.spend(Account.IDLE, until_ns)
    fake.seal()
    ledger.observe(fake.identity, [ended(f"c-{number}", until_ns), gone(until_ns)], until_ns)
    ledger.take(fake.identity, fake.page("boot-1", 0), until_ns)
    ledger.settle(fake.identity.worker_uid, until_ns)


def run(database: Database, *arguments: str) -> Result:
    return CliRunner().invoke(usage, ["--ledger", database.url, *arguments])


def data(database: Database, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = run(database, "-o", "json", *arguments)
    assert done.exit_code == code, done.output
    return dict(json.loads(done.stdout))


BILLS = [
    (),
    ("--by", "tenant,service"),
    ("--month", "2026-11", "--by", "service"),
    ("--until", SECOND_DAY),
    ("-t", "ghost"),
]


def test_the_bill_of_removed_days_is_what_it_was_before(ledger: Ledger, database: Database) -> None:
    before = [data(database, *arguments) for arguments in BILLS]
    assert all(line["amounts"] and line["records"] for told in before for line in told["usage"])
    assert remove_old(ledger, 90, OLD_ENOUGH_NS)
    assert [data(database, *arguments) for arguments in BILLS] == before, "one day of two went"
    assert remove_old(ledger, 90, OLD_ENOUGH_NS + DAY_NS)
    assert [data(database, *arguments) for arguments in BILLS] == before, "all went"
    table = run(database)
    assert table.exit_code == 0
    assert "All figures as in the reports" in table.stdout


def test_the_bill_is_what_the_reports_say_to_the_nanosecond(ledger: Ledger, database: Database) -> None:
    remove_old(ledger, 90, OLD_ENOUGH_NS)
    billed: dict[str, list[int]] = {}
    for service in ledger.services():
        for _, tenant, body in ledger.final_reports(*service):
            status = json.loads(body)["status"]
            sums = billed.setdefault(tenant, [0, 0, 0])
            for index, figure in enumerate((status["gpuNanoseconds"], status["sessions"], status["tokens"]["prompt"])):
                sums[index] += int(figure)
    del billed["_platform"]
    told = data(database)["usage"]
    assert billed == {
        line["tenant"]: [int(line["gpuNanoseconds"]), line["sessions"], line["tokens"]["prompt"]] for line in told
    }


def test_a_services_only_model_is_told_from_its_reports_at_the_price_of_its_slices(
    ledger: Ledger, database: Database
) -> None:
    asked = [("-s", "smollm2", "--by", keys) for keys in ("model", "model,tenant", "tenant,service,model")]
    asked += [("-m", "smollm2"), ("-m", "smollm2", "--until", SECOND_DAY)]
    before = [data(database, *arguments) for arguments in asked]
    assert all(line["amounts"] for told in before for line in told["usage"])
    remove_old(ledger, 90, OLD_ENOUGH_NS)
    assert [data(database, *arguments) for arguments in asked] == before


def test_what_reports_do_not_tell_is_named_by_its_days_and_ends_with_1(ledger: Ledger, database: Database) -> None:
    remove_old(ledger, 90, OLD_ENOUGH_NS)
    by_model = data(database, "--by", "model", code=1)
    assert by_model["leftOut"] == [{"service": "team-a/other", "days": [FIRST_DAY]}]
    assert by_model["notes"] == [
        "Left out is what was used of team-a/other on 2026-11-21: retention removed the records, and reports do not "
        "tell models apart; --by tenant,service has the bills."
    ]
    by_session = data(database, "--by", "session", code=1)
    assert {each["service"] for each in by_session["leftOut"]} == {"team-a/other", "team-a/smollm2"}
    assert {line["session"] for line in by_session["usage"]} >= {"across-1", "after-3"}
    table = run(database, "--by", "session")
    assert (table.exit_code, table.stdout.splitlines()[-1]) == (1, by_session["notes"][0])
    data(database, "-m", "new", code=1)
    assert data(database, "--by", "model", "--since", SECOND_DAY)["leftOut"] == [], "its records are there"
    assert data(database, "-t", "ghost", "-m", "new", "--since", SECOND_DAY)["usage"] == []


def test_two_removed_days_are_told_as_from_and_to(ledger: Ledger, database: Database) -> None:
    remove_old(ledger, 90, OLD_ENOUGH_NS + DAY_NS)
    told = data(database, "--by", "session", "-s", "other", code=1)
    assert told["usage"] == []
    assert "team-a/other on 2026-11-21 to 2026-11-22: retention" in told["notes"][0]


def test_a_session_whose_slices_may_have_gone_says_so(ledger: Ledger, database: Database) -> None:
    assert data(database, "--session", "across-1")["leftOut"] == []
    remove_old(ledger, 90, OLD_ENOUGH_NS)
    across = data(database, "--session", "across-1", code=1)
    assert across["leftOut"] == [{"service": "team-a/smollm2", "days": [FIRST_DAY]}]
    assert across["notes"] == ["Slices of team-a/smollm2 on 2026-11-21 may be left out: retention removed the records."]
    assert data(database, "--session", "after-1")["leftOut"] == [], "it began after that day"
    done = run(database, "--session", "first-1")
    assert done.exit_code == 1
    assert "Retention removed the records of team-a/other on 2026-11-21; team-a/smollm2 on 2026-11-21" in done.stderr
