"""A correction by hand of what standard rates billed: tokens, at the price of what it corrects, on two bills."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpumeter_operator.adapters.ledger import corrections
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.correct import CorrectionRefused, Wanted
from gpumeter_operator.billing.facts import PLATFORM, Tokens
from gpumeter_operator.billing.tariff import BillingMode, Terms
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.cli.adjust import adjust
from gpumeter_operator.cli.usage import usage
from gpumeter_operator.flow.correct import book
from gpumeter_usage.balance import CUT
from gpumeter_usage.period import SECOND_NS
from gpumeter_usage.record import Account
from rigs.audited import DIGESTED_NS, audited, digested
from rigs.databases import Database
from rigs.ledger import FakeWorker, ended, finals, gone, started, worker
from rigs.pricing import SERVICE, PricedHour, at, check_parts, plan, rate

STANDARD = Terms(BillingMode.STANDARD_RATE)
REPORT = "smollm2-acme-20261121t10"
CREDIT = Wanted("team-a", REPORT, 0, "INC-42: a probe.", "alice@example.com", tokens=Tokens(-14, 0, -22))
"""Two of acme's twenty minutes, of 7 tokens of a prompt and 11 of an answer each."""


def tokens(prompt: str, completion: str, **changes: Any) -> dict[str, Any]:
    return {"model": "smollm2", "perThousandPromptTokens": prompt, "perThousandCompletionTokens": completion, **changes}


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'ledger.db'}"


def serve(fake: FakeWorker) -> None:
    fake.serve("s-1", "acme", at(20))
    fake.serve("s-2", "beta", at(30))


def an_hour(where: Path | str, *later: dict[str, Any], terms: Terms = STANDARD) -> PricedHour:
    """The hour from 10 to 11 is Final, acme was billed 20 x (7 x 0.0001 + 11 x 0.001) = 0.234; then prices double."""
    hour = PricedHour(where, terms)
    hour.see(plan(rate("3.60"), standardRates=[tokens("0.10", "1"), *later]), 0)
    hour.pod(serve)
    hour.close()
    hour.see(plan(rate("7.20"), standardRates=[tokens("0.20", "2")]), 62)
    return hour


def next_hour(hour: PricedHour) -> dict[str, dict[str, Any]]:
    """The bills of the next hour, in which nothing ran, after everything that must add up did."""
    hour.run(125)
    assert audit(hour.ledger, SERVICE) == []
    digested(hour.ledger, DIGESTED_NS)
    assert audited(hour.ledger) == []
    found = {tenant: report["status"] for (end, tenant), report in finals(hour.ledger).items() if end == at(120)}
    for status in found.values():
        check_parts(status)
    assert sum(Decimal(status["amount"]) for status in found.values()) == 0, "what one gets back the other carries"
    return found


def test_tokens_are_given_back_at_the_price_at_which_they_were_billed_and_no_time_is(database: Database) -> None:
    hour = an_hour(database.url)
    before = finals(hour.ledger)
    assert before[at(60), "acme"]["status"]["amount"] == "0.234"
    booked = book(hour.ledger, CREDIT, at(65))
    assert (booked.amount, booked.currency) == (Decimal("-0.0234"), "USD")
    found = next_hour(hour)
    acme, platform = found["acme"], found[PLATFORM]
    assert (acme["amount"], platform["amount"]) == ("-0.0234", "0.0234")
    assert (acme["gpuNanoseconds"], acme["tokens"]["total"]) == ("0", 0), "what was used in this hour"
    (entry,) = acme["adjustments"]
    assert platform["adjustments"] == [entry]
    back = {"prompt": -14, "cached": 0, "completion": -22, "total": -36}
    assert (entry["model"], entry["tokens"]) == ("smollm2", back) and "gpuNanoseconds" not in entry
    (charge,) = acme["charges"]
    assert (charge["kind"], charge["model"], charge["tokens"]) == ("Correction", "smollm2", back)
    after = finals(hour.ledger)
    assert {key: after[key] for key in before} == before, "what is Final stays as it is"


def test_all_tokens_that_are_given_back_give_all_money_back_and_none_more(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    for count in (Tokens(-141), Tokens(0, 0, -221), Tokens(-1, -1)):
        with pytest.raises(CorrectionRefused, match=r"holds 140 prompt tokens \(0 of them cached\)") as refused:
            book(hour.ledger, replace(CREDIT, tokens=count), at(65))
        assert refused.value.reason == "MoreThanBilled"
    book(hour.ledger, CREDIT, at(65))
    with pytest.raises(CorrectionRefused, match="is booked already"):
        book(hour.ledger, CREDIT, at(65))
    with pytest.raises(CorrectionRefused, match="holds 126 prompt tokens"):
        book(hour.ledger, replace(CREDIT, tokens=Tokens(-127)), at(65))
    book(hour.ledger, replace(CREDIT, tokens=Tokens(-126, 0, -198)), at(65))
    assert next_hour(hour)["acme"]["amount"] == "-0.234"


def test_tokens_that_were_not_billed_are_billed_at_the_price_of_their_time(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    debit = replace(CREDIT, tokens=Tokens(1000, 400, 50))
    assert book(hour.ledger, debit, at(65)).amount == Decimal("0.15"), "cached ones cost as much where nothing is said"
    most = 3600 * SECOND_NS // 10 - 600 - 50 - 140 - 220
    with pytest.raises(CorrectionRefused, match="more tokens than the 360000000000 that any device") as refused:
        book(hour.ledger, replace(debit, tokens=Tokens(most + 1)), at(65))
    assert refused.value.reason == "MoreThanAllocated"
    found = next_hour(hour)
    assert (found["acme"]["amount"], found[PLATFORM]["amount"]) == ("0.15", "-0.15")


def test_who_has_no_report_is_billed_tokens_beside_the_platforms(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    debit = replace(CREDIT, report="smollm2-platform-20261121t10", tenant="gamma", tokens=Tokens(1000, 0, 50))
    assert book(hour.ledger, debit, at(65)).amount == Decimal("0.15")
    with pytest.raises(CorrectionRefused, match=r"the bill of gamma, beside .* holds 1000 prompt tokens"):
        book(hour.ledger, replace(debit, tokens=Tokens(-1001)), at(65))
    assert next_hour(hour)["gamma"]["amount"] == "0.15"


def test_of_two_prices_of_tokens_within_the_period_a_correction_names_one(tmp_path: Path) -> None:
    hour = an_hour(tmp_path, tokens("1", "10", effectiveFrom="2026-11-21T10:10:00Z"))
    assert finals(hour.ledger)[at(60), "acme"]["status"]["amount"] == "1.287"
    with pytest.raises(CorrectionRefused, match="name the start of one with --from") as refused:
        book(hour.ledger, CREDIT, at(65))
    assert refused.value.reason == "WhichPart"
    assert "(1 / 1 / 10 USD for 1,000 prompt / cached / completion tokens)" in str(refused.value)
    cheap, dear = (replace(CREDIT, tokens=Tokens(-70, 0, -110), part_start_ns=at(minute)) for minute in (0, 10))
    assert book(hour.ledger, cheap, at(65)).amount == Decimal("-0.117")
    with pytest.raises(CorrectionRefused, match="holds 0 prompt tokens"):
        book(hour.ledger, replace(cheap, tokens=Tokens(-1)), at(65))
    assert book(hour.ledger, dear, at(65)).amount == Decimal("-1.17")
    assert next_hour(hour)["acme"]["amount"] == "-1.287"


def test_a_wish_that_makes_no_sense_of_a_bill_by_tokens_is_refused(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    for wanted, reason in (
        (replace(CREDIT, gpu_ns=-1, tokens=None), "BilledByTokens"),
        (replace(CREDIT, gpu_ns=-1), "TimeAndTokens"),
        (replace(CREDIT, tokens=Tokens()), "NothingToCorrect"),
        (replace(CREDIT, tokens=Tokens(-5, 0, 7)), "TokensDisagree"),
        (replace(CREDIT, tokens=Tokens(-5, -6)), "TokensDisagree"),
        (replace(CREDIT, model="another"), "WhichModel"),
    ):
        with pytest.raises(CorrectionRefused) as refused:
            book(hour.ledger, wanted, at(65))
        assert refused.value.reason == reason


def test_a_bill_of_measured_time_has_no_tokens_to_give_back(tmp_path: Path) -> None:
    hour = an_hour(tmp_path, terms=Terms())
    with pytest.raises(CorrectionRefused, match="was billed as measured") as refused:
        book(hour.ledger, CREDIT, at(65))
    assert refused.value.reason == "BilledByTime"


def test_beside_usage_a_correction_of_tokens_leaves_the_measured_price_as_it_is(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path, STANDARD)
    hour.see(plan(rate("3.60"), standardRates=[tokens("0.10", "1")]), 0)
    hour.ledger.observe(worker(), [started("c", at(0))], at(1))
    hour.run(1)
    hour.pod(serve)
    hour.terms = {SERVICE: Terms()}  # from the next hour on the service is billed as measured
    hour.close()
    hour.see(plan(rate("7.20")), 62)
    book(hour.ledger, CREDIT, at(65))
    later = FakeWorker(worker(2), at(60))
    later.spend(Account.IDLE, at(70))
    later.serve("s-9", "acme", at(80))
    later.seal()
    hour.ledger.observe(later.identity, [started("c", at(60)), ended("c", at(80)), gone(at(80))], at(80))
    hour.collect(later, at(80))
    hour.run(125)
    assert audit(hour.ledger, SERVICE) == []
    acme = finals(hour.ledger)[at(120), "acme"]["status"]
    assert (acme["amount"], acme["measuredAmount"]) == ("1.1766", "1.2") and "billingMode" not in acme
    assert acme["pricePerThousandTokens"] == "6.666666666667", "1.2 of 180 tokens"
    check_parts(acme)


def test_the_command_and_usage_tell_of_tokens(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    told = ["--ledger", url_of(tmp_path), "-n", "team-a", REPORT, "--reason", "A probe.", "--actor", "bob"]
    run = CliRunner().invoke(adjust, [*told, "--prompt-tokens", "-14", "--completion-tokens=-22"])
    assert run.exit_code == 0, run.output
    assert "-14 prompt tokens (+0 of them cached) and -22 of answers (-0.0234 USD" in run.output
    next_hour(hour)
    listed = CliRunner().invoke(usage, ["--ledger", url_of(tmp_path), "--since", "2026-11-21T11:00:00Z"])
    assert "-0.0234" in listed.output and "-22 of answers of acme's report" in listed.output


def test_verify_names_a_correction_of_a_model_that_nobody_served(tmp_path: Path) -> None:
    hour = an_hour(tmp_path)
    book(hour.ledger, CREDIT, at(65))
    hour.run(125)
    digested(hour.ledger, DIGESTED_NS)
    hour.ledger.close()
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as raw:
        raw.execute("DROP TRIGGER corrections_no_update")
        raw.execute("UPDATE corrections SET model = 'another'")
        raw.commit()
    told = [each.message for each in audited(Reader(url_of(tmp_path))) if each.reason == "CorrectionUnproved"]
    assert "no pod of that period had the model 'another', but smollm2" in told[0]


def test_a_ledger_of_before_keeps_its_corrections_of_time_and_its_chains(database: Database) -> None:
    hour = an_hour(database.url, terms=Terms())
    booked = book(hour.ledger, replace(CREDIT, tokens=None, gpu_ns=-1), at(65)).correction
    hour.ledger.close()
    added = {
        "corrections": ("model", "prompt_tokens", "cached_tokens", "completion_tokens"),
        "boots": ("open_seq", "open_ns", "open_minute_ns", "open_cut", "tokens"),
    }
    for table, columns in added.items():
        for column in columns:
            database.run(f"ALTER TABLE {table} DROP COLUMN {column}")
    database.run("UPDATE alembic_version SET version_num = '0013'")
    hour.ledger = Ledger(database.url)
    assert corrections.of_service(hour.ledger, *SERVICE) == (booked,)
    assert [boot.open for boot in hour.ledger.boots("pod-uid-1")] == [CUT]
    hour.run(125)
    assert audit(hour.ledger, SERVICE) == []
