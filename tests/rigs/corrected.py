"""An hour that is Final, and what somebody wants corrected in it.

The price doubles after the hour, so that what is corrected at its own price can be told from what is not.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gpumeter_operator.billing.correct import Wanted
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.tariff import Terms
from gpumeter_operator.cli.accounts import audit
from gpumeter_usage.record import Account
from rigs.ledger import FakeWorker, ended, finals, gone, started, worker
from rigs.pricing import SERVICE, PricedHour, at, check_parts, plan, rate

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
