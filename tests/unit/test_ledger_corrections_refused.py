"""What cannot be corrected by hand: no more than was billed, of one class and price, and said in words."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from gpumeter_operator.adapters.ledger import corrections
from gpumeter_operator.billing.correct import CorrectionRefused, Wanted
from gpumeter_operator.billing.tariff import BillingMode, Terms
from gpumeter_operator.flow.correct import book, weigh
from gpumeter_usage.period import SECOND_NS
from rigs.corrected import CREDIT, DEBIT, PLATFORMS, an_hour, closed_hour, serve
from rigs.pricing import SERVICE, PricedHour, at, plan, rate, seconds

REFUSED: list[tuple[str, Wanted]] = [
    ("NoFinalReport", replace(CREDIT, report="smollm2-acme-20261121t11")),
    ("NoFinalReport", replace(CREDIT, namespace="team-b")),
    ("PlatformsReport", replace(CREDIT, report=PLATFORMS)),
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
