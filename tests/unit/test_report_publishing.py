"""Which Final reports stand in the API: those that are lost come back the same, those whose time is over go."""

import json
from pathlib import Path
from typing import Any

import pytest

from devcluster.layout import REPOSITORY
from gpumeter_operator.adapters.kubernetes import Refused
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.keep import Keep, leaves_ns, most_reports, stay_since_ns
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.publish import Publisher, period_of
from gpumeter_usage.period import DAY_NS, MINUTE_NS, Granularity, day_of, month_of
from gpumeter_usage.period import period_of as period_ending
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, ended, gone, inline, open_ledger, started, worker

HOUR_NS = 60 * MINUTE_NS
DAY_END_NS = day_of(START_NS + 1).end_ns
MONTH_END_NS = month_of(START_NS + 1).end_ns
KEEP = Keep(hours=2, days=10, months=40)
Report = dict[str, Any]


class Reports:
    """UsageReports as an API server holds them."""

    def __init__(self) -> None:
        self.held: dict[str, Report] = {}
        self.writes = 0

    async def list(self, *_: object) -> list[Report]:
        return list(self.held.values())

    async def apply(self, manifest: Report, *, field_manager: str, subresource: str | None = None) -> Report:
        name = manifest["metadata"]["name"]
        self.writes += 1
        if subresource is None:
            known = self.held.get(name, {})
            uid = {"uid": f"uid-{self.writes}"} if not known else {"uid": known["metadata"]["uid"]}
            self.held[name] = {**known, **manifest, "metadata": {**manifest["metadata"], **uid}}
        elif name not in self.held:
            raise Refused(404, "NotFound", name)
        else:
            self.held[name] = {**self.held[name], "status": manifest["status"]}
        return self.held[name]

    async def delete(
        self, resource: object, name: str, namespace: str | None = None, *, uid: str | None = None
    ) -> None:
        if self.held[name]["metadata"]["uid"] == uid:
            del self.held[name]

    def bodies(self) -> dict[str, str]:
        """What they say, without what an API server adds."""
        return {name: json.dumps([one["spec"], one["status"]], sort_keys=True) for name, one in self.held.items()}

    def of(self, granularity: str) -> int:
        return sum(one["spec"]["period"]["granularity"] == granularity for one in self.held.values())


def a_bill(path: Path) -> Ledger:
    """Two hours of one pod and one tenant, in the evening before the day after."""
    ledger = open_ledger(path, Granularity.HOUR)
    fake = FakeWorker(worker(), START_NS)
    fake.serve("s-1", "acme", START_NS + HOUR_NS + MINUTE_NS)
    fake.spend(Account.DRAIN, START_NS + 2 * HOUR_NS)
    fake.seal()
    events = [started("c", START_NS), ended("c", START_NS + 2 * HOUR_NS), gone(START_NS + 2 * HOUR_NS)]
    ledger.observe(fake.identity, events, START_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0), START_NS + 2 * HOUR_NS)
    return ledger


class Collector:
    """Closes and publishes as the collector's round does; `restart` forgets what is only in memory."""

    def __init__(self, ledger: Ledger, reports: Reports) -> None:
        self.ledger, self.reports = ledger, reports
        self.restart()

    def restart(self) -> None:
        self.closer = Closer(self.ledger, 10 * MINUTE_NS)
        self.publisher = Publisher(self.reports, self.ledger, inline, KEEP)

    async def round(self, now_ns: int) -> None:
        manifests = self.closer.close_all(Pricing({}, {}), now_ns)
        while not await self.publisher.restore(now_ns):
            pass
        await self.publisher.publish(manifests, now_ns)


async def test_an_hour_leaves_the_api_when_its_day_is_final_and_its_time_is_over(tmp_path: Path) -> None:
    collector = Collector(a_bill(tmp_path / "ledger.db"), Reports())
    held = collector.reports
    await collector.round(START_NS + 3 * HOUR_NS)
    await collector.round(DAY_END_NS + MINUTE_NS)
    assert (held.of("Hour"), held.of("Day"), held.of("Month")) == (4, 2, 2)
    await collector.round(DAY_END_NS + 2 * DAY_NS - 1)
    assert held.of("Hour") == 4
    await collector.round(DAY_END_NS + 2 * DAY_NS)
    assert (held.of("Hour"), held.of("Day"), held.of("Month")) == (0, 2, 2)
    assert collector.publisher.removed == 4
    assert len(collector.ledger.final_reports("team-a", "smollm2")) == 4, "the ledger keeps them"
    await collector.round(MONTH_END_NS + 10 * DAY_NS)
    assert (held.of("Day"), held.of("Month")) == (0, 2)
    await collector.round(MONTH_END_NS + 40 * DAY_NS)
    assert held.held == {}


async def test_a_compacted_report_is_not_published_again_not_even_after_a_restart(tmp_path: Path) -> None:
    collector = Collector(a_bill(tmp_path / "ledger.db"), Reports())
    await collector.round(DAY_END_NS + MINUTE_NS)
    await collector.round(DAY_END_NS + 2 * DAY_NS)
    writes = collector.reports.writes
    collector.restart()
    await collector.round(DAY_END_NS + 2 * DAY_NS + MINUTE_NS)
    await collector.round(DAY_END_NS + 2 * DAY_NS + 2 * MINUTE_NS)
    assert collector.reports.of("Hour") == 0
    assert collector.reports.writes == writes + 4, "only the open month is written, once, by whoever starts anew"


async def test_all_that_is_lost_with_etcd_is_published_again_the_same(tmp_path: Path) -> None:
    collector = Collector(a_bill(tmp_path / "ledger.db"), Reports())
    await collector.round(DAY_END_NS + MINUTE_NS)
    await collector.round(DAY_END_NS + 2 * MINUTE_NS)
    before = collector.reports.bodies()
    assert len(before) == 8
    collector.reports.held.clear()
    await collector.round(DAY_END_NS + 3 * MINUTE_NS)
    assert collector.reports.bodies() == before
    collector.reports.held.clear()
    collector.restart()
    await collector.round(DAY_END_NS + 4 * MINUTE_NS)
    assert collector.reports.bodies() == before


async def test_what_is_lost_comes_back_in_bounded_portions(tmp_path: Path) -> None:
    collector = Collector(a_bill(tmp_path / "ledger.db"), Reports())
    collector.closer.close_all(Pricing({}, {}), DAY_END_NS + MINUTE_NS)
    publisher = Publisher(collector.reports, collector.ledger, inline, KEEP, restored_max=4)
    assert not await publisher.restore(DAY_END_NS + MINUTE_NS)
    assert len(collector.reports.held) == 4
    assert await publisher.restore(DAY_END_NS + MINUTE_NS)
    assert len(collector.reports.held) == 6


async def test_a_report_of_another_ledger_and_one_whose_day_is_not_final_stay(tmp_path: Path) -> None:
    """Removed they would be gone for good."""
    collector = Collector(a_bill(tmp_path / "ledger.db"), Reports())
    await collector.round(START_NS + 3 * HOUR_NS)
    late_ns = DAY_END_NS + 2 * DAY_NS
    await collector.publisher.restore(late_ns)
    assert collector.reports.of("Hour") == 4, "their day was never closed"
    foreign = Collector(open_ledger(tmp_path / "other.db", Granularity.HOUR), collector.reports)
    await foreign.round(late_ns)
    assert collector.reports.of("Hour") == 4


@pytest.mark.parametrize("granularity", [Granularity.HOUR, Granularity.DAY, Granularity.MONTH])
def test_what_is_not_restored_any_more_is_exactly_what_has_left(granularity: Granularity) -> None:
    """A moment between the two would remove and write in turn for ever."""
    for end_ns in range(START_NS, START_NS + 70 * DAY_NS, 6 * HOUR_NS):
        period = {
            Granularity.HOUR: lambda at_ns: period_ending(at_ns, Granularity.HOUR),
            Granularity.DAY: day_of,
            Granularity.MONTH: month_of,
        }[granularity](end_ns)
        edge_ns = leaves_ns(period, KEEP)
        assert period.end_ns > stay_since_ns(granularity, KEEP, edge_ns - 1)
        assert period.end_ns <= stay_since_ns(granularity, KEEP, edge_ns)


def test_the_number_of_reports_in_the_api_stays_within_its_bound() -> None:
    """One tenant that is served in every hour of 100 days, looked at now and then, by the rule alone."""
    held_most = 0
    ends = [START_NS + number * HOUR_NS for number in range(100 * 24)]
    for now_ns in ends[::31]:
        hours = [end for end in ends if end <= now_ns]
        kept = [end for end in hours if leaves_ns(period_ending(end, Granularity.HOUR), KEEP) > now_ns]
        days = {day_of(end) for end in hours}
        months = {month_of(end) for end in hours}
        held = len(kept) + sum(leaves_ns(one, KEEP) > now_ns for one in days | months)
        held_most = max(held_most, held)
    assert held_most <= most_reports(KEEP, HOUR_NS) <= held_most + 80


def test_the_documents_state_the_bound_of_the_chart() -> None:
    values, told = (
        (REPOSITORY / name).read_text() for name in ("charts/gpumeter/values.yaml", "docs/billing-explained.md")
    )
    assert "keepDays: {hours: 3, days: 31, months: 400}" in values and Keep() == Keep(3, 31, 400)
    most = most_reports(Keep(), HOUR_NS)
    assert f"at most {most}\n" in values and f"\n{most} reports of a tenant and service" in told


def test_the_period_of_a_report_is_read_from_its_spec() -> None:
    spec = {"period": {"start": "2026-11-01T00:00:00Z", "end": "2026-12-01T00:00:00Z", "granularity": "Month"}}
    assert period_of({"spec": spec}) == month_of(START_NS)
