"""What a service's own status says of its use: the sums of its reports, and how often that is written."""

import itertools
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gpumeter_operator.adapters.kubernetes import Refused
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.service_usage import HOUR_NS, Usage, usage_of, written
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.service_usage import IDLE_EVERY_NS, MAX_TELLING_NS, MAX_WRITES, USED_EVERY_NS, UsageTeller
from gpumeter_usage.period import MINUTE_NS, Granularity, month_of
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, Clock, FakeWorker, inline, open_ledger, started, worker
from rigs.pricing import plan, rate

SERVICE = ("team-a", "smollm2")
Report = dict[str, Any]


class Running:
    """One pod that serves one tenant at 3.60 an hour, and the reports that a round of closing makes of it."""

    def __init__(self, folder: Path, granularity: Granularity = Granularity.HOUR, price: str = "3.60") -> None:
        self.ledger: Ledger = open_ledger(folder / "ledger.db", granularity)
        self.plan = self.ledger.keep_plan("default", 1, plan(rate(price)), START_NS)
        self.closer = Closer(self.ledger, 0)
        self.fake = FakeWorker(worker(), START_NS)
        self.taken = 0
        self.ledger.observe(self.fake.identity, [started("c", START_NS)], START_NS)

    def serve(self, until_ns: int) -> None:
        """The tenant has the GPU up to then."""
        self.fake.serve(f"s-{until_ns}", "acme", until_ns)
        self._take()

    def idle(self, until_ns: int) -> None:
        self.fake.spend(Account.IDLE, until_ns)
        self._take()

    def reports(self, now_ns: int) -> list[Report]:
        return self.closer.close_all(Pricing({}, {"default": self.plan}), now_ns)

    def _take(self) -> None:
        self.ledger.take(self.fake.identity, self.fake.page("boot-1", self.taken), self.fake.frontier_ns)
        self.ledger.settle(self.fake.identity.worker_uid, self.fake.frontier_ns)
        self.taken = len(self.fake.boot.links)


def test_the_hour_is_the_running_ones_and_the_month_has_the_final_hours_too(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.serve(START_NS + 15 * MINUTE_NS)
    running.idle(START_NS + 60 * MINUTE_NS)
    running.serve(START_NS + 72 * MINUTE_NS)
    running.reports(START_NS + 61 * MINUTE_NS)
    now_ns = START_NS + 72 * MINUTE_NS
    running.reports(now_ns)
    found = usage_of(running.reports(now_ns), now_ns)
    assert found is not None
    assert (found.hour_ns, found.attributed_ns) == (START_NS + HOUR_NS, 12 * MINUTE_NS)
    assert (found.allocated_ns, found.unaccounted_ns) == (72 * MINUTE_NS, 0)
    assert written(found) == {
        "hour": "2026-11-21T11:00:00Z",
        "gpuSeconds": "720",
        "unaccounted": "0",
        "gpuHours": "1.2",
        "cost": "4.32 USD",
    }


@pytest.mark.parametrize("granularity", [Granularity.MINUTE, Granularity.FIFTEEN_MINUTES, Granularity.HOUR])
async def test_an_hour_is_the_same_whatever_the_length_of_periods_and_after_a_restart(
    tmp_path: Path, granularity: Granularity
) -> None:
    running, cluster = Running(tmp_path, granularity), FakeCluster()
    running.serve(START_NS + 31 * MINUTE_NS)
    for minute in (5, 20, 33):
        running.reports(START_NS + minute * MINUTE_NS)
    running.idle(START_NS + 40 * MINUTE_NS)
    running.closer = Closer(running.ledger, 0)
    now_ns = START_NS + 40 * MINUTE_NS
    await UsageTeller(cluster, running.ledger, inline, services).tell(running.reports(now_ns), now_ns)
    (usage,) = cluster.usages
    assert (usage["gpuSeconds"], usage["gpuHours"], usage["cost"]) == ("1860", "0.667", "2.40 USD")


def test_amounts_of_two_currencies_stand_beside_each_other_and_nothing_stands_for_none() -> None:
    both = {"USD": Decimal("1.005"), "EUR": Decimal(2)}
    assert written(Usage(START_NS, amounts=both))["cost"] == "2.00 EUR + 1.00 USD"
    assert "cost" not in written(Usage(START_NS))
    assert usage_of([], START_NS) is None


def test_a_month_that_has_just_begun_does_not_count_the_last_one(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.serve(START_NS + 30 * MINUTE_NS)
    after_ns = month_of(START_NS + 1).end_ns + MINUTE_NS
    assert usage_of(running.reports(START_NS + 30 * MINUTE_NS), after_ns) is None


class FakeCluster:
    """Keeps what is applied, or refuses."""

    def __init__(self) -> None:
        self.refuses = 0
        self.asked = 0
        self.usages: list[dict[str, Any]] = []

    async def apply(
        self, manifest: dict[str, Any], *, field_manager: str, subresource: str | None = None
    ) -> dict[str, Any]:
        assert (field_manager, subresource) == ("gpumeter-collector", "status")
        assert manifest["metadata"]["uid"], "a namesake must not be told"
        self.asked += 1
        if self.refuses:
            raise Refused(self.refuses, "Forbidden", "may not")
        self.usages.append(manifest["status"]["usage"])
        return manifest


def services(status: dict[str, Any] | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    return {SERVICE: {"metadata": {"uid": "u"}, "status": status or {}}}


async def test_use_is_written_once_a_minute_and_idleness_every_ten(tmp_path: Path) -> None:
    running, cluster = Running(tmp_path), FakeCluster()
    teller = UsageTeller(cluster, running.ledger, inline, services)
    times = []
    for second in range(0, 1_800, 20):
        now_ns = START_NS + second * 1_000_000_000
        running.serve(now_ns) if second <= 300 else running.idle(now_ns)
        before = len(cluster.usages)
        await teller.tell(running.reports(now_ns), now_ns)
        times += [second] * (len(cluster.usages) - before)
    busy, idle = [one for one in times if one <= 300], [one for one in times if one > 360]
    assert all(later - earlier >= USED_EVERY_NS / 1e9 for earlier, later in itertools.pairwise(busy))
    assert 4 <= len(busy) <= 6
    assert all(later - earlier >= IDLE_EVERY_NS / 1e9 for earlier, later in itertools.pairwise(idle))
    assert 1 <= len(idle) <= 3


async def test_what_stands_there_already_is_not_written_again(tmp_path: Path) -> None:
    running, cluster = Running(tmp_path), FakeCluster()
    running.serve(START_NS + MINUTE_NS)
    reports = running.reports(START_NS + MINUTE_NS)
    await UsageTeller(cluster, running.ledger, inline, services).tell(reports, START_NS + MINUTE_NS)
    there = services({"usage": cluster.usages[0]})
    await UsageTeller(cluster, running.ledger, inline, lambda: there).tell(reports, START_NS + MINUTE_NS)
    assert cluster.asked == 1


async def test_a_refusal_stops_nobody_and_is_tried_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running, cluster = Running(tmp_path), FakeCluster()
    teller = UsageTeller(cluster, running.ledger, inline, services)
    cluster.refuses = 403
    for minute in (1, 2, 3):
        running.serve(START_NS + minute * MINUTE_NS)
        await teller.tell(running.reports(START_NS + minute * MINUTE_NS), START_NS + minute * MINUTE_NS)
    assert cluster.asked == 3
    assert caplog.text.count("The usage of team-a/smollm2 cannot be written") == 1


async def test_a_service_that_goes_or_is_gone_is_told_nothing(tmp_path: Path) -> None:
    running, cluster = Running(tmp_path), FakeCluster()
    running.serve(START_NS + MINUTE_NS)
    reports = running.reports(START_NS + MINUTE_NS)
    leaving = {SERVICE: {"metadata": {"uid": "u", "deletionTimestamp": "2026-11-21T10:01:00Z"}}}
    for there in ({}, leaving):
        await UsageTeller(cluster, running.ledger, inline, lambda there=there: there).tell(reports, START_NS)
    assert cluster.asked == 0


async def test_a_round_writes_no_more_than_its_share_and_the_next_one_goes_on(tmp_path: Path) -> None:
    running, cluster = Running(tmp_path), FakeCluster()
    running.serve(START_NS + MINUTE_NS)
    reports, many, there = running.reports(START_NS + MINUTE_NS), [], {}
    for number in range(MAX_WRITES + 10):
        there["team-a", f"s{number}"] = {"metadata": {"uid": f"u{number}"}}
        many += [{**one, "spec": {**one["spec"], "serviceRef": {"name": f"s{number}"}}} for one in reports]
    teller = UsageTeller(cluster, running.ledger, inline, lambda: there, Clock())
    await teller.tell(many, START_NS + MINUTE_NS)
    assert cluster.asked == MAX_WRITES
    await teller.tell(many, START_NS + MINUTE_NS)
    assert cluster.asked == MAX_WRITES + 10


def reports_of(reports: list[Report], names: list[str]) -> list[Report]:
    """The same reports for each of these services."""
    return [{**one, "spec": {**one["spec"], "serviceRef": {"name": name}}} for name in names for one in reports]


async def test_whoever_has_waited_longest_is_told_first_so_that_no_name_waits_for_ever(tmp_path: Path) -> None:
    running, told = Running(tmp_path), []
    names = [f"s{number:03}" for number in range(2 * MAX_WRITES + 10)]
    there = {("team-a", name): {"metadata": {"uid": name}} for name in names}

    class Named(FakeCluster):
        async def apply(self, manifest: dict[str, Any], **how: Any) -> dict[str, Any]:
            told.append(manifest["metadata"]["name"])
            return await super().apply(manifest, **how)

    cluster = Named()
    teller = UsageTeller(cluster, running.ledger, inline, lambda: there, Clock())
    for minute in range(1, 4):  # every service has used something by then, and is due again
        running.serve(START_NS + minute * MINUTE_NS)
        now_ns = START_NS + minute * MINUTE_NS
        await teller.tell(reports_of(running.reports(now_ns), names), now_ns)
    assert told == [*names, *names[: MAX_WRITES - 10]]


async def test_a_round_tells_for_a_second_and_the_next_one_goes_on_where_it_stopped(tmp_path: Path) -> None:
    running, clock, told = Running(tmp_path), Clock(0), []
    running.serve(START_NS + MINUTE_NS)
    names = [f"s{number}" for number in range(9)]
    there = {("team-a", name): {"metadata": {"uid": name}} for name in names}

    class Slow(FakeCluster):
        async def apply(self, manifest: dict[str, Any], **how: Any) -> dict[str, Any]:
            told.append(manifest["metadata"]["name"])
            clock.now_ns += MAX_TELLING_NS // 4
            return await super().apply(manifest, **how)

    teller = UsageTeller(Slow(), running.ledger, inline, lambda: there, clock)
    reports = reports_of(running.reports(START_NS + MINUTE_NS), names)
    for count in (4, 8, 9):
        await teller.tell(reports, START_NS + MINUTE_NS)
        assert told == names[:count]
