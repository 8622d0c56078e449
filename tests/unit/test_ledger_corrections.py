"""A correction by hand: a new fact of the next open period, on two bills, at the price of what it corrects."""

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gpumeter_operator.adapters.ledger import corrections, rollups
from gpumeter_operator.billing.correct import CorrectionRefused
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.correct import book, weigh
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account
from rigs.audited import DIGESTED_NS, audited, digested
from rigs.corrected import BOOKED_AS, CREDIT, DEBIT, PLATFORMS, REPORT, an_hour, closed_hour, next_hour
from rigs.ledger import FakeWorker, ended, finals, gone, started, worker
from rigs.pricing import SERVICE, at, plan, priced, rate, seconds


def test_a_credit_stands_in_the_next_period_on_both_bills_at_the_price_of_its_own(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    before = finals(hour.ledger)
    booked = book(hour.ledger, CREDIT, at(65))
    assert (booked.amount, booked.currency) == (Decimal("-0.0012"), "USD")
    found = next_hour(hour)
    acme, beta, platform = found["acme"], found["beta"], found[PLATFORM]
    assert acme["gpuNanoseconds"] == str(600 * SECOND_NS - 1_200_000_000)
    assert acme["adjustedGpuNanoseconds"] == "-1200000000"
    assert Decimal(acme["amount"]) == Decimal("1.2") - Decimal("0.0012"), "10 minutes at 7.20, 1.2 s back at 3.60"
    assert platform["adjustedGpuNanoseconds"] == "1200000000"
    assert platform["gpuNanoseconds"] == str(2400 * SECOND_NS + 1_200_000_000)
    assert Decimal(platform["amount"]) == Decimal("4.44") + Decimal("0.0012"), "6 minutes of 40 are at the old price"
    (entry,) = acme["adjustments"]
    old_plan = before[at(60), "acme"]["spec"]
    assert entry == {
        "originalPeriodEnd": "2026-11-21T11:00:00Z",
        "id": BOOKED_AS,
        "tenant": "acme",
        "report": REPORT,
        "reason": "Correction",
        "message": CREDIT.reason,
        "actor": "alice@example.com",
        "gpuNanoseconds": "-1200000000",
        "pricePlan": {**old_plan["pricePlanRef"], "hash": old_plan["pricePlanHash"]},
    }
    assert platform["adjustments"] == [entry]
    assert "adjustments" not in beta and "adjustedGpuNanoseconds" not in beta, "it is no business of others"
    after = finals(hour.ledger)
    assert {key: after[key] for key in before} == before, "what is Final stays as it is"


def test_a_debit_takes_from_the_platform_what_it_bills_to_the_tenant(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, DEBIT, at(65))
    found = next_hour(hour)
    assert found["acme"]["gpuNanoseconds"] == seconds(602)
    assert found[PLATFORM]["gpuNanoseconds"] == seconds(2398)


def test_a_tenant_without_a_report_is_billed_of_what_the_platform_carried_then(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    debit = replace(DEBIT, report=PLATFORMS, tenant="gamma", reason="It ran under nobody's key.")
    assert book(hour.ledger, debit, at(65)).amount == Decimal("0.002"), "at the price of then"
    for gpu_ns, told in ((1798 * SECOND_NS + 1, "The platform carries 1798"), (-2 * SECOND_NS - 1, "holds 2000000000")):
        with pytest.raises(CorrectionRefused, match=told):
            book(hour.ledger, replace(debit, gpu_ns=gpu_ns), at(65))
    with pytest.raises(CorrectionRefused, match="is booked already"):
        book(hour.ledger, debit, at(65))
    book(hour.ledger, replace(debit, gpu_ns=-SECOND_NS), at(65))
    found = next_hour(hour)
    gamma = found["gamma"]
    assert (gamma["gpuNanoseconds"], gamma["amount"]) == (str(SECOND_NS), "0.001")
    assert found[PLATFORM]["adjustedGpuNanoseconds"] == str(-SECOND_NS)
    digested(hour.ledger, DIGESTED_NS)
    assert audited(hour.ledger) == []


def test_a_service_that_sleeps_gets_a_report_of_its_correction_and_days_add_it_up(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    found = closed_hour(hour)
    assert found.keys() == {"acme", PLATFORM}
    assert (found["acme"]["gpuNanoseconds"], found["acme"]["amount"]) == ("-1200000000", "-0.0012")
    assert (found[PLATFORM]["gpuNanoseconds"], found[PLATFORM]["amount"]) == ("1200000000", "0.0012")
    hour.run(15 * 60)  # the day is over
    bodies = rollups.rollup_bodies(hour.ledger.engine, SERVICE, Granularity.DAY, 0)
    days = {tenant: json.loads(body)["status"] for _, tenant, body in bodies}
    assert days["acme"]["gpuNanoseconds"] == str(1200 * SECOND_NS - 1_200_000_000)
    assert days["acme"]["adjustedGpuNanoseconds"] == "-1200000000"
    assert days["acme"]["adjustments"] == days[PLATFORM]["adjustments"] == found["acme"]["adjustments"]
    assert "adjustments" not in days["beta"]
    assert Decimal(days["acme"]["amount"]) == Decimal("1.2") - Decimal("0.0012")
    assert audit(hour.ledger, SERVICE) == []


def test_after_the_months_bill_a_correction_stands_in_the_next_month(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    december = 14 * 60 + 9 * 24 * 60  # in minutes from 21 November, 10:00
    for minute in (15 * 60, december + 30):
        hour.run(minute)
    november = rollups.rollup_bodies(hour.ledger.engine, SERVICE, Granularity.MONTH, 0)
    assert {tenant for _, tenant, _ in november} == {"acme", "beta", PLATFORM}
    assert book(hour.ledger, CREDIT, at(december + 40)).correction.booked_end_ns == at(december + 60)
    for minute in (december + 65, december + 25 * 60, december + 32 * 24 * 60):
        hour.run(minute)
        assert audit(hour.ledger, SERVICE) == []
    both = rollups.rollup_bodies(hour.ledger.engine, SERVICE, Granularity.MONTH, 0)
    assert set(november) < set(both), "the month that was billed stays as it is"
    (credited,) = (json.loads(body)["status"] for _, tenant, body in set(both) - set(november) if tenant == "acme")
    assert credited["gpuNanoseconds"] == "-1200000000"


@pytest.mark.parametrize("asleep_until", [60, 245], ids=["right after", "after a sleep"])
def test_what_is_booked_while_a_period_is_closed_is_on_a_bill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asleep_until: int
) -> None:
    hour = an_hour(tmp_path)
    begin, end = asleep_until, asleep_until - asleep_until % 60 + 60
    fake = FakeWorker(worker(2), at(begin))
    fake.serve("s-3", "acme", at(begin + 10))
    fake.spend(Account.IDLE, at(end))
    fake.seal()
    hour.ledger.observe(fake.identity, [started("c", at(begin)), ended("c", at(end)), gone(at(end))], at(end))
    hour.collect(fake, at(end))
    version, booked = hour.ledger.facts_version, []

    def meanwhile(*of: Any) -> Any:
        if not booked:
            booked.append(book(hour.ledger, CREDIT, at(end + 2)))
        return version(*of)

    monkeypatch.setattr(hour.ledger, "facts_version", meanwhile)
    for minute in (end + 5, end + 6, end + 7):
        hour.run(minute)
    assert booked[0].correction.booked_end_ns == at(end)
    assert finals(hour.ledger)[at(end), "acme"]["status"]["adjustedGpuNanoseconds"] == "-1200000000"
    assert audit(hour.ledger, SERVICE) == []


def test_a_bill_has_one_currency_and_a_correction_in_another_is_refused(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    hour.see(plan(rate("6.00"), currency="EUR"), 64)
    with pytest.raises(CorrectionRefused, match="billed in USD, and the service is billed in EUR") as refused:
        book(hour.ledger, CREDIT, at(65))
    assert refused.value.reason == "AnotherCurrency"


def test_a_plan_that_went_back_to_its_first_version_is_corrected_in_its_currency(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    dollars = plan(rate("3.60"))
    hour.see(plan(rate("6.00"), currency="EUR"), 63)
    hour.ledger.keep_plan("default", 1, dollars, at(64))  # as it was seen first, under its first number
    assert book(hour.ledger, CREDIT, at(65)).currency == "USD"


@pytest.mark.parametrize("asleep", [False, True], ids=["beside its own time", "alone"])
def test_a_plan_of_another_currency_that_came_after_the_correction_is_told_on_both_bills(
    tmp_path: Path, *, asleep: bool
) -> None:
    """Nobody knew it when the correction was booked: the service named another plan before its next period began."""
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    euro = hour.ledger.keep_plan("euro", 1, plan(rate("36"), currency="EUR"), at(0))
    if not asleep:
        fake = FakeWorker(worker(2), at(60))
        for tenant, minute in (("acme", 80), ("beta", 90)):
            fake.serve(f"s-{tenant}", tenant, at(minute))
        fake.spend(Account.IDLE, at(120))
        fake.seal()
        hour.ledger.observe(fake.identity, [started("c", at(60)), ended("c", at(120)), gone(at(120))], at(120))
        hour.collect(fake, at(120))
    Closer(hour.ledger, MINUTE_NS).close_all(Pricing({SERVICE: "euro"}, {"euro": euro}), at(125))
    assert audit(hour.ledger, SERVICE) == []
    found = {tenant: report["status"] for (end, tenant), report in finals(hour.ledger).items() if end == at(120)}
    if asleep:
        assert (found["acme"]["amount"], found["acme"]["currency"]) == ("-0.0012", "USD")
        return
    assert (found["beta"]["amount"], found["beta"]["currency"]) == ("6", "EUR")
    for tenant in ("acme", PLATFORM):
        assert "amount" not in found[tenant]
        told = priced(found[tenant])
        assert (told["status"], told["reason"]) == ("False", "CurrencyChanged")
        assert told["message"].startswith(
            "What corrects earlier periods here is priced in USD, and everything else in EUR"
        )
        (charge,) = [each for each in found[tenant]["charges"] if each["kind"] == "Correction"]
        assert abs(Decimal(charge["amount"])) == Decimal("0.0012"), "it is on the bill, at its own price"


def test_the_same_correction_is_booked_once_and_another_id_is_another_one(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    with pytest.raises(CorrectionRefused, match=f"{BOOKED_AS} is booked already .* by alice@example.com") as refused:
        book(hour.ledger, CREDIT, at(66))
    assert refused.value.reason == "BookedAlready"
    book(hour.ledger, replace(CREDIT, id="INC-43"), at(66))
    with pytest.raises(CorrectionRefused, match="INC-43 is booked already"):
        book(hour.ledger, replace(DEBIT, id="INC-43"), at(67))
    assert next_hour(hour)["acme"]["adjustedGpuNanoseconds"] == "-2400000000"


@pytest.mark.parametrize("first", ["", "h100"], ids=["said later", "said at first"])
def test_the_same_wish_is_booked_once_whether_its_only_class_is_said_or_not(tmp_path: Path, first: str) -> None:
    hour = an_hour(tmp_path)
    classes = sorted(("", "h100"), key=lambda each: each != first)
    booked = [book(hour.ledger, replace(CREDIT, gpu_class=classes[0]), at(65)).correction.id]
    with pytest.raises(CorrectionRefused, match=f"{BOOKED_AS} is booked already"):
        book(hour.ledger, replace(CREDIT, gpu_class=classes[1]), at(66))
    assert booked == [each.id for each in corrections.of_service(hour.ledger, *SERVICE)] == [BOOKED_AS]


def test_a_wish_that_a_version_before_booked_without_its_class_is_booked_already(tmp_path: Path) -> None:
    """That version made the id of the class as it was typed; what is in a ledger keeps its id."""
    hour = an_hour(tmp_path)
    formerly = replace(weigh(hour.ledger, CREDIT, at(65)).correction, id=CREDIT.own_id)
    assert CREDIT.own_id != BOOKED_AS
    assert corrections.keep(hour.ledger, formerly, made_from=corrections.version(hour.ledger, *SERVICE))
    for gpu_class in ("", "h100"):
        with pytest.raises(CorrectionRefused, match=f"{CREDIT.own_id} is booked already"):
            book(hour.ledger, replace(CREDIT, gpu_class=gpu_class), at(66))
    digested(hour.ledger, DIGESTED_NS)


def test_a_correction_comes_in_whole_beside_whoever_closes_the_period(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    ledger = hour.ledger
    folded_from = ledger.facts_version(*SERVICE, at(120))
    decided_from = corrections.version(ledger, *SERVICE)
    correction = weigh(ledger, CREDIT, at(65)).correction
    book(ledger, DEBIT, at(65))
    assert ledger.facts_version(*SERVICE, at(120)) != folded_from, "a report without it is not kept"
    assert not corrections.keep(ledger, correction, made_from=decided_from), "what it was weighed against has changed"
    decided_from = corrections.version(ledger, *SERVICE)
    hour.run(125)
    assert not corrections.keep(ledger, correction, made_from=decided_from), "its period is closed by now"
    assert book(ledger, CREDIT, at(126)).correction.booked_end_ns == at(180)
