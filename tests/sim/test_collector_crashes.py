"""The collector is killed between every two statements; the bill is the same."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpumeter_operator.adapters.ledger.members import Members
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.decide.shares import LIFE_NS
from gpumeter_operator.flow.publish import Publisher
from gpumeter_operator.flow.share import Share
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import Account, Status
from rigs.databases import Database
from rigs.ledger import (
    START_NS,
    Clock,
    Crash,
    CrashAt,
    FakeNetwork,
    FakeWorker,
    ended,
    finals,
    gone,
    inline,
    open_ledger,
    started,
    worker,
)
from rigs.postgres import Server
from rigs.pulled import Pulled

POD = worker()
NOW_NS = START_NS + 100 * SECOND_NS
LIFE = (started("c1", START_NS), ended("c1", START_NS + 91 * SECOND_NS), gone(START_NS + 92 * SECOND_NS))
SERVICE = ("team-a", "smollm2")


def a_busy_life() -> FakeWorker:
    """Two boots within two minutes: the first crashes, the second drains."""
    fake = FakeWorker(POD, START_NS)
    fake.spend(Account.LOAD, START_NS + 10 * SECOND_NS)
    fake.serve("s-1", "acme", START_NS + 65 * SECOND_NS, Status.CANCELLED)
    fake.restart("boot-2", START_NS + 70 * SECOND_NS)
    fake.serve("s-2", "beta", START_NS + 90 * SECOND_NS)
    fake.seal()
    return fake


async def bill(path: Path | str, fake: FakeWorker, network: FakeNetwork, crash: CrashAt) -> Ledger:
    """Everything that a collector does for one pod, from an empty memory to the Final reports."""
    one = Pulled(path, fake, NOW_NS, network)
    crash.watch(one.ledger)  # a crash in the middle of a migration is another test's
    network.trouble = crash
    one.observe(*LIFE)
    assert await one.pull()
    one.close_periods(START_NS + 130 * SECOND_NS, 10 * MINUTE_NS)
    return one.ledger


def rows(ledger: Reader) -> list[tuple[str, int, str]]:
    return [(boot, seq, digest) for boot, seq, digest, _, _ in ledger.bodies(POD.worker_uid)]


async def test_a_collector_killed_between_any_two_statements_bills_exactly_once(tmp_path: Path) -> None:
    undisturbed = await bill(tmp_path / "whole.db", a_busy_life(), FakeNetwork(4), CrashAt(-1))
    expected_rows, expected_reports = rows(undisturbed), finals(undisturbed)
    assert len(expected_rows) == sum(len(boot.links) for boot in a_busy_life().boots)
    assert len(expected_reports) == 5  # two minutes; acme and the platform in both, beta in the second

    empty = open_ledger(tmp_path / "empty.db")
    empty.close()
    crashes, finished = 0, False
    while not finished:
        shutil.copy(tmp_path / "empty.db", tmp_path / f"crash-{crashes}.db")
        path, fake, network = tmp_path / f"crash-{crashes}.db", a_busy_life(), FakeNetwork(4)
        crash = CrashAt(crashes + 1)
        try:
            (await bill(path, fake, network, crash)).close()
            finished = True
        except Crash:
            crashes += 1
        held = Reader(f"sqlite:///{path}")
        committed = {(boot, seq) for boot, seq, _ in rows(held)}
        acknowledged = {(boot.boot_id, boot.acknowledged_seq) for boot in fake.boots if boot.acknowledged_seq}
        assert acknowledged <= committed, "a record was acknowledged that is not in the ledger"
        held.close()
        again = await bill(path, fake, network, CrashAt(-1))
        assert rows(again) == expected_rows
        assert finals(again) == expected_reports
        assert again.alarms() == []
        again.close()
    assert crashes > 60, "the crash points were not reached"


async def test_a_collector_of_postgresql_killed_at_every_seventh_statement_bills_exactly_once(
    tmp_path: Path, postgres: Server, migrated: str
) -> None:
    """A page's COPY is no point of its own here; a server that goes within a page has a test of its own."""
    undisturbed = await bill(tmp_path / "whole.db", a_busy_life(), FakeNetwork(4), CrashAt(-1))
    point, finished = 1, False
    while not finished:
        name = postgres.database(migrated)
        url, fake, network = postgres.url(name), a_busy_life(), FakeNetwork(4)
        try:
            (await bill(url, fake, network, CrashAt(point))).close()
            finished = True
        except Crash:
            point += 7
        again = await bill(url, fake, network, CrashAt(-1))
        assert rows(again) == rows(undisturbed)
        assert finals(again) == finals(undisturbed)
        assert again.alarms() == []
        again.close()
        postgres.drop(name)
    assert point > 60, "the crash points were not reached"


@pytest.mark.parametrize("kept_links", [0, 3])
async def test_an_acknowledgement_lost_on_its_way_is_sent_again(tmp_path: Path, kept_links: int) -> None:
    fake = a_busy_life()
    one = Pulled(tmp_path / "ledger.db", fake, NOW_NS, FakeNetwork(page_limit=kept_links or 5000))
    one.observe(*LIFE)

    def lose(exchange: str) -> None:
        if exchange == "acknowledge":
            raise Crash

    one.network.trouble = lose
    with pytest.raises(Crash):
        await one.pull()
    one.network.trouble = lambda _: None
    assert await one.pull()
    assert [boot.acknowledged_seq for boot in fake.boots] == [len(boot.links) for boot in fake.boots]
    assert len(rows(one.ledger)) == sum(len(boot.links) for boot in fake.boots)


async def test_two_collectors_on_one_ledger_double_nothing(database: Database) -> None:
    fake, network = a_busy_life(), FakeNetwork(2)
    both = [Pulled(database.url, fake, NOW_NS, network) for _ in range(2)]
    both[0].observe(*LIFE)
    await asyncio.gather(*(one.pull() for one in both))
    assert await both[0].pull()
    assert len(rows(both[0].ledger)) == sum(len(boot.links) for boot in fake.boots)
    for one in both:
        one.ledger.close()


class Cluster:
    """The API server's side of publishing: objects as they are applied. `trouble` is asked around each exchange."""

    def __init__(self, trouble: CrashAt) -> None:
        self.trouble = trouble
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}

    async def list(self, *_: object) -> list[dict[str, Any]]:
        self.trouble()
        return list(self.objects.values())

    async def apply(
        self, manifest: dict[str, Any], *, field_manager: str, subresource: str | None = None
    ) -> dict[str, Any]:
        self.trouble()
        key = (manifest["metadata"]["namespace"], manifest["metadata"]["name"])
        if subresource:
            self.objects[key]["status"] = manifest["status"]
        else:
            self.objects[key] = self.objects.get(key, {}) | manifest
        self.trouble()
        return self.objects[key]


async def test_a_collector_killed_between_any_two_writes_of_reports_leaves_them_whole_in_the_end(
    tmp_path: Path,
) -> None:
    ledger = await bill(tmp_path / "ledger.db", a_busy_life(), FakeNetwork(), CrashAt(-1))
    reports = [json.loads(body) for _, _, body in ledger.final_reports(*SERVICE)]
    expected = {report["metadata"]["name"]: report["status"] for report in reports}
    half_written = crashes = 0
    while True:
        crash = CrashAt(crashes + 1)
        cluster = Cluster(crash)
        try:
            await Publisher(cluster, ledger, inline).publish(reports, START_NS)
        except Crash:
            crashes += 1
        half_written += any("status" not in one for one in cluster.objects.values())
        finished, crash.at = not crash.happened, -1
        again = Publisher(cluster, ledger, inline)  # the next collector knows nothing of the last one
        await again.restore(START_NS)
        assert {name: one["status"] for (_, name), one in cluster.objects.items()} == expected
        if finished:
            break
    assert crashes >= 4 * len(reports) and half_written


def a_share(name: str, ledger: Ledger, clock: Clock) -> Share:
    return Share(name, Members(ledger, name, name, lambda _: clock()), inline, clock)


async def test_a_collector_killed_between_any_two_statements_of_its_membership_is_taken_over_from(
    tmp_path: Path,
) -> None:
    crashes, finished = 0, False
    while not finished:
        path, clock = tmp_path / f"{crashes}.db", Clock()
        ledgers = [open_ledger(path), open_ledger(path)]
        first, second = (a_share(name, ledger, clock) for name, ledger in zip("ab", ledgers, strict=True))
        crash = CrashAt(crashes + 1)
        crash.watch(ledgers[0])
        try:
            await first.beat()
            await first.beat()
            await first.leave()
            finished = True
        except Crash:
            crashes += 1
        crash.at = -1
        clock.now_ns += LIFE_NS
        await second.beat()
        assert second.leads and second.mine("uid"), "the one that was killed keeps its place for ever"
        assert not first.leads
        for ledger in ledgers:
            ledger.close()
    assert crashes > 12, "the crash points were not reached"
