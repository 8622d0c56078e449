"""In which order versions of a price plan hold, whoever sees them and whatever the clocks say: on the real ledger."""

import asyncio
import json
from pathlib import Path
from typing import Any

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.tariff import canonical_spec
from gpumeter_operator.flow.close import Closer
from gpumeter_operator.flow.publish import Publisher
from gpumeter_operator.flow.rounds import CloseRound
from rigs.ledger import inline, open_ledger
from rigs.pricing import SERVICE, PricedHour, at, plan, rate

FLAT = plan(rate("3.60"))


class Cluster:
    """The PricePlans that are there now, and a collector's round that sees them."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._plans: dict[tuple[str, str], dict[str, Any]] = {}

    def collector(self) -> CloseRound:
        closer = Closer(self.ledger, 0)
        return CloseRound(self.ledger, closer, _nothing(), inline, services=dict, plans=lambda: self._plans)

    def set(self, price: str | None) -> None:
        self._plans = {}
        if price is not None:
            self._plans["", "default"] = {"metadata": {"name": "default"}, "spec": json.loads(plan(rate(price)))}

    def price_at(self, minute: float) -> str | None:
        """The price that the ledger knows to have been in force."""
        found = self.ledger.plan_in_force("default", at(minute))
        specs = {digest: spec for _, digest, spec in self.ledger.kept_plans()}
        return None if not found else str(json.loads(specs[found])["rates"][0]["perGpuHour"])


class _Nothing:
    async def restore(self, now_ns: int) -> bool:
        return True

    async def publish(self, manifests: object, now_ns: int) -> None:
        return None


def _nothing() -> Publisher:
    return _Nothing()  # type: ignore[return-value]


def see(collector: CloseRound, minute: float) -> None:
    asyncio.run(collector.run(at(minute)))


def test_who_leads_again_notes_that_a_plan_was_edited_back_meanwhile(tmp_path: Path) -> None:
    cluster = Cluster(open_ledger(tmp_path / "ledger.db"))
    first, second = cluster.collector(), cluster.collector()
    cluster.set("1.00")
    see(first, 0)
    cluster.set("9.00")
    see(second, 10)
    cluster.set("1.00")
    see(first, 20)
    assert [cluster.price_at(minute) for minute in (5, 15, 25)] == ["1.00", "9.00", "1.00"]


def test_who_leads_again_notes_a_plan_that_was_deleted_and_made_anew_meanwhile(tmp_path: Path) -> None:
    cluster = Cluster(open_ledger(tmp_path / "ledger.db"))
    first, second = cluster.collector(), cluster.collector()
    cluster.set("1.00")
    see(first, 0)
    cluster.set(None)
    see(second, 10)
    cluster.set("1.00")
    see(first, 20)
    assert [cluster.price_at(minute) for minute in (5, 15, 25)] == ["1.00", None, "1.00"]


def test_the_newest_version_is_in_force_also_where_its_collectors_clock_is_behind(tmp_path: Path) -> None:
    cluster = Cluster(open_ledger(tmp_path / "ledger.db"))
    first, second = cluster.collector(), cluster.collector()
    cluster.set("1.00")
    see(first, 10)
    cluster.set("9.00")
    see(first, 20)
    cluster.set("1.50")
    see(second, 19.9)
    see(second, 21)
    assert [cluster.price_at(minute) for minute in (15, 25)] == ["1.00", "1.50"]


def test_a_version_that_is_seen_by_a_clock_that_stepped_back_changes_no_period_that_is_closed(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(FLAT, 0)
    hour.run(0)
    hour.pod(lambda fake: fake.serve("s-1", "acme", at(60)))
    before, priced_with = hour.close(), hour.ledger.period_plan(*SERVICE, at(60))
    hour.see(plan(rate("7.20")), 30)
    assert hour.ledger.period_plan(*SERVICE, at(60)) == priced_with
    assert hour.close(70) == before
    assert hour.ledger.plan_in_force("default", at(66)) == hour.newest, "it holds in the period that is open"


def test_a_version_that_is_seen_by_a_clock_that_stepped_back_prices_the_rest_of_the_open_hour(tmp_path: Path) -> None:
    hour = PricedHour(tmp_path)
    hour.see(FLAT, 0)
    hour.pod(lambda fake: fake.serve("s-1", "acme", at(60)))
    hour.run(20)
    hour.see(plan(rate("7.20")), -30)
    charges = hour.close()["acme"]["charges"]
    assert [(each["from"], each["perGpuHour"]) for each in charges] == [
        ("2026-11-21T10:00:00Z", "3.6"),
        ("2026-11-21T10:21:00Z", "7.2"),
    ]


def test_a_plan_that_is_seen_anew_as_it_was_is_kept_once(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db")
    spec = canonical_spec(json.loads(FLAT))
    for minute in (0, 1, -5):
        ledger.keep_plan("default", 1, spec, at(minute))
    assert ledger.newest_plans().keys() == {"default"}
    assert ledger.plan_in_force("default", at(0)) is not None
    assert ledger.plan_in_force("default", at(-1)) is None
