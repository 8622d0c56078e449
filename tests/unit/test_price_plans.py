"""What an hour costs when prices, versions, payers and modes differ: on the real ledger, with exact figures.

The pods' hour is 10:00 to 11:00. Every closed hour is also audited: `PricedHour.close` adds up all bills and has the
product's second reckoning agree with each.
"""

from decimal import Decimal
from functools import reduce
from pathlib import Path

import pytest

from gpumeter_operator.adapters.ledger.engine import writing
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.rollup import Part, RollUp, add, rolled_up
from gpumeter_operator.billing.tariff import BillingMode, PlanInvalid, Terms, plain, plan_from
from gpumeter_usage.period import SECOND_NS, Granularity, day_of
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, finals
from rigs.pricing import SERVICE, PricedHour, Status, at, plan, priced, rate, seconds

FLAT = plan(rate("3.60"))  # a thousandth of a dollar for each GPU-second


def served(fake: FakeWorker) -> None:
    """Loads for five minutes, serves acme until 10:25 and beta until 10:35, idles; acme again from 10:50 to 11:00."""
    fake.spend(Account.LOAD, at(5))
    fake.serve("s-1", "acme", at(25))
    fake.serve("s-2", "beta", at(35))
    fake.spend(Account.IDLE, at(50))
    fake.serve("s-3", "acme", at(60))


def amounts(of: dict[str, dict]) -> dict[str, str | None]:  # type: ignore[type-arg]
    return {tenant: status.get("amount") for tenant, status in of.items()}


def test_reconfiguration_inside_the_hour_misprices_nothing(tmp_path: Path) -> None:
    """GPUStack's fault: a price that changed at half past held for the whole hour, or for none of it."""
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("3.60"), rate("7.20", 30)), 0)
    hour.pod(served)
    found = hour.close()
    assert amounts(found) == {"acme": "2.4", "beta": "0.9", PLATFORM: "2.1"}
    assert [(each["from"], each["gpuNanoseconds"], each["perGpuHour"]) for each in found["beta"]["charges"]] == [
        ("2026-11-21T10:00:00Z", seconds(300), "3.6"),
        ("2026-11-21T10:30:00Z", seconds(300), "7.2"),
    ]
    assert "prices or versions changed at 2026-11-21T10:30:00Z" in priced(found["acme"])["message"]


def test_what_ends_at_the_edge_is_priced_as_before_it_and_what_ends_after_as_after_it(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("0"), rate("3.60", 30)), 0)

    def live(fake: FakeWorker) -> None:
        fake.serve("s-1", "acme", at(30))
        fake.serve("s-2", "acme", at(30) + 1)

    hour.pod(live)
    assert hour.close()["acme"]["amount"] == "0.000000000001"


def test_a_version_that_is_seen_within_the_hour_prices_what_ends_after_the_next_whole_minute(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(FLAT, 0)
    hour.run(0)
    hour.see(plan(rate("7.20")), 29.5)
    hour.pod(served)
    found = hour.close()
    assert amounts(found) == {"acme": "2.4", "beta": "0.9", PLATFORM: "2.1"}
    versions = found["acme"]["pricePlanVersions"]
    assert [(each["version"], each["from"]) for each in versions] == [
        (1, "2026-11-21T10:00:00Z"),
        (2, "2026-11-21T10:30:00Z"),
    ]
    report = finals(hour.ledger)[at(60), "acme"]
    assert report["spec"]["pricePlanRef"] == {"name": "default", "version": 1}
    assert report["spec"]["pricePlanHash"] == versions[0]["hash"] != versions[1]["hash"]


def test_a_rate_that_begins_before_it_was_seen_changes_nothing_before(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(FLAT, 0)
    hour.run(0)
    hour.see(plan(rate("3.60"), rate("7.20", 10)), 30)
    hour.pod(served)
    assert amounts(hour.close()) == {"acme": "2.4", "beta": "0.9", PLATFORM: "2.1"}, "from 10:30 on, not from 10:10"


def test_a_final_report_stays_what_it_was_when_its_plan_is_edited_with_a_past_effective_time(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(FLAT, 0)
    hour.pod(served)
    before = hour.close()
    hour.see(plan(rate("9.99"), rate("7.20", 10)), 70)
    assert hour.close(75) == before
    assert hour.ledger.adjustments("team-a", "smollm2") == [], "an edit books nothing: a credit is the seller's to give"


def test_a_plan_that_is_deleted_within_the_hour_prices_it_to_its_end(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(FLAT, 0)
    hour.run(0)
    hour.see(None, 20)
    hour.pod(served)
    assert amounts(hour.close()) == {"acme": "1.8", "beta": "0.6", PLATFORM: "1.2"}


def test_a_part_of_the_hour_without_a_plan_leaves_the_bills_of_that_part_unpriced_and_no_other(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.run(0)  # the period is opened when there is no plan

    def live(fake: FakeWorker) -> None:
        fake.serve("s-1", "acme", at(10))
        fake.spend(Account.IDLE, at(30))
        fake.serve("s-2", "beta", at(40))

    hour.pod(live)
    hour.run(0.5)
    hour.see(FLAT, 20)
    found = hour.close()
    assert amounts(found) == {"acme": None, "beta": "0.6", PLATFORM: None}
    assert priced(found["acme"])["reason"] == "NoPricePlan"
    assert "From 2026-11-21T10:00:00Z to 2026-11-21T10:20:00Z" in priced(found["acme"])["message"]


def test_a_gap_before_the_first_rate_of_a_class_is_left_unpriced_and_named(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("3.60", 20)), 0)
    hour.pod(served)
    found = hour.close()
    assert amounts(found) == {"acme": None, "beta": "0.6", PLATFORM: None}
    assert priced(found["acme"])["message"] == (
        "PricePlan default (version 1) has no rate for gpuClass h100 at 2026-11-21T10:00:00Z; add one."
    )


def test_a_currency_that_changes_within_the_hour_is_never_added_up(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(FLAT, 0)
    hour.run(0)
    hour.see(plan(rate("3.60"), currency="EUR"), 30)

    def live(fake: FakeWorker) -> None:
        fake.serve("s-1", "acme", at(10))
        fake.serve("s-2", "beta", at(40))

    hour.pod(live)
    found = hour.close()
    assert (found["acme"]["amount"], found["acme"]["currency"]) == ("0.6", "USD")
    assert "amount" not in found["beta"]
    assert priced(found["beta"])["reason"] == "CurrencyChanged"


def test_a_version_that_cannot_be_used_leaves_its_part_unpriced_with_its_faults(tmp_path: Path) -> None:
    """What CEL refuses may have been stored before the rule was."""
    hour = PricedHour(tmp_path)
    hour.see(FLAT, 0)
    hour.run(0)
    hour.see(plan(rate("-1"), rate("2", 30), rate("3", 30)), 40)

    def live(fake: FakeWorker) -> None:
        fake.serve("s-1", "acme", at(40))
        fake.serve("s-2", "beta", at(50))

    hour.pod(live)
    found = hour.close()
    assert amounts(found) == {"acme": "2.4", "beta": None, PLATFORM: None}
    assert priced(found["beta"])["reason"] == "PlanInvalid"
    assert "two rates of one gpuClass begin at the same time" in priced(found["beta"])["message"]


def test_late_records_are_priced_by_when_they_were_used(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path, granularity=Granularity.FIFTEEN_MINUTES)
    hour.see(plan(rate("3.60"), rate("7.20", 10), rate("36", 15)), 0)
    fake = hour.pod(lambda pod: pod.serve("s-1", "acme", at(12)), collect=False)
    hour.run(17)  # the first quarter is Final without the pod's records
    assert (at(15), "acme") not in finals(hour.ledger)
    hour.collect(fake, at(61))
    hour.run(62)
    late = finals(hour.ledger)[at(30), "acme"]["status"]
    assert late["gpuNanoseconds"] == seconds(720)
    assert late["amount"] == "0.84", (
        "600 s at 0.001 and 120 s at 0.002, none at the rate of the quarter it is booked in"
    )
    assert "what became known late is priced by when it was used" in priced(late)["message"]
    hour.close()


def test_a_fraction_of_a_gpu_is_not_charged_as_a_whole(tmp_path: Path) -> None:
    """OpenCost's fault. A MIG profile has its own class; the plan prices it, or says which part of a GPU it is."""
    slice_of = {"gpuClass": "h100.1g.10gb", "of": "h100", "fraction": "1/7"}
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("25.20"), rate("50.40", 30), slice_of), 0)
    hour.pod(served, gpu_class="h100.1g.10gb")
    found = hour.close()
    assert amounts(found) == {"acme": "2.4", "beta": "0.9", PLATFORM: "2.1"}
    first = found["acme"]["charges"][0]
    assert (first["gpuClass"], first["perGpuHour"], first["fraction"]) == ("h100.1g.10gb", "25.2", "1/7")


def test_a_slice_that_the_plan_does_not_price_is_left_unpriced_rather_than_charged_as_its_gpu(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("25.20")), 0)
    hour.pod(served, gpu_class="h100.1g.10gb")
    found = hour.close()
    assert set(amounts(found).values()) == {None}
    assert "no rate for gpuClass h100.1g.10gb" in priced(found["acme"])["message"]


def test_every_gpu_of_a_pod_is_charged_once(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(FLAT, 0)
    hour.pod(served, devices=4)  # its records state the time of one device: the other three are unaccounted
    found = hour.close()
    assert found[PLATFORM]["accounts"]["allocated"] == seconds(4 * 3600)
    assert sum(Decimal(status["amount"]) for status in found.values()) == Decimal("14.4")


def two_pods(hour: PricedHour) -> None:
    hour.pod(served)
    hour.pod(lambda fake: fake.serve("s-9", "gamma", at(7)), number=2, gpu_class="a100")


IDLE_S = 900 + 3180  # of the two pods


@pytest.mark.parametrize(
    ("payer", "owner", "idle_s"),
    [
        ("platform", "acme", {}),
        ("tenant", "", {"acme": 675, "beta": 225, "gamma": 3180}),
        ("owner", "acme", {"acme": IDLE_S}),
        ("owner", "nobody-came", {"nobody-came": IDLE_S}),
    ],
)
def test_idle_time_is_counted_once_whoever_pays_for_it(
    tmp_path: Path, payer: str, owner: str, idle_s: dict[str, int]
) -> None:
    """OpenCost's fault: idle time stood on the tenants' bills and on the platform's."""
    hour = PricedHour(tmp_path, Terms(owner=owner))
    hour.see(plan(rate("3.60"), rate("7.20", gpu_class="a100"), idlePayer=payer), 0)
    two_pods(hour)
    found = hour.close()
    told = {tenant: status.get("idleGpuNanoseconds") for tenant, status in found.items()}
    assert {tenant: ns for tenant, ns in told.items() if ns} == {tenant: seconds(s) for tenant, s in idle_s.items()}
    assert sum(Decimal(status["amount"]) for status in found.values()) == Decimal("10.8"), "3.60 and 7.20, once each"
    left_s = 7200 - 1800 - 600 - 420 - sum(idle_s.values())
    assert found[PLATFORM]["gpuNanoseconds"] == seconds(left_s)
    assert left_s >= 300, "loading is never on a tenant's bill"


def test_idle_time_that_cannot_be_split_evenly_is_split_to_the_last_nanosecond(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("3.60"), idlePayer="tenant"), 0)

    def live(fake: FakeWorker) -> None:
        for index, tenant in enumerate(("acme", "beta", "gamma")):
            fake.serve(f"s-{index}", tenant, at(1) + index * SECOND_NS)
        fake.spend(Account.IDLE, at(3) + 1)
        fake.spend(Account.LOAD, at(60))

    hour.pod(live)
    found = hour.close()
    parts = [int(status.get("idleGpuNanoseconds", 0)) for status in found.values()]
    assert sum(parts) == 118 * SECOND_NS + 1


def test_idle_time_of_a_class_that_nobody_used_stays_the_platforms(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("3.60"), rate("7.20", gpu_class="a100"), idlePayer="tenant"), 0)
    hour.pod(served)
    hour.pod(lambda fake: None, number=2, gpu_class="a100")
    found = hour.close()
    assert found[PLATFORM]["gpuNanoseconds"] == seconds(300 + 3600)


def test_where_no_owner_is_named_the_platform_pays_for_idle_time_and_the_report_says_so(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("3.60"), idlePayer="owner"), 0)
    hour.pod(served)
    found = hour.close()
    assert amounts(found) == {"acme": "1.8", "beta": "0.6", PLATFORM: "1.2"}
    assert "spec.pricing.owner names none" in priced(found[PLATFORM])["message"]


STANDARD = {
    "model": "smollm2",
    "perThousandPromptTokens": "0.10",
    "perThousandCompletionTokens": "1",
}


def test_by_standard_rate_a_tenant_pays_for_tokens_and_the_platform_the_difference_in_a_line_of_its_own(
    tmp_path: Path,
) -> None:
    hour = PricedHour(tmp_path, Terms(BillingMode.STANDARD_RATE))
    dearer = STANDARD | {"perThousandCompletionTokens": "2", "effectiveFrom": "2026-11-21T10:30:00Z"}
    hour.see(plan(rate("3.60"), standardRates=[STANDARD, dearer], idlePayer="tenant"), 0)
    hour.pod(served)
    found = hour.close()
    # A slice of a minute has 7 prompt and 11 completion tokens: acme 20 slices before and 10 after, beta 5 and 5.
    assert found["acme"]["amount"] == "0.461", "30 x 7 x 0.0001 + 20 x 11 x 0.001 + 10 x 11 x 0.002"
    assert found["beta"]["amount"] == "0.172"
    assert (found["acme"]["billingMode"], found["acme"]["measuredAmount"]) == ("standardRate", "1.8")
    assert "idleGpuNanoseconds" not in found["acme"], "the price of a token is the whole price"
    assert found["acme"]["pricePerThousandTokens"] == "3.333333333333", "1.80 for 540 tokens, as measured"
    difference = found[PLATFORM]["standardRateDifference"]
    assert difference == "1.767", "2.40 that tenants' time cost, less what they paid"
    assert found[PLATFORM]["amount"] == plain(Decimal("1.2") + Decimal(difference))
    assert sum(Decimal(status["amount"]) for status in found.values()) == Decimal("3.6"), "what the hour cost"


def test_cached_tokens_have_their_own_price_where_the_plan_states_one() -> None:
    one = plan_from("p", 1, plan(rate("1"), standardRates=[STANDARD | {"perThousandCachedTokens": "0.01"}]))
    other = plan_from("p", 1, plan(rate("1"), standardRates=[STANDARD]))
    found = [each.standard_rate("smollm2", 0) for each in (one, other)]
    assert [each.cached for each in found if each] == [Decimal("0.01"), Decimal("0.10")]


def test_a_model_without_a_standard_rate_is_left_unpriced_and_not_billed_by_another_way(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path, Terms(BillingMode.STANDARD_RATE))
    hour.see(plan(rate("3.60"), standardRates=[STANDARD | {"model": "another"}]), 0)
    hour.pod(served)
    found = hour.close()
    assert set(amounts(found).values()) == {None}
    assert "no standard rate for the model smollm2" in priced(found["acme"])["message"]
    assert priced(found[PLATFORM])["reason"] == "NoStandardRate"


def test_how_a_service_is_billed_is_fixed_when_its_period_is_opened(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("3.60"), standardRates=[STANDARD]), 0)
    hour.pod(served)
    hour.run(1)
    hour.terms = {("team-a", "smollm2"): Terms(BillingMode.STANDARD_RATE)}
    assert amounts(hour.close()) == {"acme": "1.8", "beta": "0.6", PLATFORM: "1.2"}


def test_what_comes_late_of_a_service_that_was_deleted_is_billed_as_its_last_period_was(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path, Terms(BillingMode.STANDARD_RATE))
    hour.see(plan(rate("3.60"), standardRates=[STANDARD]), 0)
    late = hour.pod(served, collect=False)
    hour.run(1)
    hour.close()
    hour.terms = {}  # nobody knows the service any more
    hour.collect(late, at(66))
    hour.run(125)
    found = finals(hour.ledger)[at(120), "acme"]["status"]
    assert found["billingMode"] == "standardRate"
    assert {each["kind"] for each in found["charges"]} == {"Usage", "Tokens"}


def test_how_a_period_is_billed_cannot_be_changed_in_the_database(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.pod(served)
    hour.run(1)
    for statement in ("UPDATE period_terms SET owner = 'evil'", "DELETE FROM period_terms"):
        with pytest.raises(Exception, match="append-only"), writing(hour.ledger.engine) as connection:
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (plan(rate("2"), rate("3")), "two rates of one gpuClass begin at the same time"),
        (plan(rate("-2")), "a price is not negative"),
        (plan({"gpuClass": "h100", "perGpuHour": 2.5}), "is the number 2.5; write a price as text"),
        (plan(rate("NaN")), "a price is not negative"),
        (plan(rate("2", 0.5)), "records are cut at whole minutes"),
        (plan(rate("2"), currency="usd"), "spec.currency is 'usd'"),
        (plan(rate("2"), idlePayer="somebody"), "spec.idlePayer is 'somebody'"),
        (plan({"gpuClass": "a", "of": "h100", "fraction": "1/7"}), "a costs a fraction of h100, which has no"),
        (plan(rate("2"), {"gpuClass": "a", "of": "h100", "fraction": "7/7"}), "write a part of one GPU"),
        (plan(rate("2", of="h100", fraction="1/7")), "keep one of them"),
        (plan(rate("2"), standardRates=[STANDARD, STANDARD]), "two standard rates of one model"),
        (plan(), "spec.rates is empty"),
    ],
)
def test_a_contradictory_plan_is_refused_with_what_is_wrong(spec: bytes, told: str) -> None:
    with pytest.raises(PlanInvalid) as caught:
        plan_from("p", 1, spec)
    assert told in str(caught.value)


def test_a_day_costs_what_its_hours_were_published_to_cost() -> None:
    """What an accountant adds up. A day reckoned anew from nanoseconds would differ by the hours' roundings."""
    period = day_of(START_NS)
    closed = RollUp(Phase.FINAL, "AllPeriodsFinal", "All periods of the day are Final.")

    def hour(amount: Decimal, currency: str = "USD") -> Part:
        amounts = {"amount": amount, "measuredAmount": amount}
        return Part(periods=1, complete=1, amounts=amounts, currencies=frozenset({currency}))

    def day(*hours: Part) -> Status:
        of = reduce(add, hours)
        status: Status = rolled_up(SERVICE, "acme", period, of, of, verdict=closed, pods={})["status"]
        return status

    thirds = [hour(Decimal("0.333333333333"))] * 24
    assert (day(*thirds)["amount"], day(*thirds)["currency"]) == ("7.999999999992", "USD")
    hidden = day(*thirds[1:], Part(unpriced=1, unpriced_first=(START_NS, "NoPlan", "No plan.")))
    mixed = day(*thirds[1:], hour(Decimal(1), "EUR"))
    for status, reason in ((hidden, "NoPlan"), (mixed, "CurrenciesDiffer")):
        assert "amount" not in status
        assert priced(status)["reason"] == reason
    long = day(hour(Decimal("1" * 30)), hour(Decimal("0.000000000001")))
    assert long["amount"] == "1" * 30 + ".000000000001", "no digit is lost"
