"""What a correction by hand costs where the price changed within the period: as much as what it corrects did."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from gpumeter_operator.adapters.ledger import corrections
from gpumeter_operator.adapters.ledger.tables import corrections as corrections_table
from gpumeter_operator.billing.correct import CorrectionRefused, Wanted
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.correct import book, weigh
from gpumeter_usage.period import SECOND_NS, rfc3339
from gpumeter_usage.record import Account
from rigs.audited import DIGESTED_NS, audited, digested
from rigs.corrected import REPORT
from rigs.databases import Database
from rigs.ledger import FakeWorker, finals
from rigs.pricing import SERVICE, PricedHour, at, check_parts, plan, rate

ALL = Wanted("team-a", REPORT, -1200 * SECOND_NS, "All of it was a probe.", "bob")


def after_the_change(fake: FakeWorker) -> None:
    fake.spend(Account.IDLE, at(30))
    fake.serve("s-1", "acme", at(50))


def on_both_sides(fake: FakeWorker) -> None:
    """Ten minutes at the first price, and ten at the second."""
    fake.spend(Account.IDLE, at(20))
    fake.serve("s-1", "acme", at(40))


def an_hour(where: Path | str, first: str, second: str, live: Any) -> PricedHour:
    """The hour from 10 to 11 is Final; its price changed at half past."""
    hour = PricedHour(where)
    hour.see(plan(rate(first), rate(second, 30)), 0)
    hour.pod(live)
    hour.close()
    return hour


def given_back(hour: PricedHour) -> Decimal:
    """By how much the next hour's bill of acme is less, after everything that must add up did."""
    hour.run(125)
    assert audit(hour.ledger, SERVICE) == []
    digested(hour.ledger, DIGESTED_NS)
    assert audited(hour.ledger) == []
    found = {tenant: report["status"] for (end, tenant), report in finals(hour.ledger).items() if end == at(120)}
    for status in found.values():
        check_parts(status)
    amounts = {tenant: Decimal(status["amount"]) for tenant, status in found.items()}
    assert amounts["acme"] == -amounts[PLATFORM]
    return -amounts["acme"]


@pytest.mark.parametrize(("first", "second"), [("36.00", "3.60"), ("0.36", "3.60")], ids=["falls", "rises"])
def test_giving_all_time_back_gives_all_money_back_where_it_was_used_at_one_price(
    database: Database, first: str, second: str
) -> None:
    hour = an_hour(database.url, first, second, after_the_change)
    assert finals(hour.ledger)[at(60), "acme"]["status"]["amount"] == "1.2"
    assert book(hour.ledger, ALL, at(65)).amount == Decimal("-1.2")
    assert given_back(hour) == Decimal("1.2")


def test_time_of_two_prices_is_given_back_part_by_part_each_at_its_own(tmp_path: Path) -> None:
    hour = an_hour(tmp_path, "36.00", "3.60", on_both_sides)
    assert finals(hour.ledger)[at(60), "acme"]["status"]["amount"] == "6.6"
    with pytest.raises(CorrectionRefused) as refused:
        book(hour.ledger, ALL, at(65))
    assert refused.value.reason == "WhichPart"
    assert (
        "in the parts from 2026-11-21T10:00:00Z (36 USD an hour), 2026-11-21T10:30:00Z (3.6 USD an hour), and its "
        "price changed within it; name the start of one with --from" in str(refused.value)
    )
    with pytest.raises(CorrectionRefused, match="none of them begins when --from says"):
        book(hour.ledger, replace(ALL, part_start_ns=at(31)), at(65))
    dear, cheap = (replace(ALL, gpu_ns=-600 * SECOND_NS, part_start_ns=at(minute)) for minute in (0, 30))
    with pytest.raises(CorrectionRefused, match=r"holds 600000000000 ns at 36 USD an hour with"):
        book(hour.ledger, replace(dear, gpu_ns=-600 * SECOND_NS - 1), at(65))
    assert book(hour.ledger, dear, at(65)).amount == Decimal("-6")
    with pytest.raises(CorrectionRefused, match="is booked already"):
        book(hour.ledger, dear, at(66))
    assert book(hour.ledger, cheap, at(66)).amount == Decimal("-0.6")
    for part in (dear, cheap):
        with pytest.raises(CorrectionRefused, match="holds 0 ns at"):
            book(hour.ledger, replace(part, gpu_ns=-1, reason="Another one."), at(67))
    assert given_back(hour) == Decimal("6.6")


def test_what_is_billed_by_hand_has_the_price_of_its_part_and_can_be_given_back(tmp_path: Path) -> None:
    hour = an_hour(tmp_path, "36.00", "3.60", after_the_change)
    debit = replace(ALL, gpu_ns=60 * SECOND_NS)
    with pytest.raises(CorrectionRefused, match="name the start of one with --from"):
        book(hour.ledger, debit, at(65))
    with pytest.raises(CorrectionRefused, match=r"carries 600000000000 ns at 3.6 USD an hour"):
        book(hour.ledger, replace(debit, gpu_ns=601 * SECOND_NS, part_start_ns=at(30)), at(65))
    assert book(hour.ledger, replace(debit, part_start_ns=at(0)), at(65)).amount == Decimal("0.6")
    assert book(hour.ledger, replace(ALL, gpu_ns=-60 * SECOND_NS, part_start_ns=at(0)), at(66)).amount == Decimal(
        "-0.6"
    )
    assert given_back(hour) == 0


def test_a_bill_without_an_amount_gives_no_money_back(tmp_path: Path) -> None:
    """Half of the hour has no price, so nothing was billed."""
    hour = PricedHour(tmp_path)
    hour.see(plan(rate("3.60", 30)), 0)
    hour.pod(on_both_sides)
    hour.close()
    assert "amount" not in finals(hour.ledger)[at(60), "acme"]["status"]
    with pytest.raises(CorrectionRefused, match=r"was billed 0 USD \(it has no amount, and its condition Priced"):
        book(hour.ledger, replace(ALL, gpu_ns=-60 * SECOND_NS, part_start_ns=at(30)), at(65))


def test_a_correction_that_a_version_before_priced_by_the_first_rate_stays_as_it_was_booked(database: Database) -> None:
    """It gave back ten times what was billed. It is on its bill as it was booked; no more money goes after it."""
    hour = an_hour(database.url, "36.00", "3.60", after_the_change)
    now = weigh(hour.ledger, replace(ALL, gpu_ns=-600 * SECOND_NS), at(65)).correction
    formerly = replace(now, part_start_ns=None)
    with hour.ledger.writing() as connection:
        values = {name: getattr(formerly, name) for name in formerly.__dataclass_fields__ if name != "part_start_ns"}
        connection.execute(insert(corrections_table).values(values))
    assert corrections.of_service(hour.ledger, *SERVICE) == (formerly,)
    with pytest.raises(CorrectionRefused, match="with the corrections so far"):
        book(hour.ledger, replace(ALL, gpu_ns=-1, part_start_ns=at(30)), at(65))
    undone = replace(ALL, gpu_ns=600 * SECOND_NS, part_start_ns=at(0), reason="It had the wrong price.")
    book(hour.ledger, undone, at(66))
    book(hour.ledger, replace(ALL, part_start_ns=at(30)), at(66))
    assert given_back(hour) == Decimal("1.2")
    (charge,) = [
        each
        for each in finals(hour.ledger)[at(120), "acme"]["status"]["charges"]
        if each["amount"] == "-6" and each["from"] == rfc3339(at(0))
    ]
    assert charge["perGpuHour"] == "36"
