"""Energy in reports: an estimate of which every millijoule has one owner, from a pod's records to a service's day."""

import json
import sqlite3
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumeter_operator.adapters.ledger import rollups
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.audit_energy import energy_due
from gpumeter_operator.billing.energy import energy_mj
from gpumeter_operator.billing.facts import PLATFORM, Line
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account, Kind
from rigs.audited import HOUR_NS, audited, digested
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, open_ledger, started, worker

SERVICE = ("team-a", "smollm2")
PERIOD_NS = START_NS + MINUTE_NS


def lines(uid: str, energy: tuple[int, int] | None, **used_ns: int) -> tuple[Line, ...]:
    attributed, idle = energy or (None, None)
    stated = [(Account.ATTRIBUTED, attributed), (Account.IDLE, idle)] if energy else []
    return (
        *(Line(uid, "b", Kind.ACCOUNT, account, "", "cuda", energy_mj=mj) for account, mj in stated),
        *(
            Line(uid, "b", Kind.SESSION, Account.ATTRIBUTED, tenant, "cuda", gpu_ns=gpu_ns)
            for tenant, gpu_ns in used_ns.items()
        ),
    )


def test_what_steps_drew_goes_by_measured_time_and_the_rest_is_the_platforms() -> None:
    pods = [lines("one", (1_000, 300), acme=3, beta=1), lines("two", (10, 5), acme=1)]
    assert energy_mj(pods) == {"acme": 760, "beta": 250, PLATFORM: 305}


def test_who_ran_only_where_nobody_measures_has_no_energy_instead_of_none_of_it() -> None:
    assert energy_mj([lines("one", None, acme=3), lines("two", (0, 5), beta=1)]) == {"beta": 0, PLATFORM: 5}
    assert energy_mj([lines("one", None, acme=3)]) == {}


def test_energy_of_steps_in_a_period_in_which_none_ended_is_the_platforms() -> None:
    assert energy_mj([lines("one", (70, 5))]) == {PLATFORM: 75}


@given(
    st.lists(
        st.tuples(
            st.none() | st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)),
            st.dictionaries(st.sampled_from("abcde"), st.integers(0, 10**13)),
        ),
        max_size=5,
    )
)
def test_no_energy_is_lost_and_an_auditor_who_reckons_otherwise_finds_the_same(
    of_pods: list[tuple[tuple[int, int] | None, dict[str, int]]],
) -> None:
    found = energy_mj(lines(str(number), energy, **used) for number, (energy, used) in enumerate(of_pods))
    assert sum(found.values()) == sum(sum(energy) for energy, _ in of_pods if energy)
    raw = [({"attributed": energy[0], "idle": energy[1]} if energy else {}, used) for energy, used in of_pods]
    assert energy_due(raw) == found


def joules(reports: Mapping[tuple[int, str], dict[str, Any]]) -> dict[str, str | None]:
    return {tenant: report["status"].get("energyJoules") for (_, tenant), report in sorted(reports.items())}


def filled(path: Path, *, measured: bool) -> Ledger:
    """Two workers of one service in one minute; of the first, energy is measured or not, of the second it is not."""
    ledger = open_ledger(path)
    for number in (1, 2):
        fake = FakeWorker(worker(number), START_NS)
        fake.serve("s-1", "acme", START_NS + 20 * SECOND_NS)
        fake.serve("s-2", "beta-corp", START_NS + 30 * SECOND_NS)
        if measured and number == 1:
            fake.draw(9_000_001, 2_000_000)
        fake.spend(Account.IDLE, START_NS + 50 * SECOND_NS)
        if measured and number == 1:
            fake.draw(0, 1_500_500)
        fake.seal()
        life = [started("c", START_NS), ended("c", START_NS + 50 * SECOND_NS), gone(START_NS + 50 * SECOND_NS)]
        ledger.observe(fake.identity, life, START_NS + MINUTE_NS)
        ledger.take(fake.identity, fake.page("boot-1", 0), START_NS + MINUTE_NS)
    closer = Closer(ledger, MINUTE_NS)
    closer.close_all(Pricing({}, {}), START_NS + 30 * MINUTE_NS)
    closer.close_all(Pricing({}, {}), START_NS + 15 * HOUR_NS)  # the day is over
    return ledger


def test_the_reports_of_a_service_add_up_to_what_its_pods_measured(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db", measured=True)
    found = joules(finals(ledger))
    assert found == {PLATFORM: "3500.5", "acme": "6000.001", "beta-corp": "3000"}
    assert sum(Decimal(each or 0) for each in found.values()) == Decimal(9_000_001 + 2_000_000 + 1_500_500) / 1000
    days = rollups.rollup_bodies(ledger.engine, SERVICE, Granularity.DAY, 0)
    assert {tenant: json.loads(body)["status"]["energyJoules"] for _, tenant, body in days} == found
    digested(ledger)
    assert audited(ledger) == []


def test_without_nvml_no_report_says_anything_of_energy(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db", measured=False)
    assert joules(finals(ledger)) == {PLATFORM: None, "acme": None, "beta-corp": None}


def test_the_cache_that_sessions_held_is_in_their_tenants_reports(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db", measured=False)
    held = {tenant: report["status"].get("kvByteSeconds") for (_, tenant), report in finals(ledger).items()}
    assert held == {PLATFORM: None, "acme": "10000", "beta-corp": "10000"}


def test_rows_of_an_earlier_schema_give_the_reports_that_were_made_of_them(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    filled(path, measured=False).close()
    raw = sqlite3.connect(path)
    raw.execute("DROP TRIGGER records_no_update")
    raw.execute("UPDATE records SET kv_byte_s = NULL")
    raw.commit()
    raw.close()
    reader = Reader(f"sqlite:///{path}")
    told = {each.message.partition(": ")[2] for each in audited(reader) if each.reason == "ReportBytes"}
    assert any("kvByteSeconds" in each for each in told)  # these were made of newer rows
    assert not [each for each in audited(reader) if each.reason == "RecordDiffers"]


@pytest.mark.parametrize("change", ["energy_mj = energy_mj + 1", "energy_mj = NULL"])
def test_an_energy_that_was_changed_beside_its_record_is_found_and_named(tmp_path: Path, change: str) -> None:
    path = tmp_path / "ledger.db"
    filled(path, measured=True).close()
    raw = sqlite3.connect(path)
    raw.execute("DROP TRIGGER records_no_update")
    assert raw.execute(f"UPDATE records SET {change} WHERE energy_mj = 9000001").rowcount == 1
    raw.commit()
    raw.close()
    told = [each for each in audited(Reader(f"sqlite:///{path}")) if each.reason == "RecordDiffers"]
    assert len(told) == 1
    assert "the column energy_mj" in told[0].message
