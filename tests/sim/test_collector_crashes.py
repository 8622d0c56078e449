"""The collector is killed between every two statements; the bill is the same."""

import asyncio
import shutil
from pathlib import Path

import pytest

from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.collect import Collector
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

POD = worker()
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
    ledger = open_ledger(path)
    crash.watch(ledger)  # a crash in the middle of a migration is another test's
    network.trouble = crash
    target = network.add("10.0.0.1", fake)
    clock = Clock(START_NS + 100 * SECOND_NS)
    ledger.observe(POD, LIFE, clock())
    assert await Collector(ledger, network, inline, clock).pull(POD, target)
    Closer(ledger, 10 * MINUTE_NS).close_all(Pricing({}, {}), START_NS + 130 * SECOND_NS)
    return ledger


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
    fake, network = a_busy_life(), FakeNetwork(page_limit=kept_links or 5000)
    ledger, clock = open_ledger(tmp_path / "ledger.db"), Clock(START_NS + 100 * SECOND_NS)
    ledger.observe(POD, LIFE, clock())
    target = network.add("10.0.0.1", fake)
    collector = Collector(ledger, network, inline, clock)

    def lose(exchange: str) -> None:
        if exchange == "acknowledge":
            raise Crash

    network.trouble = lose
    with pytest.raises(Crash):
        await collector.pull(POD, target)
    network.trouble = lambda _: None
    assert await collector.pull(POD, target)
    assert [boot.acknowledged_seq for boot in fake.boots] == [len(boot.links) for boot in fake.boots]
    assert len(rows(ledger)) == sum(len(boot.links) for boot in fake.boots)


async def test_two_collectors_on_one_ledger_double_nothing(database: Database) -> None:
    fake, network, clock = a_busy_life(), FakeNetwork(2), Clock(START_NS + 100 * SECOND_NS)
    target = network.add("10.0.0.1", fake)
    ledgers = [open_ledger(database.url), open_ledger(database.url)]
    ledgers[0].observe(POD, LIFE, clock())
    await asyncio.gather(*(Collector(ledger, network, inline, clock).pull(POD, target) for ledger in ledgers))
    assert await Collector(ledgers[0], network, inline, clock).pull(POD, target)
    assert len(rows(ledgers[0])) == sum(len(boot.links) for boot in fake.boots)
    for ledger in ledgers:
        ledger.close()
