"""An hour of a service with a price plan, on the real ledger: what tests of prices are made of.

Owns the short way to a plan, to a pod's hour and to its reports, and the check that every bill of it adds up. What the
pods do in the hour is the test's.
"""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.tariff import Terms, canonical_spec
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity, rfc3339
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, open_ledger, started, worker

HOUR_NS = 60 * MINUTE_NS
SERVICE = ("team-a", "smollm2")
Status = dict[str, Any]


def at(minute: float) -> int:
    """A time of the hour."""
    return START_NS + int(minute * MINUTE_NS)


def plan(*rates: dict[str, Any], **changes: Any) -> bytes:
    """The canonical bytes of a plan in dollars."""
    return canonical_spec({"currency": "USD", "rates": list(rates)} | changes)


def rate(price: str, minute: float | None = None, gpu_class: str = "h100", **changes: Any) -> dict[str, Any]:
    """A rate that holds from a minute of the hour on, or from the beginning."""
    since = {} if minute is None else {"effectiveFrom": rfc3339(at(minute))}
    return {"gpuClass": gpu_class, "perGpuHour": price} | since | changes


class PricedHour:
    """One service in the hour from 10:00 to 11:00; pods are added, plans are seen, and the hour is closed."""

    def __init__(
        self, where: Path | str, terms: Terms | None = None, granularity: Granularity = Granularity.HOUR
    ) -> None:
        """`where`: a folder for a ledger of its own, or the URL of a database."""
        self.ledger: Ledger = open_ledger(where if isinstance(where, str) else where / "ledger.db", granularity)
        self.terms = {SERVICE: terms} if terms else {}
        self.newest = ""
        self._closer = Closer(self.ledger, MINUTE_NS)
        self._version = 0

    def see(self, spec: bytes | None, minute: float) -> None:
        """The collector sees a version of the plan called default, or that it is gone."""
        if spec is None:
            self.newest = ""
            self.ledger.note_plans([], at(minute))
            return
        self._version += 1
        self.newest = self.ledger.keep_plan("default", self._version, spec, at(minute))

    def pod(self, live: Callable[[FakeWorker], None], *, collect: bool = True, **identity: Any) -> FakeWorker:
        """A pod that runs through the hour; `live` says what it does, and it idles for what is left."""
        fake = FakeWorker(worker(**identity), START_NS)
        live(fake)
        fake.spend(Account.IDLE, at(60))
        fake.seal()
        life = [started("c", START_NS), ended("c", at(60)), gone(at(60))]
        self.ledger.observe(fake.identity, life, at(60))
        if collect:
            self.collect(fake, at(60))
        return fake

    def collect(self, fake: FakeWorker, now_ns: int) -> None:
        """All that a pod has written."""
        self.ledger.take(fake.identity, fake.page("boot-1", 0), now_ns)
        self.ledger.settle(fake.identity.worker_uid, now_ns)

    def run(self, minute: float) -> None:
        """One closing round."""
        self._closer.close_all(Pricing({}, {"default": self.newest}, self.terms), at(minute))

    def close(self, minute: float = 65) -> dict[str, Status]:
        """Close the hour and return the status of each tenant's report; everything that must add up is checked."""
        self.run(minute)
        assert audit(self.ledger, SERVICE) == [], "the audit reckons every bill by the minute and finds the same"
        found = {tenant: report["status"] for (end, tenant), report in finals(self.ledger).items() if end == at(60)}
        total = sum(int(status["gpuNanoseconds"]) for status in found.values())
        assert total == int(found["_platform"]["accounts"]["allocated"]), "every nanosecond stands on one bill"
        for status in found.values():
            check_parts(status)
        return found


def check_parts(status: Status) -> None:
    """The charges of a report add up to its time, and to its amount within half a step each."""
    charges = status.get("charges", [])
    if charges:
        assert sum(int(each.get("gpuNanoseconds", 0)) for each in charges) == int(status["gpuNanoseconds"])
    if "amount" not in status or not charges:
        return
    by_tokens = status.get("billingMode") == "standardRate"
    counted = [each for each in charges if _is_counted(each, by_tokens=by_tokens)]
    parts = sum(Fraction(Decimal(each["amount"])) for each in counted)
    assert abs(parts - Fraction(Decimal(status["amount"]))) <= Fraction(len(counted) + 1, 2 * 10**12)


def _is_counted(charge: dict[str, Any], *, by_tokens: bool) -> bool:
    return not by_tokens or charge["kind"] != "Usage" or charge.get("billingMode") == "measured"


def priced(status: Status) -> dict[str, str]:
    """The condition that says how a report was priced, or why not."""
    return next(each for each in status["conditions"] if each["type"] == "Priced")


def seconds(count: int) -> str:
    """Nanoseconds as reports write them."""
    return str(count * SECOND_NS)
