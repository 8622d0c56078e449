"""Reports and prices, with exact figures."""

import json
from dataclasses import replace
from decimal import Decimal

import pytest

from gpumeter_operator.billing.accounts import Accounts, PodAccounts
from gpumeter_operator.billing.close import Missing, Phase, Verdict
from gpumeter_operator.billing.facts import PLATFORM, Line, Worker
from gpumeter_operator.billing.report import (
    PodPeriod,
    ServicePeriod,
    canonical_report,
    digest_of,
    report_name,
    reports,
)
from gpumeter_operator.billing.tariff import PeriodPlan, PlanInvalid, canonical_spec, plain, plan_from
from gpumeter_usage.period import SECOND_NS, Granularity, from_rfc3339, period_of
from gpumeter_usage.record import Account, Kind

PERIOD = period_of(from_rfc3339("2026-11-21T15:00:00Z"), Granularity.HOUR)
WORKER = Worker("uid", "team-a", "smollm2", "svc", "smollm2", "h100", 1, "smollm2-x")
PLAN = plan_from(
    "default",
    3,
    canonical_spec(
        {
            "currency": "USD",
            "rates": [
                {"gpuClass": "h100", "perGpuHour": "9.99", "effectiveFrom": "2027-01-01T00:00:00Z"},
                {"gpuClass": "h100", "perGpuHour": "0.80"},
                {"gpuClass": "cpu", "perGpuHour": "0.05"},
            ],
        }
    ),
)
IN_FORCE = PeriodPlan("default", PLAN, PERIOD.start_ns)
FINAL = Verdict(Phase.FINAL, "AllRecordsCommitted", "All records of 1 worker are in the ledger.", 1)


def slices(tenant: str, gpu_ns: int, **values: int) -> Line:
    return Line("uid", "boot-1", Kind.SESSION, Account.ATTRIBUTED, tenant, "cuda", 1, 1, 1, gpu_ns=gpu_ns, **values)


def hour(*lines: Line, allocated_ns: int = 100 * SECOND_NS, **changes: object) -> ServicePeriod:
    used_ns = sum(line.gpu_ns for line in lines)
    accounts = Accounts(
        allocated=allocated_ns, attributed=used_ns, idle=allocated_ns - used_ns - 7, unaccounted=7, host_gap=1
    )
    pods = (PodPeriod(WORKER, PodAccounts(accounts), lines),)
    whole = ServicePeriod("team-a", "smollm2", PERIOD, FINAL, pods, IN_FORCE, {})
    return replace(whole, **changes)  # type: ignore[arg-type]


def by_tenant(of: ServicePeriod) -> dict[str, dict]:  # type: ignore[type-arg]
    return {report["spec"]["tenant"]: report for report in reports(of)}


def test_the_reports_of_a_service_add_up_to_what_was_allocated() -> None:
    found = by_tenant(hour(slices("acme", 3 * SECOND_NS), slices("beta", 1_234_567_891)))
    assert {tenant: report["status"]["gpuNanoseconds"] for tenant, report in found.items()} == {
        "acme": "3000000000",
        "beta": "1234567891",
        PLATFORM: "95765432109",
    }
    assert found[PLATFORM]["status"]["accounts"] == {
        "allocated": "100000000000",
        "init": "0",
        "load": "0",
        "warmup": "0",
        "attributed": "4234567891",
        "nonbillable": "0",
        "idle": "95765432102",
        "drain": "0",
        "unaccounted": "7",
        "hostGap": "1",
    }
    assert "accounts" not in found["acme"]["status"]


def test_a_tenants_report_states_sessions_tokens_and_the_mean_batch() -> None:
    line = slices(
        "acme",
        1_200_000_000,
        prefill_ns=200_000_000,
        decode_ns=1_000_000_000,
        sessions=2,
        prompt_tokens=500,
        cached_tokens=20,
        completion_tokens=300,
        batch_ns=4_321_000_000,
    )
    status = by_tenant(hour(line))["acme"]["status"]
    assert status["tokens"] == {"prompt": 500, "cached": 20, "completion": 300, "total": 800}
    assert (status["sessions"], status["meanBatchSize"], status["gpuSeconds"]) == (2, "3.601", "1.2")
    # design/metering.md: 800 tokens in 1.2 s on a GPU at 0.80 an hour cost 0.000267, or 0.00033 per 1,000 tokens.
    assert (status["amount"], status["pricePerThousandTokens"]) == ("0.000266666667", "0.000333333334")


def test_the_rate_in_force_when_the_period_began_is_used_and_the_plan_is_named_with_its_hash() -> None:
    report = by_tenant(hour(slices("acme", 3600 * SECOND_NS), allocated_ns=7200 * SECOND_NS))["acme"]
    assert report["status"]["amount"] == report["status"]["amountDue"] == "0.8"
    assert report["spec"]["pricePlanRef"] == {"name": "default", "version": 3}
    assert report["spec"]["pricePlanHash"] == PLAN.hash


def test_without_a_price_plan_there_is_usage_and_no_amount_and_a_condition_says_so() -> None:
    report = by_tenant(hour(slices("acme", 5), plan=PeriodPlan("default", None)))["acme"]
    assert not {"amount", "amountDue", "currency"} & report["status"].keys()
    assert condition(report, "Priced")["reason"] == "NoPricePlan"


def test_a_class_of_gpu_without_a_rate_is_not_billed_at_another_ones() -> None:
    pods = (replace(hour(slices("acme", SECOND_NS)).pods[0], worker=replace(WORKER, gpu_class="a100")),)
    report = by_tenant(hour(pods=pods))["acme"]
    assert "amount" not in report["status"]
    assert condition(report, "Priced")["reason"] == "NoRate"
    assert "no rate for gpuClass a100" in condition(report, "Priced")["message"]


def test_an_incomplete_period_names_who_is_missing() -> None:
    missing = Missing("uid", "smollm2-x", "SealMissing", "it is gone.", "boot-1")
    verdict = Verdict(Phase.FINAL, "SealMissing", "Closed after the grace period without 1 worker.", 1, (missing,))
    report = by_tenant(hour(verdict=verdict))[PLATFORM]
    assert condition(report, "Complete")["status"] == "False"
    assert report["status"]["completeness"] == {
        "expectedWorkers": 1,
        "reportedWorkers": 0,
        "missing": [
            {
                "workerUid": "uid",
                "pod": "smollm2-x",
                "reason": "SealMissing",
                "message": "it is gone.",
                "bootId": "boot-1",
            }
        ],
    }


@pytest.mark.parametrize(
    ("unaccounted_ns", "expected"), [(100, "True"), (-100, "True"), (101, "False"), (-101, "False")]
)
def test_more_than_a_thousandth_unaccounted_is_told(unaccounted_ns: int, expected: str) -> None:
    accounts = Accounts(allocated=100_000, idle=100_000 - unaccounted_ns, unaccounted=unaccounted_ns)
    report = by_tenant(hour(pods=(PodPeriod(WORKER, PodAccounts(accounts), ()),)))[PLATFORM]
    assert condition(report, "Reconciled")["status"] == expected


def test_losses_and_gains_of_two_pods_do_not_hide_each_other() -> None:
    pods = tuple(
        PodPeriod(WORKER, PodAccounts(Accounts(allocated=1000, idle=1000 - off, unaccounted=off)), ())
        for off in (9, -9)
    )
    told = condition(by_tenant(hour(pods=pods))[PLATFORM], "Reconciled")
    assert told["status"] == "False"
    assert told["message"].startswith("18 ns are unaccounted without regard to sign, 0 ns in sum; up to 2 ns")
    assert "A step that crosses the period's edge belongs to the period in which it ends" in told["message"]


def test_time_measured_by_the_hosts_clock_is_marked() -> None:
    report = by_tenant(hour(replace(slices("acme", 5), clock="host")))["acme"]
    assert (condition(report, "Measured")["status"], condition(report, "Measured")["reason"]) == ("False", "HostClock")


def test_the_digest_is_over_the_hashes_in_the_order_of_their_keys() -> None:
    assert digest_of(["a" * 64, "b" * 64]) != digest_of(["b" * 64, "a" * 64])
    digests = {"acme": digest_of(["a" * 64])}
    found = by_tenant(hour(slices("acme", 5), digests=digests))
    assert found["acme"]["status"]["digest"] == digests["acme"]
    assert found[PLATFORM]["status"]["digest"] == digest_of([])


def test_a_final_report_without_records_has_a_digest_too_and_one_that_may_change_has_none() -> None:
    assert by_tenant(hour())[PLATFORM]["status"]["digest"] == digest_of([])
    running = Verdict(Phase.OPEN, "PeriodRunning", "The period runs.", 1)
    assert "digest" not in by_tenant(hour(verdict=running))[PLATFORM]["status"]


def test_no_two_services_and_tenants_share_a_report_name() -> None:
    pairs = [("a", "b-c"), ("a-b", "c"), ("a--b", "c"), ("a", "b--c"), ("a", "platform-b"), ("a", PLATFORM)]
    names = [report_name(service, tenant, PERIOD) for service, tenant in pairs]
    assert len(set(names)) == len(pairs)
    assert names[0] == "a-b--c-20261121t14"
    assert names[-1] == "a-platform-20261121t14"


def test_a_report_is_the_same_bytes_whatever_the_order_of_its_lines() -> None:
    lines = [slices("acme", 5), slices("beta", 6), replace(slices("acme", 7), boot_id="boot-0")]
    forward, backward = reports(hour(*lines)), reports(hour(*reversed(lines)))
    assert [canonical_report(report) for report in forward] == [canonical_report(report) for report in backward]
    assert json.loads(canonical_report(forward[0])) == forward[0]


def test_a_price_plan_tells_all_that_is_wrong_with_it() -> None:
    spec = {"currency": "USD", "rates": [{"gpuClass": "h100", "perGpuHour": "-1"}, {"gpuClass": "x"}]}
    with pytest.raises(PlanInvalid, match=r"rates\[0\].*not negative.*rates\[1\]|rates\[1\].*rates\[0\]"):
        plan_from("broken", 1, canonical_spec(spec))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0.000000000000", "0"), ("-0.00", "0"), ("10.50", "10.5"), ("1E+3", "1000"), ("100", "100")],
)
def test_decimals_are_written_plainly(value: str, expected: str) -> None:
    assert plain(Decimal(value)) == expected


def condition(report: dict, kind: str) -> dict:  # type: ignore[type-arg]
    return next(each for each in report["status"]["conditions"] if each["type"] == kind)
