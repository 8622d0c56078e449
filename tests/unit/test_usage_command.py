"""`gpumeter usage` as a person meets it, on both databases where the database adds up."""

import json
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.tariff import BillingMode, Terms
from gpumeter_operator.cli.accounts import accounts
from gpumeter_operator.cli.usage import usage
from gpumeter_operator.cli.verify import verify
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import Account
from rigs.audited import digested, fill, made
from rigs.databases import Database
from rigs.ledger import FakeWorker, finals, open_ledger
from rigs.pricing import PricedHour, at, plan, rate


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{made(tmp_path_factory.mktemp('ledger') / 'ledger.db')}"


def run(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(usage, ["--ledger", url, *arguments])


def data(url: str, *arguments: str) -> dict[str, Any]:
    done = run(url, "-o", "json", *arguments)
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def test_usage_of_tenants_is_what_their_final_reports_say(database: Database) -> None:
    ledger = open_ledger(database.url)
    fill(ledger)
    digested(ledger)
    billed: dict[str, list[Decimal]] = defaultdict(lambda: [Decimal(0), Decimal(0)])
    for service in ledger.services():
        for _, tenant, body in ledger.final_reports(*service):
            status = json.loads(body)["status"]
            billed[tenant][0] += int(status["gpuNanoseconds"])
            billed[tenant][1] += Decimal(status["amount"])
    ledger.close()
    told = data(database.url)
    del billed["_platform"]
    found = {
        line["tenant"]: [Decimal(line["gpuNanoseconds"]), Decimal(line["amounts"]["EUR"])] for line in told["usage"]
    }
    assert found == billed
    assert told["total"]["gpuNanoseconds"] == str(sum(each[0] for each in billed.values()))
    by_service = data(database.url, "--by", "service,model")
    assert by_service["total"] == told["total"]
    assert [(line["service"], line["model"]) for line in by_service["usage"]] == [
        ("team-a/other", "other"),
        ("team-a/smollm2", "smollm2"),
    ]
    assert data(database.url, "--by", "session")["total"]["gpuSeconds"] == told["total"]["gpuSeconds"]
    checked = CliRunner().invoke(verify, ["--ledger", database.url, "--json"])
    assert json.loads(checked.stdout)["findings"] == []
    database.disarm()
    database.run("UPDATE pod_accounts SET idle = idle + 1 WHERE worker_uid = 'pod-uid-2' AND host_gap = 0")
    checked = CliRunner().invoke(verify, ["--ledger", database.url, "--json"])
    assert json.loads(checked.stdout)["first"]["message"].startswith("pod_accounts (pod-uid-2 ")


def test_the_table_has_exact_nanoseconds_seconds_tokens_and_a_total(url: str) -> None:
    lines = run(url).stdout.splitlines()
    assert lines[0] == "usage of all periods"
    header = ["TENANT", "GPU-SECONDS", "GPU-NS", "SESSIONS", "PROMPT", "CACHED", "COMPLETION", "AMOUNT"]
    assert lines[1].split() == header
    assert lines[2].split()[:7] == ["acme", "120.000000000", "120000000000", "3", "35", "0", "55"]
    assert lines[4].startswith("total: 137.000000000 GPU-seconds (137000000000 ns), 5 sessions ended, 144 tokens, ")


def test_a_span_takes_whole_periods_and_a_month_all_of_its_own(url: str) -> None:
    late = data(url, "--since", "2026-11-21T10:01:00Z", "--until", "2026-11-21T10:02:00Z")
    assert {line["tenant"]: line["gpuSeconds"] for line in late["usage"]} == {"acme": "30", "beta-corp": "10"}
    assert data(url, "--month", "2026-11")["total"] == data(url)["total"]
    assert data(url, "--month", "2026-10")["usage"] == []
    assert data(url, "--since", "2026-11-22")["usage"] == []


def test_filters_narrow_and_periods_that_are_incomplete_are_told(url: str) -> None:
    told = data(url, "-s", "other", "-t", "acme")
    assert [line["gpuSeconds"] for line in told["usage"]] == ["30"]
    assert "team-a/other" in told["notes"][0]
    assert "Complete=False" in told["notes"][0]
    assert data(url, "-s", "smollm2")["notes"] == []


def test_a_session_shows_its_slices_with_times_shares_and_tokens(url: str) -> None:
    told = data(url, "--session", "s-1")
    assert [(each["start"], each["end"], each["gpuNanoseconds"], each["status"]) for each in told["slices"]] == [
        ("2026-11-21T10:00:10.000000000Z", "2026-11-21T10:01:00.000000000Z", str(50 * SECOND_NS), "open"),
        ("2026-11-21T10:01:00.000000000Z", "2026-11-21T10:01:10.000000000Z", str(10 * SECOND_NS), "finished"),
    ]
    assert (told["tenant"], told["total"]["tokens"]["completion"]) == ("acme", 22)
    table = run(url, "--session", "s-1").stdout.splitlines()
    assert table[0].startswith("session=s-1  tenant=acme  service=team-a/smollm2  model=smollm2  status=finished")
    assert table[-1].startswith(
        "total: 60.000000000 GPU-seconds (60000000000 ns) in 2 slices, amount 0.040138888888 EUR"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("-t", "acmee"), 1, "The ledger knows no tenant 'acmee'; did you mean acme?"),
        (("-s", "nothing"), 1, "The ledger knows no service 'nothing'; it has other, smollm2."),
        (("--session", "s-77"), 1, "has no slice of a session 's-77'"),
        (("--by", "colour"), 2, "'colour' is no key; write one or more of tenant, service, model, session"),
        (("--by", "tenant,tenant"), 2, "names a key twice"),
        (("--since", "soon"), 2, "'soon' is no time; write 2026-11-21T14:00:00Z"),
        (("--month", "2026-13"), 2, "'2026-13' is no month; write 2026-11"),
        (("--month", "2026-11", "--since", "1h"), 2, "--month is a span of its own"),
        (("--since", "1h", "--until", "2h"), 2, "--since must lie before --until"),
    ],
)
def test_what_cannot_be_answered_is_told_in_words(url: str, arguments: tuple[str, ...], code: int, told: str) -> None:
    done = run(url, *arguments)
    assert done.exit_code == code
    assert told in done.output


def test_without_a_ledger_it_ends_with_2_and_a_sentence(tmp_path: Path) -> None:
    done = run(f"sqlite:///{tmp_path}/absent.db")
    assert (done.exit_code, "There is no ledger at" in done.output) == (2, True)


EARLIER = ("DROP TABLE corrections", "ALTER TABLE records DROP COLUMN kv_byte_s")


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ("0010", "The ledger has schema 0010, and this gpumeter reads schema"),
        ("9999", "was written by a newer version of gpumeter (schema 9999"),
        ("", "There is no ledger in this database; the collector or `gpumeter migrate` makes it."),
    ],
    ids=["earlier", "newer", "none"],
)
def test_a_ledger_of_another_schema_is_told_with_what_to_do(database: Database, schema: str, told: str) -> None:
    ledger = open_ledger(database.url)
    fill(ledger)
    ledger.close()
    database.disarm()
    for statement in EARLIER if schema == "0010" else ():
        database.run(statement)
    changed = f"UPDATE alembic_version SET version_num = '{schema}'" if schema else "DROP TABLE alembic_version"
    database.run(changed)
    for command in (usage, verify, accounts):
        done = CliRunner().invoke(command, ["--ledger", database.url])
        assert (done.exit_code, done.stdout) == (2, "")
        assert told in done.stderr
        assert "Traceback" not in done.output
        assert schema != "0010" or "run `gpumeter migrate` as the owner" in done.stderr


def test_a_column_that_goes_while_it_is_read_is_told_and_no_traceback(database: Database) -> None:
    """An auditor had the ledger open; nobody asks for its schema twice."""
    ledger = open_ledger(database.url)
    fill(ledger)
    reader = Reader(database.url)
    assert list(reader.kept_records("pod-uid-1"))
    ledger.close()
    database.disarm()
    database.run("ALTER TABLE records DROP COLUMN kv_byte_s")
    with pytest.raises(LedgerUnavailable, match="kv_byte_s"):
        list(reader.kept_records("pod-uid-1"))
    reader.close()


TOKENS = {
    "standardRates": [
        {"model": "smollm2", "perThousandPromptTokens": "0.5", "perThousandCompletionTokens": "2"},
    ]
}


def priced(folder: Path, terms: Terms | None = None, **plan_of: Any) -> tuple[PricedHour, str]:
    """An hour in which a new version doubles the price from half past on, and acme and beta are served around it."""
    hour = PricedHour(folder, terms)
    hour.see(plan(rate("3.60"), **plan_of), 0)
    hour.see(plan(rate("7.20"), **plan_of), 29.5)

    def live(fake: FakeWorker) -> None:
        fake.serve("s-1", "acme", at(20))
        fake.serve("s-2", "beta", at(35))
        fake.spend(Account.IDLE, at(50))
        fake.serve("s-3", "acme", at(55))

    hour.pod(live)
    hour.run(30)  # opened, so that the first version prices it
    return hour, str(hour.ledger.engine.url)


def amounts(told: dict[str, Any], key: str) -> dict[str, str]:
    return {line[key]: line["amounts"].get("USD", "-") for line in told["usage"]}


def test_a_period_of_two_versions_is_priced_by_each_and_slices_are_what_the_report_says(tmp_path: Path) -> None:
    hour, url = priced(tmp_path)
    assert amounts(data(url), "tenant") == {"acme": "1.8", "beta": "1.2"}, "of a period that is still open"
    hour.close()
    assert amounts(data(url), "tenant") == {"acme": "1.8", "beta": "1.2"}
    assert amounts(data(url, "--by", "model"), "model") == {"smollm2": "3"}
    assert amounts(data(url, "-m", "smollm2"), "tenant") == {"acme": "1.8", "beta": "1.2"}
    assert amounts(data(url, "--by", "session"), "session") == {"s-1": "1.2", "s-2": "1.2", "s-3": "0.6"}
    of_session = data(url, "--session", "s-2")
    assert of_session["total"]["amounts"] == {"USD": "1.2"}
    assert {each["amount"] for each in of_session["slices"]} == {"0.06", "0.12"}, "a minute before, a minute after"
    assert data(url)["notes"] == data(url, "--by", "model")["notes"] == of_session["notes"] == []


def test_idle_time_that_tenants_pay_for_is_on_their_bills_and_on_no_session(tmp_path: Path) -> None:
    hour, url = priced(tmp_path, idlePayer="tenant")
    for final in (False, True):
        if final:
            hour.close()
        told = data(url)
        report = {tenant: of["status"] for (_, tenant), of in finals(hour.ledger).items()}
        if final:
            assert amounts(told, "tenant") == {tenant: report[tenant]["amount"] for tenant in ("acme", "beta")}
        idle_ns = {line["tenant"]: int(line["idleGpuNanoseconds"]) for line in told["usage"]}
        assert sum(idle_ns.values()) == 20 * MINUTE_NS, "all of it, in this hour, in which somebody used each stretch"
        assert sum(Decimal(each) for each in amounts(told, "tenant").values()) == Decimal("5.4")
    assert amounts(data(url, "--by", "service"), "service") == {"team-a/smollm2": "5.4"}
    by_model = data(url, "--by", "model")
    assert amounts(by_model, "model") == {"smollm2": "3"}
    assert by_model["notes"] == [
        "team-a/smollm2: idle time of 1 of its periods charged to tenants. AMOUNT is the measured price of what was "
        "used; see --by tenant for the bill."
    ]
    assert data(url, "--session", "s-1")["notes"] == by_model["notes"]
    assert "of idle time are charged besides, and are in AMOUNT." in run(url).stdout


def test_an_owner_who_used_nothing_has_a_line_for_the_idle_time(tmp_path: Path) -> None:
    hour, url = priced(tmp_path, Terms(owner="landlord"), idlePayer="owner")
    hour.close()
    assert amounts(data(url), "tenant") == {"acme": "1.8", "beta": "1.2", "landlord": "2.4"}
    assert amounts(data(url, "-t", "landlord"), "tenant") == {"landlord": "2.4"}


def test_standard_rates_are_what_tenants_owe_and_sessions_show_what_was_measured(tmp_path: Path) -> None:
    hour, url = priced(tmp_path, Terms(BillingMode.STANDARD_RATE), **TOKENS)
    hour.close()
    report = {tenant: of["status"] for (_, tenant), of in finals(hour.ledger).items()}
    told = data(url)
    assert amounts(told, "tenant") == {tenant: report[tenant]["amount"] for tenant in ("acme", "beta")}
    by_session = data(url, "--by", "session")
    assert amounts(by_session, "session") == {"s-1": "1.2", "s-2": "1.2", "s-3": "0.6"}
    assert "1 of its periods billed by standard rates of tokens." in by_session["notes"][0]
