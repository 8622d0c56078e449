"""`gpumeter collector` and `gpumeter accounts` as a user meets them."""

import json
import sqlite3
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gpumeter_operator.billing.report import canonical_report
from gpumeter_operator.billing.tariff import canonical_spec
from gpumeter_operator.cli.accounts import accounts
from gpumeter_operator.cli.collector_settings import read_settings
from gpumeter_operator.environment import SettingsInvalid
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account, Kind
from rigs.ledger import START_NS, FakeWorker, ended, gone, open_ledger, started, worker


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with one pod that ran for 90 seconds, both of its minutes closed."""
    ledger, fake = open_ledger(tmp_path / "ledger.db"), FakeWorker(worker(), START_NS)
    fake.spend(Account.LOAD, START_NS + 10 * SECOND_NS)
    fake.serve("s-1", "acme", START_NS + 70 * SECOND_NS)
    fake.seal()
    life = [started("c", START_NS), ended("c", START_NS + 90 * SECOND_NS), gone(START_NS + 91 * SECOND_NS)]
    ledger.observe(fake.identity, life, START_NS + 91 * SECOND_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0), START_NS + 91 * SECOND_NS)
    spec = canonical_spec({"currency": "EUR", "rates": [{"gpuClass": "h100", "perGpuHour": "2.39"}]})
    plans = {"default": ledger.keep_plan("default", 1, spec, START_NS)}
    Closer(ledger, MINUTE_NS).close_all(Pricing({}, plans), START_NS + 10 * MINUTE_NS)
    ledger.close()
    return tmp_path / "ledger.db"


def change(path: Path, table: str, statement: str, *values: object) -> None:
    """What somebody does to a ledger who may write its file."""
    raw = sqlite3.connect(path)
    raw.execute(f"DROP TRIGGER {table}_no_update")
    raw.execute(statement, values)
    raw.commit()
    raw.close()


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(accounts, ["--ledger", f"sqlite:///{path}", *arguments])


def test_accounts_prints_every_pod_and_period_to_the_nanosecond(path: Path) -> None:
    told = run(path, "--check")
    assert told.exit_code == 0, told.output
    lines = [line.split() for line in told.output.splitlines()]
    assert lines[1][5:] == ["60.000000000", "0.000000000", "10.000000000", "0.000000000", "50.000000000"] + 4 * [
        "0.000000000"
    ] + ["equal"]
    assert lines[2][12] == "20.000000000", "what follows the seal is drain"
    assert "accounts = allocated: yes (2 rows" in told.output


def test_accounts_tell_a_rest_that_the_next_period_takes_back_from_one_that_stays(tmp_path: Path) -> None:
    """A step that straddles the edge of a minute: a second short in one, a second long in the next."""
    ledger, fake = open_ledger(tmp_path / "ledger.db"), FakeWorker(worker(), START_NS)
    fake.spend(Account.IDLE, START_NS + 59 * SECOND_NS)
    fake.frontier_ns = START_NS + 60 * SECOND_NS
    fake._append(Kind.ACCOUNT, Account.IDLE, fake.frontier_ns, START_NS + 90 * SECOND_NS, gpu_ns=31 * SECOND_NS)
    ledger.observe(fake.identity, [started("c", START_NS), ended("c", START_NS + 90 * SECOND_NS)], START_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0), START_NS + 91 * SECOND_NS)
    ledger.settle(fake.identity.worker_uid, START_NS + 5 * MINUTE_NS)
    Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), START_NS + 10 * MINUTE_NS)
    ledger.close()
    told = run(tmp_path / "ledger.db").output
    assert "unaccounted: 0.000000000 s (0.000 % of allocated) in sum; 2.000000000 s (2.222 % of allocated)" in told
    assert "leaves a rest in one period that the next takes back" in told
    data = json.loads(run(tmp_path / "ledger.db", "-o", "json").stdout)
    assert data["unaccounted"] == {"sum": 0, "absolute": 2 * SECOND_NS}


def test_accounts_as_data_can_be_narrowed(path: Path) -> None:
    whole = json.loads(run(path, "-o", "json").stdout)
    assert [row["accounts"]["allocated"] for row in whole["lines"]] == [60 * SECOND_NS, 30 * SECOND_NS]
    assert json.loads(run(path, "-o", "json", "--since", "2026-11-21T10:01:00Z").stdout)["lines"] == whole["lines"][1:]
    assert json.loads(run(path, "-o", "json", "-n", "team-b").stdout)["lines"] == []


def test_accounts_names_what_was_changed_and_ends_with_1(path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.execute("DROP TRIGGER records_no_update")
    raw.execute("UPDATE records SET body = replace(body, 'acme', 'beta') WHERE seq = 2")
    raw.execute("UPDATE records SET body = CAST(body AS BLOB)")
    raw.commit()
    raw.close()
    assert run(path).exit_code == 0, "without --check the raw records are not read"
    told = run(path, "--check")
    assert told.exit_code == 1
    assert "team-a/smollm2-1 boot boot-1 seq 2: its bytes or those before it were changed" in told.output
    assert "beta used 50000000000 ns and has no report" in told.output
    assert "accounts = allocated: NO" in told.output


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("gpu_ns", 1),
        ("tenant", "beta"),
        ("kind", "seal"),
        ("account", "idle"),
        ("session_id", "s-2"),
        ("ended_at", START_NS),
        ("service", "team-a/other"),
        ("status", "finished"),
        ("prompt_tokens", 8),
    ],
)
def test_a_column_that_says_something_else_than_its_record_is_told(path: Path, column: str, value: object) -> None:
    change(path, "records", f"UPDATE records SET {column} = ? WHERE seq = 2", value)
    told = run(path, "--check")
    assert told.exit_code == 1
    assert f"team-a/smollm2-1 boot boot-1 seq 2: the column {column} is {value!r}, its bytes say" in told.output


def change_report(path: Path, edit: Callable[[dict[str, Any]], object], *, digest: bool = True) -> None:
    """Change acme's Final report of the first minute, with its digest or without."""
    raw = sqlite3.connect(path)
    key = "tenant = 'acme' AND phase = 'Final' AND period_end_ns = " + str(START_NS + MINUTE_NS)
    report = json.loads(raw.execute(f"SELECT body FROM reports WHERE {key}").fetchone()[0])
    raw.close()
    edit(report)
    body = canonical_report(report)
    hashed = ", digest = " + repr(sha256(body).hexdigest()) if digest else ""
    change(path, "reports", f"UPDATE reports SET body = ?{hashed} WHERE {key}", body)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("amount", "0.01", "amount is 0.01, its records at the plan's rates say 0.033194444444"),
        ("amountDue", None, "amountDue is None, where there is a price"),
        ("sessions", 7, "sessions is 7, its records say 0"),
        ("prefillGpuNanoseconds", "1", "prefillGpuNanoseconds is 1, its records say 16666666666"),
        ("tokens", {"prompt": 8, "completion": 11}, "tokens.prompt is 8, its records say 7"),
    ],
)
def test_a_final_report_that_states_what_its_records_do_not_is_told(
    path: Path, field: str, value: object, told: str
) -> None:
    assert run(path, "--check").exit_code == 0
    change_report(path, lambda report: report["status"].update({field: value}))
    checked = run(path, "--check")
    assert checked.exit_code == 1
    assert f"acme's {told}" in checked.output


def test_a_report_and_a_price_plan_that_were_changed_beside_their_hashes_are_told(path: Path) -> None:
    change_report(path, lambda report: report["metadata"].update(name="other"), digest=False)
    assert "the bytes of acme's Final report are not those of its digest" in run(path, "--check").output
    change(path, "price_plans", "UPDATE price_plans SET spec = CAST(replace(spec, '2.39', '1.39') AS BLOB)")
    told = run(path, "--check")
    assert told.exit_code == 1
    assert "price plan default: the spec that is kept under the hash" in told.output
    assert "acme's price plan is not the one with which the period was opened" in told.output


def test_accounts_that_do_not_add_up_end_with_1(path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.execute("DROP TRIGGER pod_accounts_no_update")
    raw.execute("UPDATE pod_accounts SET idle = idle + 1")
    raw.commit()
    raw.close()
    told = run(path)
    assert told.exit_code == 1
    assert "DIFFERS" in told.output


def test_accounts_without_a_ledger_end_with_2_and_a_sentence(tmp_path: Path) -> None:
    told = run(tmp_path / "absent.db")
    assert (told.exit_code, "There is no ledger at" in told.stderr) == (2, True)
    assert "is no time; write" in run(tmp_path / "absent.db", "--since", "yesterday").stderr


def test_all_wrong_settings_are_told_at_once(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"short")
    with pytest.raises(SettingsInvalid) as invalid:
        read_settings(
            {"GPUMETER_PERIOD": "7m", "GPUMETER_PULL_INTERVAL_MS": "-1", "GPUMETER_MASTER_KEY_FILE": str(key)}
        )
    told = "\n".join(invalid.value.problems)
    assert len(invalid.value.problems) == 3
    for part in ("GPUMETER_PERIOD is '7m'; set one of 1m, 5m, 15m, 1h", "PULL_INTERVAL_MS is '-1'", "holds 5 bytes"):
        assert part in told


def test_settings_have_defaults(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    settings = read_settings({"GPUMETER_MASTER_KEY_FILE": str(key)})
    assert (settings.granularity, settings.pull_interval_ms, settings.grace_s) == (Granularity.HOUR, 2000, 600)
    assert settings.ledger_url == "sqlite:////var/lib/gpumeter/ledger.db"
