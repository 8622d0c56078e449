"""What goes wrong with the bills of other systems, and is a test here, named after it. Those of closing are these:

- accrual after the pod is gone: test_nothing_accrues_after_the_pod_is_gone, and
  test_pods_that_went_while_nobody_watched_accrue_nothing_more (sim)
- a sealed hour is not 3,600 s: here
- reconfiguration inside the hour misprices: here (another size), test_a_day_whose_price_plan_changed_..., and
  test_a_day_in_which_the_length_of_periods_changed_is_the_sum_of_both
- sealed rows cannot be corrected: here, and test_a_late_fact_never_changes_a_final_day_...
- counters in memory reset by a restart: here, and test_a_collector_killed_at_any_write_of_a_closing_...
- idle counted twice: here
- a fraction of a GPU charged as a whole: here
"""

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.facts import PLATFORM, Worker
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, ended, gone, open_ledger, started, worker

HOUR_NS = 60 * MINUTE_NS
SERVICE = ("team-a", "smollm2")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return open_ledger(tmp_path / "ledger.db", Granularity.HOUR)


def taken(ledger: Ledger, fake: FakeWorker, begun_ns: int, end_ns: int | None = None) -> None:
    events = [started("c", begun_ns), *([] if end_ns is None else [ended("c", end_ns), gone(end_ns)])]
    ledger.observe(fake.identity, events, fake.frontier_ns)
    for boot in fake.boots:
        ledger.take(fake.identity, fake.page(boot.boot_id, 0, 10**6), fake.frontier_ns)
    ledger.settle(fake.identity.worker_uid, fake.frontier_ns)


def hour(ledger: Ledger, number: int = 1) -> dict[str, dict[str, Any]]:
    """The Final reports of an hour, by tenant."""
    end_ns = START_NS + number * HOUR_NS
    return {tenant: json.loads(body) for end, tenant, body in ledger.final_reports(*SERVICE) if end == end_ns}


def close(ledger: Ledger, now_ns: int) -> None:
    Closer(ledger, 10 * MINUTE_NS).close_all(Pricing({}, {}), now_ns)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_sealed_hour_of_a_pod_that_lived_through_it_is_3600_seconds_a_gpu(ledger: Ledger, devices: int) -> None:
    fake = FakeWorker(worker(devices=devices), START_NS)
    fake.serve("s-1", "acme", START_NS + 7 * MINUTE_NS + 123_456_789)
    fake.spend(Account.IDLE, START_NS + HOUR_NS + MINUTE_NS)
    taken(ledger, fake, START_NS)
    close(ledger, START_NS + HOUR_NS + MINUTE_NS)
    found = hour(ledger)
    assert sum(int(each["status"]["gpuNanoseconds"]) for each in found.values()) == devices * 3600 * SECOND_NS
    assert int(found[PLATFORM]["status"]["accounts"]["allocated"]) == devices * 3600 * SECOND_NS


def test_a_service_that_is_given_more_gpus_inside_the_hour_pays_each_pod_by_its_own_size(ledger: Ledger) -> None:
    half_ns = START_NS + 30 * MINUTE_NS
    for number, devices, begun_ns, end_ns in ((1, 1, START_NS, half_ns), (2, 4, half_ns, START_NS + HOUR_NS)):
        fake = FakeWorker(worker(number, devices=devices), begun_ns)
        fake.spend(Account.IDLE, end_ns)
        fake.seal()
        taken(ledger, fake, begun_ns, end_ns)
    close(ledger, START_NS + HOUR_NS + MINUTE_NS)
    assert int(hour(ledger)[PLATFORM]["status"]["accounts"]["allocated"]) == (1 + 4) * 30 * MINUTE_NS


def test_a_sealed_hour_is_corrected_by_an_entry_of_the_next_and_stays_as_it_is(ledger: Ledger) -> None:
    fake = FakeWorker(worker(), START_NS)
    fake.serve("s-1", "acme", START_NS + 10 * MINUTE_NS)
    taken(ledger, fake, START_NS)
    close(ledger, START_NS + HOUR_NS + 10 * MINUTE_NS)
    sealed = ledger.final_reports(*SERVICE)
    assert {each["type"]: each["status"] for each in hour(ledger)["acme"]["status"]["conditions"]}[
        "Complete"
    ] == "False"
    fake.serve("s-2", "acme", START_NS + 20 * MINUTE_NS)  # it was cut off, and is back
    fake.spend(Account.IDLE, START_NS + 2 * HOUR_NS + MINUTE_NS)
    taken(ledger, fake, START_NS)
    close(ledger, START_NS + 2 * HOUR_NS + MINUTE_NS)
    assert ledger.final_reports(*SERVICE)[: len(sealed)] == sealed
    following = hour(ledger, 2)["acme"]["status"]
    assert following["gpuNanoseconds"] == str(10 * MINUTE_NS)
    assert [(each["originalPeriodEnd"], each["actor"]) for each in following["adjustments"]] == [
        ("2026-11-21T11:00:00Z", "gpumeter-collector")
    ]
    assert audit(ledger, SERVICE) == []


def test_a_restart_of_worker_and_collector_inside_the_hour_resets_no_figure(ledger: Ledger, tmp_path: Path) -> None:
    fake = FakeWorker(worker(), START_NS)
    fake.serve("s-1", "acme", START_NS + 10 * MINUTE_NS)
    taken(ledger, fake, START_NS)
    before = Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), START_NS + 11 * MINUTE_NS)
    ledger.close()
    fake.restart("boot-2", START_NS + 11 * MINUTE_NS)
    fake.serve("s-2", "acme", START_NS + 15 * MINUTE_NS)
    again = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    taken(again, fake, START_NS)
    after = Closer(again, MINUTE_NS).close_all(Pricing({}, {}), START_NS + 16 * MINUTE_NS)
    used = [next(each for each in found if each["spec"]["tenant"] == "acme")["status"] for found in (before, after)]
    assert [int(each["gpuNanoseconds"]) for each in used] == [10 * MINUTE_NS, 14 * MINUTE_NS]
    assert [each["sessions"] for each in used] == [1, 2]


def test_idle_is_counted_once_and_by_no_tenant(ledger: Ledger) -> None:
    for number in (1, 2):
        fake = FakeWorker(worker(number), START_NS)
        fake.spend(Account.HOST_GAP, START_NS + 5 * MINUTE_NS)
        fake.serve(f"s-{number}", ("acme", "beta-corp")[number - 1], START_NS + 20 * MINUTE_NS)
        fake.spend(Account.IDLE, START_NS + HOUR_NS)
        fake.seal()
        taken(ledger, fake, START_NS, START_NS + HOUR_NS)
    close(ledger, START_NS + HOUR_NS + MINUTE_NS)
    found = hour(ledger)
    accounts = {name: int(ns) for name, ns in found[PLATFORM]["status"]["accounts"].items()}
    assert accounts["idle"] == 2 * 45 * MINUTE_NS and accounts["hostGap"] == 2 * 5 * MINUTE_NS, "a part, not beside it"
    assert int(found[PLATFORM]["status"]["gpuNanoseconds"]) == accounts["idle"]
    assert [int(found[tenant]["status"]["gpuNanoseconds"]) for tenant in ("acme", "beta-corp")] == [15 * MINUTE_NS] * 2
    assert sum(int(each["status"]["gpuNanoseconds"]) for each in found.values()) == 2 * HOUR_NS


def test_a_fraction_of_a_gpu_is_priced_as_the_fraction(ledger: Ledger) -> None:
    rates = b'{"gpuClass":"h100","perGpuHour":"7"},{"gpuClass":"h100-mig-1g.10gb","perGpuHour":"1"}'
    ledger.keep_plan("default", 1, b'{"currency":"USD","rates":[' + rates + b"]}", START_NS)
    for number, gpu_class in ((1, "h100"), (2, "h100-mig-1g.10gb")):
        identity: Worker = replace(worker(number), gpu_class=gpu_class)
        fake = FakeWorker(identity, START_NS)
        fake.serve(f"s-{number}", "acme", START_NS + 30 * MINUTE_NS)
        fake.spend(Account.IDLE, START_NS + HOUR_NS)
        fake.seal()
        taken(ledger, fake, START_NS, START_NS + HOUR_NS)
    close(ledger, START_NS + HOUR_NS + MINUTE_NS)
    assert Decimal(hour(ledger)["acme"]["status"]["amount"]) == Decimal("3.5") + Decimal("0.5")
