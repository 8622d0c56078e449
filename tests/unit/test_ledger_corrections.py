"""A correction by hand: a new fact of the next open period, on two bills, at the price of what it corrects."""

import json
import sqlite3
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger import corrections, rollups
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.ledger.tables import corrections as corrections_table
from gpumeter_operator.billing.correct import CorrectionRefused, Wanted
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.tariff import BillingMode, Terms
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.cli.adjust import adjust
from gpumeter_operator.cli.usage import usage
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.correct import book, weigh
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account
from rigs.audited import DIGESTED_NS, audited, digested
from rigs.ledger import FakeWorker, ended, finals, gone, started, worker
from rigs.pricing import SERVICE, PricedHour, at, check_parts, plan, priced, rate, seconds

REPORT = "smollm2-acme-20261121t10"
PLATFORMS = "smollm2-platform-20261121t10"
CREDIT = Wanted("team-a", REPORT, -1_200_000_000, "INC-42: a probe ran under the tenant's key.", "alice@example.com")
DEBIT = replace(CREDIT, gpu_ns=2_000_000_000, reason="It was booked to nobody.")
BOOKED_AS = replace(CREDIT, gpu_class="h100").own_id


def serve(fake: FakeWorker) -> None:
    fake.serve("s-1", "acme", at(20))
    fake.serve("s-2", "beta", at(30))


def an_hour(folder: Path, terms: Terms | None = None, **changes: Any) -> PricedHour:
    """The hour from 10 to 11 is Final, at a tenth of a cent a GPU-second; then the price doubles."""
    hour = PricedHour(folder, terms)
    hour.see(plan(rate("3.60"), **changes), 0)
    hour.pod(serve)
    hour.close()
    hour.see(plan(rate("7.20"), **changes), 62)
    return hour


def next_hour(hour: PricedHour) -> dict[str, dict[str, Any]]:
    """Another pod runs from 11 to 12; the reports of that hour by tenant, after everything that must add up did."""
    fake = FakeWorker(worker(2), at(60))
    fake.spend(Account.IDLE, at(70))  # the new price holds from 11:06 on, a minute after the hour was closed
    fake.serve("s-3", "acme", at(80))
    fake.serve("s-4", "beta", at(90))
    fake.spend(Account.IDLE, at(120))
    fake.seal()
    hour.ledger.observe(fake.identity, [started("c", at(60)), ended("c", at(120)), gone(at(120))], at(120))
    hour.collect(fake, at(120))
    return closed_hour(hour)


def closed_hour(hour: PricedHour) -> dict[str, dict[str, Any]]:
    hour.run(125)
    assert audit(hour.ledger, SERVICE) == []
    found = {tenant: report["status"] for (end, tenant), report in finals(hour.ledger).items() if end == at(120)}
    total = sum(int(status["gpuNanoseconds"]) for status in found.values())
    assert total == int(found[PLATFORM]["accounts"]["allocated"]), "every nanosecond stands on one bill"
    for status in found.values():
        check_parts(status)
    return found


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
    assert audited(hour.ledger) == []


REFUSED: list[tuple[str, Wanted]] = [
    ("NoFinalReport", replace(CREDIT, report="smollm2-acme-20261121t11")),
    ("NoFinalReport", replace(CREDIT, namespace="team-b")),
    ("PlatformsReport", replace(CREDIT, report="smollm2-platform-20261121t10")),
    ("NothingToCorrect", replace(CREDIT, gpu_ns=0)),
    ("NotSaid", replace(CREDIT, reason=" ")),
    ("NotSaid", replace(CREDIT, actor="")),
    ("NotSaid", replace(CREDIT, actor="alice\nbob")),
    ("NotSaid", replace(CREDIT, id="x" * 65)),
    ("MoreThanBilled", replace(CREDIT, gpu_ns=-1200 * SECOND_NS - 1)),
    ("MoreThanAllocated", replace(CREDIT, gpu_ns=1800 * SECOND_NS + 1)),
    ("WhichGpuClass", replace(CREDIT, gpu_class="a100")),
    ("WhichTenant", replace(DEBIT, tenant="gamma")),
    ("WhichTenant", replace(DEBIT, report=PLATFORMS, tenant="acme")),
    ("TenantInvalid", replace(DEBIT, report=PLATFORMS, tenant="Gamma!")),
    ("TenantInvalid", replace(DEBIT, report=PLATFORMS, tenant="platform")),
    ("MoreThanBilled", replace(CREDIT, report=PLATFORMS, tenant="gamma")),
]


@pytest.mark.parametrize(("reason", "wanted"), REFUSED, ids=[f"{reason}-{i}" for i, (reason, _) in enumerate(REFUSED)])
def test_what_cannot_be_corrected_is_refused_in_words_and_nothing_is_kept(
    tmp_path: Path, reason: str, wanted: Wanted
) -> None:
    hour = an_hour(tmp_path)
    with pytest.raises(CorrectionRefused) as refused:
        book(hour.ledger, wanted, at(65))
    assert refused.value.reason == reason
    assert str(refused.value).rstrip().endswith(".")
    assert corrections.of_service(hour.ledger, *SERVICE) == ()


def test_all_that_was_billed_can_be_given_back_once_and_all_that_the_platform_carried_be_billed(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, replace(CREDIT, gpu_ns=-1200 * SECOND_NS), at(65))
    with pytest.raises(CorrectionRefused, match="holds 0 ns with the corrections so far"):
        book(hour.ledger, CREDIT, at(65))
    book(hour.ledger, replace(CREDIT, gpu_ns=3000 * SECOND_NS), at(65))
    with pytest.raises(CorrectionRefused, match="The platform carries 0 ns"):
        book(hour.ledger, DEBIT, at(65))


def test_a_day_is_corrected_by_the_hour_that_is_wrong(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    hour.run(15 * 60)
    with pytest.raises(CorrectionRefused, match="the sum of shorter reports"):
        book(hour.ledger, replace(CREDIT, report="smollm2-acme-20261121"), at(15 * 60))


def test_time_without_a_price_or_billed_by_tokens_cannot_be_corrected(tmp_path: Path) -> None:
    tokens = {"model": "smollm2", "perThousandPromptTokens": "0.10", "perThousandCompletionTokens": "1"}
    (tmp_path / "tokens").mkdir()
    by_tokens = an_hour(tmp_path / "tokens", Terms(BillingMode.STANDARD_RATE), standardRates=[tokens])
    with pytest.raises(CorrectionRefused, match="was billed by standardRate"):
        book(by_tokens.ledger, CREDIT, at(65))
    (tmp_path / "unpriced").mkdir()
    unpriced = PricedHour(tmp_path / "unpriced")
    unpriced.pod(serve)
    unpriced.close()
    with pytest.raises(CorrectionRefused, match="has no price for gpuClass h100"):
        book(unpriced.ledger, CREDIT, at(65))


def test_where_pods_had_two_classes_the_class_says_the_price(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("3.60"), rate("1.80", gpu_class="l4")), 0)
    hour.pod(serve)
    hour.pod(serve, number=2, gpu_class="l4")
    hour.close()
    with pytest.raises(CorrectionRefused, match=r"of the class h100 and l4\. Which of them was it"):
        weigh(hour.ledger, CREDIT, at(65))
    assert book(hour.ledger, replace(CREDIT, gpu_class="l4"), at(65)).amount == Decimal("-0.0006")
    assert closed_hour(hour)["acme"]["amount"] == "-0.0006"


def test_of_each_class_no_more_is_given_back_or_billed_than_there_is_of_it(tmp_path: Path) -> None:
    """At the dear class's price, time of the cheap one would give back more than was ever paid."""
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("3.60"), rate("1.80", gpu_class="l4")), 0)
    hour.pod(serve)
    hour.pod(lambda fake: fake.serve("s-9", "acme", at(5)), number=2, gpu_class="l4")
    hour.close()
    dear, cheap = replace(CREDIT, gpu_class="h100"), replace(CREDIT, gpu_class="l4")
    with pytest.raises(CorrectionRefused, match=rf"holds {seconds(1200)} ns of the class h100 with"):
        book(hour.ledger, replace(dear, gpu_ns=-1200 * SECOND_NS - 1), at(65))
    book(hour.ledger, replace(dear, gpu_ns=-1200 * SECOND_NS), at(65))
    with pytest.raises(CorrectionRefused, match=r"holds 0 ns of the class h100 with"):
        book(hour.ledger, dear, at(65))
    book(hour.ledger, replace(cheap, gpu_ns=-300 * SECOND_NS), at(65))
    with pytest.raises(CorrectionRefused, match=rf"carries {seconds(1800 + 1200)} ns of the class h100"):
        book(hour.ledger, replace(dear, gpu_ns=3000 * SECOND_NS + 1), at(65))
    book(hour.ledger, replace(cheap, gpu_ns=3600 * SECOND_NS), at(65))
    with pytest.raises(CorrectionRefused, match=r"carries 0 ns of the class l4"):
        book(hour.ledger, replace(cheap, gpu_ns=1), at(65))


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


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE corrections SET gpu_ns = gpu_ns - 1", "ReportDiffers"),
        ("UPDATE corrections SET reason = 'because'", "ReportBytes"),
        ("UPDATE corrections SET plan_hash = report_digest", "ReportDiffers"),
        ("UPDATE corrections SET report_digest = plan_hash", "CorrectionUnproved"),
        ("UPDATE corrections SET closed_start_ns = closed_start_ns + 1", "CorrectionUnproved"),
        ("UPDATE corrections SET report = 'smollm2-acme-20261121t11'", "CorrectionUnproved"),
        ("UPDATE corrections SET gpu_class = 'l4'", "CorrectionUnproved"),
        ("UPDATE corrections SET booked_end_ns = booked_end_ns - 1800000000000", "CorrectionUnbilled"),
        ("UPDATE corrections SET made_ns = made_ns + 1", "FactChanged"),
        ("DELETE FROM corrections", "FactMissing"),
    ],
)
def test_verify_recomputes_corrections_and_names_one_that_was_changed(
    tmp_path: Path, statement: str, reason: str
) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    next_hour(hour)
    digested(hour.ledger, DIGESTED_NS)
    assert audited(hour.ledger) == []
    hour.ledger.close()
    raw = sqlite3.connect(tmp_path / "ledger.db")
    verb = statement.split(maxsplit=1)[0].lower()
    raw.execute(f"DROP TRIGGER corrections_no_{verb}")
    assert raw.execute(statement).rowcount == 1
    raw.commit()
    raw.close()
    told = audited(Reader(f"sqlite:///{tmp_path / 'ledger.db'}"))
    assert reason in {each.reason for each in told}
    assert told[0].message.startswith(f"corrections ({BOOKED_AS})")


def test_a_correction_on_no_bill_of_a_period_that_is_final_is_told(tmp_path: Path) -> None:
    """As a collector leaves it that knows no corrections and closes the period beside one that does."""
    hour = an_hour(tmp_path)
    correction = weigh(hour.ledger, CREDIT, at(65)).correction
    next_hour(hour)
    with hour.ledger.writing() as connection:
        connection.execute(insert(corrections_table).values(asdict(correction)))
    digested(hour.ledger, DIGESTED_NS)
    told = audited(hour.ledger)
    assert (told[0].reason, told[0].message) == (
        "CorrectionUnbilled",
        f"corrections ({BOOKED_AS}): team-a/smollm2: it stands on no Final report of the period until "
        "2026-11-21T12:00:00Z.",
    )


def ends_of(life: int) -> int:
    """Of each life at another second, so that no two of them come to the same by chance."""
    return at(60 + 5 * life + 4) + life * SECOND_NS


def many_lives(hour: PricedHour, *, last_ends: bool) -> None:
    """A pod that starts anew every five minutes from 11 to 12 o'clock."""
    fake, events = FakeWorker(worker(2), at(60), "boot-0"), []
    for life in range(12):
        begin = at(60 + 5 * life)
        if life:
            fake.restart(f"boot-{life}", begin)
        fake.serve(f"s-{life}", "acme", begin + MINUTE_NS)
        fake.spend(Account.IDLE, begin + 4 * MINUTE_NS)
        events += [started(f"c-{life}", begin), ended(f"c-{life}", ends_of(life))]
    fake.seal()
    hour.ledger.observe(fake.identity, events if last_ends else events[:-1], at(120))
    for life in range(12):
        hour.ledger.take(fake.identity, fake.page(f"boot-{life}", 0), at(120))
    hour.ledger.settle(fake.identity.worker_uid, at(120))


@pytest.mark.parametrize("last_ends", [True, False], ids=["all ended", "one end is known later"])
def test_verify_finds_nothing_where_a_pod_has_many_lives_in_the_hour_of_a_correction(
    tmp_path: Path, *, last_ends: bool
) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    many_lives(hour, last_ends=last_ends)
    assert closed_hour(hour)["acme"]["adjustedGpuNanoseconds"] == "-1200000000"
    if not last_ends:
        hour.ledger.observe(worker(2), [ended("c-11", ends_of(11)), gone(at(126))], at(126))
        hour.run(185)
        assert len(hour.ledger.adjustments(*SERVICE)) == 1
    digested(hour.ledger, DIGESTED_NS)
    assert audited(hour.ledger) == []


def test_the_database_lets_nobody_change_a_correction(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    for statement in ("UPDATE corrections SET gpu_ns = 0", "DELETE FROM corrections"):
        with pytest.raises(IntegrityError, match="append-only"), hour.ledger.writing() as connection:
            connection.exec_driver_sql(statement)


def run(command: Any, ledger: Ledger, *arguments: str) -> Result:
    return CliRunner().invoke(command, ["--ledger", str(ledger.engine.url), *arguments])


def test_the_command_says_what_it_books_and_books_it_once(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    told = ("-n", "team-a", REPORT, "--gpu-ns", "-1200000000", "--reason", "INC-42.", "--actor", "alice")
    tried = run(adjust, hour.ledger, *told, "--dry-run")
    assert tried.stdout.startswith("Would book correction c-")
    assert "(-0.0012 USD, at the rates of PricePlan default (version 1, " in tried.stdout
    assert corrections.of_service(hour.ledger, *SERVICE) == ()
    done = run(adjust, hour.ledger, *told)
    assert (done.exit_code, done.stdout) == (0, tried.stdout.replace("Would book", "Booked"))
    again = run(adjust, hour.ledger, *told)
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("BookedAlready: The correction c-")
    assert len(corrections.of_service(hour.ledger, *SERVICE)) == 1
    for missing in ("--reason", "--actor", "--gpu-ns"):
        index = told.index(missing)
        assert run(adjust, hour.ledger, *told[:index], *told[index + 2 :]).exit_code == 2


@pytest.mark.parametrize("final", [False, True], ids=["open", "final"])
def test_usage_shows_a_correction_in_the_amount_and_in_words(tmp_path: Path, final: bool) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    if final:
        closed_hour(hour)
    else:
        hour.run(66)
    found = json.loads(run(usage, hour.ledger, "-o", "json").stdout)
    lines: dict[str, dict[str, Any]] = {line["tenant"]: line for line in found["usage"]}
    assert lines["acme"]["adjustedGpuNanoseconds"] == "-1200000000"
    assert Decimal(lines["acme"]["amounts"]["USD"]) == Decimal("1.2") - Decimal("0.0012")
    assert lines["beta"]["adjustedGpuNanoseconds"] == "0"
    (note,) = [each for each in found["notes"] if "correction" in each]
    assert note == (
        f"team-a/smollm2: correction {BOOKED_AS} of -1200000000 ns of acme's report {REPORT}, booked in the period "
        f"until 2026-11-21T12:00:00Z by alice@example.com: {CREDIT.reason}"
    )
    table = run(usage, hour.ledger).stdout
    assert "-1.200000000 GPU-seconds (-1200000000 ns) of corrections are booked besides, and are in AMOUNT." in table
    assert "correction" not in run(usage, hour.ledger, "-t", "beta").stdout
