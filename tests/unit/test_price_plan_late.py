"""What comes late is billed by the terms of the period in which it was used, not of the one in which it is booked.

Quarters of an hour: the first is closed without its records, the terms change, and they are booked in the second.
"""

from pathlib import Path

import pytest

from gpumeter_operator.billing.tariff import BillingMode, Terms
from gpumeter_usage.period import Granularity
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, started, worker
from rigs.pricing import SERVICE, PricedHour, Status, at, check_parts, plan, rate, seconds

STANDARD = {"model": "smollm2", "perThousandPromptTokens": "0.1", "perThousandCompletionTokens": "1"}
MEASURED = Terms()
BY_TOKENS = Terms(BillingMode.STANDARD_RATE)


def second_quarter(folder: Path, before: Terms, after: Terms, payer: str = "platform") -> dict[str, Status]:
    """The reports of 10:15 to 10:30, in which those 15 minutes are booked and all that came late of the 15 before."""
    hour = PricedHour(folder, before, Granularity.FIFTEEN_MINUTES)
    hour.see(plan(rate("3.60"), standardRates=[STANDARD], idlePayer=payer), 0)

    fake = FakeWorker(worker(), START_NS)
    fake.spend(Account.IDLE, at(5))
    fake.serve("s-1", "acme", at(15))
    fake.spend(Account.IDLE, at(20))
    fake.serve("s-2", "acme", at(30))
    fake.spend(Account.IDLE, at(60))
    fake.seal()
    hour.ledger.observe(fake.identity, [started("c", START_NS)], START_NS)
    hour.run(1)
    hour.terms = {SERVICE: after}
    hour.run(17)  # the first quarter is Final without the pod's records
    hour.ledger.observe(fake.identity, [ended("c", at(60)), gone(at(60))], at(60))
    hour.collect(fake, at(61))
    hour.close(62)  # the audit agrees
    found = {tenant: report["status"] for (end, tenant), report in finals(hour.ledger).items() if end == at(30)}
    for status in found.values():
        check_parts(status)
    return found


def kinds(status: Status) -> list[tuple[str, str, str | None]]:
    return [(each["from"][11:16], each["kind"], each.get("billingMode")) for each in status["charges"]]


def test_late_idle_time_is_charged_to_who_owned_the_service_then(tmp_path: Path) -> None:
    found = second_quarter(tmp_path, Terms(owner="beta"), Terms(owner="gamma"), "owner")
    assert {tenant: found[tenant]["idleGpuNanoseconds"] for tenant in ("beta", "gamma")} == {
        "beta": seconds(300),
        "gamma": seconds(300),
    }
    assert found["beta"]["amount"] == "0.3"


def test_late_usage_of_a_measured_period_is_paid_as_measured_and_the_rest_by_tokens(tmp_path: Path) -> None:
    acme = second_quarter(tmp_path, MEASURED, BY_TOKENS)["acme"]
    assert kinds(acme) == [
        ("10:00", "Usage", "measured"),
        ("10:15", "Usage", None),
        ("10:15", "Tokens", None),
    ]
    tokens = next(each["amount"] for each in acme["charges"] if each["kind"] == "Tokens")
    assert float(acme["amount"]) == pytest.approx(0.6 + float(tokens), abs=1e-11)
    assert (acme["billingMode"], acme["measuredAmount"]) == ("standardRate", "1.2")


def test_late_usage_of_a_period_by_tokens_is_paid_by_tokens_and_the_rest_as_measured(tmp_path: Path) -> None:
    acme = second_quarter(tmp_path, BY_TOKENS, MEASURED)["acme"]
    assert kinds(acme) == [
        ("10:00", "Usage", None),
        ("10:00", "Tokens", None),
        ("10:15", "Usage", "measured"),
    ]
    tokens = next(each["amount"] for each in acme["charges"] if each["kind"] == "Tokens")
    assert float(acme["amount"]) == pytest.approx(0.6 + float(tokens), abs=1e-11)
