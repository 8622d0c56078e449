"""Days and months, from the hours to frozen sums: what they say, and when."""

import json
import random
import shutil
import sqlite3
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gpumeter_operator.adapters.ledger import rollups
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import DAY_NS, MINUTE_NS, Granularity, day_of, month_of, period_of, rfc3339
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, Crash, CrashAt, FakeWorker, ended, gone, open_ledger, started, worker

SERVICE = ("team-a", "smollm2")
HOUR_NS = 60 * MINUTE_NS
SPEC = b'{"currency":"USD","rates":[{"gpuClass":"h100","perGpuHour":"1.234567"}]}'
DAY = day_of(START_NS + 1)
MONTH = month_of(START_NS + 1)
GRACE_NS = 10 * MINUTE_NS


def lived(ledger: Ledger, number: int, hours: int, seed: int = 1) -> FakeWorker:
    """A pod that ran for some hours from START_NS, with a session of a tenant now and then; all of it is collected."""
    identity, random_ = worker(number), random.Random(seed)
    fake = FakeWorker(identity, START_NS)
    for hour in range(hours):
        fake.spend(Account.IDLE, START_NS + hour * HOUR_NS + random_.randrange(1, 50 * MINUTE_NS))
        tenant = random_.choice(("acme", "beta-corp"))
        fake.serve(f"s-{number}-{hour}", tenant, fake.frontier_ns + random_.randrange(1, 9 * MINUTE_NS), batch=3)
    fake.spend(Account.DRAIN, START_NS + hours * HOUR_NS)
    fake.seal()
    end_ns = START_NS + hours * HOUR_NS
    ledger.observe(identity, [started("c", START_NS), ended("c", end_ns), gone(end_ns)], end_ns)
    ledger.take(identity, fake.page("boot-1", 0, 10**6), end_ns)
    return fake


def closed(ledger: Ledger, now_ns: int, spec: bytes = b"") -> dict[str, dict[str, Any]]:
    """What the round at this time publishes, by name."""
    hashes = {"default": ledger.keep_plan("default", 1, spec, START_NS)} if spec else {}
    found = Closer(ledger, GRACE_NS).close_all(Pricing({}, hashes), now_ns)
    return {each["metadata"]["name"]: each for each in found}


def days(ledger: Ledger, granularity: Granularity = Granularity.DAY) -> dict[tuple[int, str], dict[str, Any]]:
    """The Final days or months that the ledger keeps."""
    found = rollups.rollup_bodies(ledger.engine, SERVICE, granularity, 0)
    return {(end_ns, tenant): json.loads(body) for end_ns, tenant, body in found}


def hours_of(ledger: Ledger) -> list[dict[str, Any]]:
    return [json.loads(body) for _, _, body in ledger.final_reports(*SERVICE)]


def test_a_day_is_the_exact_sum_of_its_hours_amounts_and_accounts_included(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    for number in (1, 2):
        lived(ledger, number, 5, seed=number)
    closed(ledger, DAY.end_ns + HOUR_NS, SPEC)
    found, parts = days(ledger), hours_of(ledger)
    assert {tenant for _, tenant in found} == {"acme", "beta-corp", PLATFORM}
    for (end_ns, tenant), day in found.items():
        own = [each for each in parts if each["spec"]["tenant"] == tenant]
        assert end_ns == DAY.end_ns
        for name in ("gpuNanoseconds", "prefillGpuNanoseconds", "decodeGpuNanoseconds", "batchNanoseconds"):
            assert int(day["status"][name]) == sum(int(each["status"][name]) for each in own)
        assert Decimal(day["status"]["amount"]) == sum(Decimal(each["status"]["amount"]) for each in own)
        assert day["status"]["sessions"] == sum(each["status"]["sessions"] for each in own)
        assert day["status"]["recordCount"] == sum(each["status"]["recordCount"] for each in own)
    whole = found[DAY.end_ns, PLATFORM]
    assert int(whole["status"]["accounts"]["allocated"]) == 2 * 5 * HOUR_NS
    assert sum(int(day["status"]["gpuNanoseconds"]) for day in found.values()) == 2 * 5 * HOUR_NS
    assert whole["metadata"]["name"] == "smollm2-platform-20261121"
    assert whole["metadata"]["labels"]["gpumeter.io/granularity"] == "Day"
    assert whole["status"]["completeness"] == {
        "periods": 5,
        "completePeriods": 5,
        "expectedWorkers": 2,
        "reportedWorkers": 2,
        "missing": [],
    }
    assert {each["type"]: each["status"] for each in whole["status"]["conditions"]} == dict.fromkeys(
        ("Complete", "Reconciled", "Measured", "Priced"), "True"
    )
    assert audit(ledger, SERVICE) == []


def condition(report: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(each for each in report["status"]["conditions"] if each["type"] == kind)


def test_a_month_is_the_exact_sum_of_its_days_and_the_day_after_is_another_ones(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    lived(ledger, 1, 30)  # into the second day
    closed(ledger, MONTH.end_ns + HOUR_NS, SPEC)
    found, whole = days(ledger), days(ledger, Granularity.MONTH)
    assert {end_ns for end_ns, _ in found} == {DAY.end_ns, DAY.end_ns + DAY_NS}
    for (end_ns, tenant), month in whole.items():
        own = [each for (_, name), each in found.items() if name == tenant]
        assert end_ns == MONTH.end_ns
        assert int(month["status"]["gpuNanoseconds"]) == sum(int(each["status"]["gpuNanoseconds"]) for each in own)
        assert Decimal(month["status"]["amount"]) == sum(Decimal(each["status"]["amount"]) for each in own)
        assert month["status"]["completeness"]["periods"] == 30
    platform = whole[MONTH.end_ns, PLATFORM]
    assert (platform["metadata"]["name"], platform["status"]["period"]) == ("smollm2-platform-202611", "2026-11")
    assert sum(int(each["status"]["gpuNanoseconds"]) for each in whole.values()) == 30 * HOUR_NS


def test_a_day_is_open_then_closing_then_final_and_each_says_why(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    identity, fake = worker(), FakeWorker(worker(), START_NS)
    fake.spend(Account.IDLE, DAY.end_ns - 1)  # a nanosecond short: the last hour waits for it
    ledger.observe(identity, [started("c", START_NS)], START_NS)
    ledger.take(identity, fake.page("boot-1", 0, 10**6), DAY.end_ns)
    ledger.settle(identity.worker_uid, fake.frontier_ns)
    name = "smollm2-platform-20261121"

    running = closed(ledger, START_NS + 5 * HOUR_NS + MINUTE_NS)[name]
    assert (running["status"]["phase"], condition(running, "Complete")["reason"]) == ("Open", "PeriodRunning")
    assert int(running["status"]["gpuNanoseconds"]) == 5 * HOUR_NS, "an open day holds the hours that are Final"
    assert "digest" not in running["status"]

    over = closed(ledger, DAY.end_ns + MINUTE_NS)[name]
    assert (over["status"]["phase"], condition(over, "Complete")["status"]) == ("Closing", "Unknown")
    assert condition(over, "Complete")["message"] == (
        "Waiting for 1 period of the day, first for that which ended 2026-11-22T00:00:00Z."
    )
    final = closed(ledger, DAY.end_ns + GRACE_NS)[name]
    told = condition(final, "Complete")
    assert (final["status"]["phase"], told["status"], told["reason"]) == ("Final", "False", "WorkerBehind")
    assert int(final["status"]["gpuNanoseconds"]) == 14 * HOUR_NS
    assert final["status"]["completeness"] == {
        "periods": 14,
        "completePeriods": 13,
        "expectedWorkers": 1,
        "reportedWorkers": 0,
        "missing": [
            {
                "period": "2026-11-21T23:00:00Z",
                "workerUid": "pod-uid-1",
                "pod": "smollm2-1",
                "reason": "WorkerBehind",
                "message": "its records reach to 2026-11-21T23:59:59Z.",
                "since": "2026-11-21T23:59:59Z",
            }
        ],
    }


def test_a_tenant_without_usage_in_the_incomplete_hour_is_told_of_it_too(tmp_path: Path) -> None:
    """Its records may be the very ones that were lost."""
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    identity, fake = worker(), FakeWorker(worker(), START_NS)
    fake.serve("s-1", "acme", START_NS + HOUR_NS)
    ledger.observe(identity, [started("c", START_NS), gone(START_NS + 2 * HOUR_NS)], START_NS)
    ledger.observe(identity, [ended("c", START_NS + 2 * HOUR_NS)], START_NS)
    ledger.take(identity, fake.page("boot-1", 0, 10**6), DAY.end_ns)
    ledger.settle(identity.worker_uid, fake.frontier_ns)
    closed(ledger, DAY.end_ns + GRACE_NS)
    acme = days(ledger)[DAY.end_ns, "acme"]
    assert (condition(acme, "Complete")["status"], condition(acme, "Complete")["reason"]) == ("False", "SealMissing")
    [missing] = acme["status"]["completeness"]["missing"]
    assert (missing["bootId"], missing["first"]) == ("boot-1", len(fake.boot.links) + 1), "which gap"
    assert (missing["since"], missing["period"]) == (rfc3339(START_NS + HOUR_NS), rfc3339(START_NS + HOUR_NS))


def test_a_service_that_fell_asleep_has_its_day_closed_all_the_same(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    lived(ledger, 1, 2)
    closed(ledger, START_NS + 3 * HOUR_NS)
    assert days(ledger) == {}
    closed(ledger, DAY.end_ns + MINUTE_NS)
    assert (DAY.end_ns, PLATFORM) in days(ledger)
    assert closed(ledger, DAY.end_ns + 2 * MINUTE_NS).keys() == {
        f"smollm2-{name}-202611" for name in ("acme", "beta--corp", "platform")
    }, "a Final day is not made again, and the month goes on"


def test_a_late_fact_never_changes_a_final_day_and_stands_in_the_next_with_its_origin(tmp_path: Path) -> None:
    """An hour of the day in which nobody was known to live has no report that could refuse it; its day has."""
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    lived(ledger, 1, 2)
    closed(ledger, DAY.end_ns + MINUTE_NS, SPEC)
    before = rollups.rollup_bodies(ledger.engine, SERVICE, Granularity.DAY, 0)
    identity = worker(7)
    late = FakeWorker(identity, START_NS + 5 * HOUR_NS)
    late.serve("s-late", "acme", START_NS + 5 * HOUR_NS + MINUTE_NS)
    late.seal()
    life = [started("c", START_NS + 5 * HOUR_NS), ended("c", START_NS + 5 * HOUR_NS + MINUTE_NS)]
    now_ns = DAY.end_ns + 2 * MINUTE_NS
    ledger.observe(identity, [*life, gone(now_ns)], now_ns)
    ledger.take(identity, late.page("boot-1", 0, 10**6), now_ns)
    closed(ledger, DAY.end_ns + DAY_NS + MINUTE_NS, SPEC)
    assert rollups.rollup_bodies(ledger.engine, SERVICE, Granularity.DAY, 0, DAY.end_ns) == before
    following = days(ledger)[DAY.end_ns + DAY_NS, "acme"]
    assert following["status"]["gpuNanoseconds"] == str(MINUTE_NS)
    adjustments = following["status"]["adjustments"]
    told = {each["reason"]: each for each in adjustments}
    assert told["LateRecords"] == {
        "originalPeriodEnd": rfc3339(START_NS + 6 * HOUR_NS),
        "workerUid": "pod-uid-7",
        "bootId": "boot-1",
        "first": 1,
        "last": 3,
        "reason": "LateRecords",
        "message": told["LateRecords"]["message"],
        "actor": "gpumeter-collector",
        "allocatedNanoseconds": "0",
    }
    assert "arrived after the period that ended" in told["LateRecords"]["message"]
    assert sum(int(each["allocatedNanoseconds"]) for each in adjustments) == MINUTE_NS
    whole = [each for (end_ns, _), each in days(ledger).items() if end_ns > DAY.end_ns]
    assert sum(int(each["status"]["gpuNanoseconds"]) for each in whole) == MINUTE_NS
    assert audit(ledger, SERVICE) == []


def test_a_day_in_which_the_length_of_periods_changed_is_the_sum_of_both(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    ledger.set_granularity(Granularity.FIFTEEN_MINUTES, START_NS + HOUR_NS + 1)  # from the next full hour
    lived(ledger, 1, 4)
    closed(ledger, DAY.end_ns + MINUTE_NS, SPEC)
    lengths = [each["spec"]["period"]["granularity"] for each in hours_of(ledger) if each["spec"]["tenant"] == PLATFORM]
    assert lengths == ["Hour"] * 2 + ["FifteenMinutes"] * 8
    found = days(ledger)
    assert found[DAY.end_ns, PLATFORM]["status"]["completeness"]["completePeriods"] == 10
    assert sum(int(each["status"]["gpuNanoseconds"]) for each in found.values()) == 4 * HOUR_NS
    assert audit(ledger, SERVICE) == []


def test_a_day_whose_price_plan_changed_names_both_versions_and_adds_up(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    dearer = SPEC.replace(b"1.234567", b"2.5")
    lived(ledger, 1, 4)
    ledger.keep_plan("default", 1, SPEC, START_NS)
    ledger.keep_plan("default", 2, dearer, START_NS + 2 * HOUR_NS)
    Closer(ledger, GRACE_NS).close_all(Pricing({}, {}), DAY.end_ns + MINUTE_NS)
    whole = days(ledger)[DAY.end_ns, PLATFORM]
    assert [plan["version"] for plan in whole["status"]["pricePlans"]] == [1, 2]
    own = [each for each in hours_of(ledger) if each["spec"]["tenant"] == PLATFORM]
    assert Decimal(whole["status"]["amount"]) == sum(Decimal(each["status"]["amount"]) for each in own)


def test_a_day_with_an_unpriced_hour_has_no_amount_rather_than_too_small_a_one(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    lived(ledger, 1, 3)
    ledger.keep_plan("default", 1, SPEC, START_NS + HOUR_NS)
    ledger.open_period(SERVICE, day_hour(0), "default", "", START_NS)
    Closer(ledger, GRACE_NS).close_all(Pricing({}, {}), DAY.end_ns + MINUTE_NS)
    whole = days(ledger)[DAY.end_ns, PLATFORM]
    assert "amount" not in whole["status"] and "amountDue" not in whole["status"]
    told = condition(whole, "Priced")
    assert (told["status"], told["reason"]) == ("False", "NoPricePlan")
    assert told["message"].startswith("1 of the reports that it is the sum of has no amount, first that of the period")


def day_hour(number: int) -> Any:
    return period_of(START_NS + number * HOUR_NS + 1, Granularity.HOUR)


def everything(ledger: Ledger) -> list[object]:
    found: list[object] = list(ledger.final_reports(*SERVICE))
    for granularity in (Granularity.DAY, Granularity.MONTH):
        found += rollups.rollup_bodies(ledger.engine, SERVICE, granularity, 0)
    return found


class CrashAtWrite(CrashAt):
    """Counts what changes the ledger only: between two reads it is the same."""

    def __call__(self, *arguments: object, **named: object) -> None:
        statement = arguments[2] if len(arguments) > 2 else "COMMIT"
        if not str(statement).startswith(("SELECT", "BEGIN", "PRAGMA")):
            super().__call__()


def test_a_collector_killed_at_any_write_of_a_closing_makes_the_same_bytes(tmp_path: Path) -> None:
    """An hour, its day and its month become Final in one round; who is killed is followed by another, an hour later."""
    first = open_ledger(tmp_path / "facts.db", Granularity.HOUR)
    lived(first, 1, 2)
    closed(first, START_NS + HOUR_NS + MINUTE_NS, SPEC)  # the first hour is Final, the rest is to be closed
    first.close()

    def close(path: Path, at: int, now_ns: int) -> CrashAt:
        ledger, crash = open_ledger(path, Granularity.HOUR), CrashAtWrite(at)
        crash.watch(ledger)
        try:
            Closer(ledger, GRACE_NS).close_all(Pricing({}, {}), now_ns)
        except Crash:
            pass
        finally:
            ledger.close()
        return crash

    shutil.copy(tmp_path / "facts.db", tmp_path / "whole.db")
    points = close(tmp_path / "whole.db", -1, MONTH.end_ns + HOUR_NS).count
    expected = everything(open_ledger(tmp_path / "whole.db", Granularity.HOUR))
    assert {json.loads(row[2])["spec"]["period"]["granularity"] for row in expected} == {"Hour", "Day", "Month"}
    for at in range(1, points + 1):
        path = tmp_path / f"killed-{at}.db"
        shutil.copy(tmp_path / "facts.db", path)
        assert close(path, at, MONTH.end_ns + HOUR_NS).happened
        close(path, -1, MONTH.end_ns + 2 * HOUR_NS)
        again = open_ledger(path, Granularity.HOUR)
        assert everything(again) == expected, f"killed before write {at}"
        again.close()
        path.unlink()
    assert points > 15, "the crash points were not reached"


@pytest.mark.parametrize("seed", range(2))
def test_rounds_at_any_time_and_restarts_in_between_make_the_same_days_and_months(tmp_path: Path, seed: int) -> None:
    random_, now_ns = random.Random(seed), START_NS
    at_once, step_by_step = (open_ledger(tmp_path / f"{name}.db", Granularity.HOUR) for name in ("once", "steps"))
    for ledger in (at_once, step_by_step):
        lived(ledger, 1, 16)
        lived(ledger, 2, 3, seed=5)
        ledger.keep_plan("default", 1, SPEC, START_NS)
    closer = Closer(step_by_step, GRACE_NS)
    while now_ns < MONTH.end_ns + HOUR_NS:
        now_ns += random_.randrange(HOUR_NS, 40 * HOUR_NS)
        closer.close_all(Pricing({}, {}), now_ns)
        if random_.random() < 0.3:
            closer = Closer(step_by_step, GRACE_NS)
    Closer(at_once, GRACE_NS).close_all(Pricing({}, {}), now_ns)
    assert everything(step_by_step) == everything(at_once)
    assert audit(step_by_step, SERVICE) == []


def test_a_day_that_was_changed_is_found(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    lived(ledger, 1, 2)
    closed(ledger, DAY.end_ns + MINUTE_NS, SPEC)
    ledger.close()
    raw = sqlite3.connect(tmp_path / "ledger.db")
    raw.execute("DROP TRIGGER rollups_no_update")
    raw.execute("UPDATE rollups SET body = replace(body, '\"sessions\":', '\"sessions\":1') WHERE tenant = 'acme'")
    raw.commit()
    raw.close()
    [told] = audit(open_ledger(tmp_path / "ledger.db", Granularity.HOUR), SERVICE)
    assert told.endswith("acme's report is not the sum of its periods' reports")


class Interrupted(Ledger):
    """A ledger into which an ordinary new pod comes, once, while the first day is folded."""

    asked = 0

    def opened_ends(self, namespace: str, service: str, final_ns: int) -> list[int]:
        self.asked += 1
        if self.asked == 2:  # first for the hours, then for the day
            self.observe(worker(9), [started("c9", THREE_DAYS_ON_NS - 5 * 10**9)], THREE_DAYS_ON_NS)
        return super().opened_ends(namespace, service, final_ns)


THREE_DAYS_ON_NS = DAY.end_ns + 3 * DAY_NS


def test_of_days_that_wait_no_later_one_is_closed_over_the_head_of_an_earlier(tmp_path: Path) -> None:
    open_ledger(tmp_path / "ledger.db", Granularity.HOUR).close()
    ledger = Interrupted(f"sqlite:///{tmp_path / 'ledger.db'}")
    lived(ledger, 1, 60)  # three days
    closer = Closer(ledger, GRACE_NS)
    closer.close_all(Pricing({}, {}), THREE_DAYS_ON_NS)
    assert days(ledger) == {}, "a fact came in while the first was folded"
    for number in range(1, 4):
        closer.close_all(Pricing({}, {}), THREE_DAYS_ON_NS + number * 10**10)
    assert sorted({end_ns for end_ns, _ in days(ledger)}) == [DAY.end_ns + number * DAY_NS for number in range(3)]
    assert audit(ledger, SERVICE) == []


def test_a_day_that_is_missing_before_a_later_one_is_found(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    lived(ledger, 1, 60)
    closed(ledger, THREE_DAYS_ON_NS)
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("DROP TRIGGER rollups_no_delete")
        connection.execute("DELETE FROM rollups WHERE period_end_ns = ?", (DAY.end_ns,))
    told = audit(Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), SERVICE)
    assert any(f"the day that ended {rfc3339(DAY.end_ns)}: it has no report" in problem for problem in told), told
