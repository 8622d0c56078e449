"""The journal's writer: a flush is on disk once, whoever stops waiting for it and whatever the disk says."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from gpumeter_usage.chain import GENESIS
from gpumeter_usage.page import Acknowledgement
from gpumeter_usage.record import Status, canonical
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.journalfile import FILE_NAME
from gpumeter_worker.metering.meter import Flush, Identity, Meter
from gpumeter_worker.metering.parts import Part
from gpumeter_worker.metering.writer import JournalWriter

START = 10**18
IDENTITY = Identity("worker", "boot", "team/model", "model", "cpu", "host")


class Boot:
    """A meter and the writer of its journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meter = Meter(IDENTITY, uncalibrated(Rule.KNEE, "host"), START)
        self.meter.enter(Phase.SERVING, START)
        self.writer = JournalWriter(folder, "worker", "team/model", 2**30)
        self.now = START

    def used(self, session: str) -> Flush:
        """A flush that holds a whole session of a microsecond."""
        self.meter.begin(session, "acme", self.now)
        self.meter.step(self.now, self.now + 1000, 1000, [Part(session, 1, 0, True, 1, prompt_tokens=1)])
        self.now += 1000
        self.meter.end(session, Status.FINISHED, self.now)
        flush = self.meter.cut(self.now)
        assert flush is not None
        return flush

    def slow_disk(self) -> "closing[sqlite3.Connection]":
        """Nothing is written while this is held: another connection has the file's write lock."""
        database = sqlite3.connect(self.folder / FILE_NAME, isolation_level=None)
        database.execute("BEGIN IMMEDIATE")
        return closing(database)

    def begun(self) -> threading.Event:
        """Set once the writer's thread has sent a statement to the disk, before the disk answers."""
        begun = threading.Event()
        self.own_connection().set_trace_callback(lambda _: begun.set())
        return begun

    def own_connection(self) -> sqlite3.Connection:
        """The writer's, to let it fail."""
        journal = self.writer._journal
        assert journal is not None
        return journal._database


@pytest_asyncio.fixture
async def boot(tmp_path: Path) -> AsyncIterator[Boot]:
    made = Boot(tmp_path)
    await made.writer.open(IDENTITY, START)
    yield made
    await made.writer.close()


async def test_a_flush_whose_caller_left_in_the_middle_is_stored_once_and_the_seal_follows(boot: Boot) -> None:
    first, second = boot.used("one"), boot.used("two")
    begun = boot.begun()
    with boot.slow_disk():
        appending = asyncio.create_task(boot.writer.append(first))
        assert await asyncio.to_thread(begun.wait, 10)
        appending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await appending
    assert await boot.writer.append(second, closing=boot.meter.seal(Status.DRAINED))
    head = boot.writer.head
    assert head is not None
    assert (head.seq, head.sealed) == (len(first.records) + len(second.records) + 1, True)
    assert boot.writer.problem == ""


async def test_a_caller_that_leaves_before_its_turn_changes_no_order(boot: Boot) -> None:
    flushes = [boot.used(f"s{number}") for number in range(3)]
    begun = boot.begun()
    with boot.slow_disk():
        appending = [asyncio.create_task(boot.writer.append(flush)) for flush in flushes]
        assert await asyncio.to_thread(begun.wait, 10)
        for one in appending[:2]:
            one.cancel()
    assert await appending[2]
    assert boot.writer.head is not None
    assert boot.writer.head.seq == sum(len(flush.records) for flush in flushes)


async def test_only_what_names_the_newest_record_acknowledged_by_its_hash_renews_the_lease(tmp_path: Path) -> None:
    former = Boot(tmp_path)
    await former.writer.open(IDENTITY, START)
    await former.writer.append(former.used("former"))
    await former.writer.close()
    boot = Boot(tmp_path)
    await boot.writer.open(replace(IDENTITY, boot_id="later"), START)
    await boot.writer.append(boot.used("one"))
    await boot.writer.append(boot.used("two"))
    hashes = {}
    for boot_id in ("boot", "later"):
        page = await boot.writer.page(boot_id, 0, 100)
        assert page is not None
        hashes[boot_id] = [link.hash for link in page.links]

    async def renews(boot_id: str, seq: int, digest: str) -> bool:
        boot.writer.acknowledged_at_ns = 0
        await boot.writer.acknowledge(Acknowledgement(boot_id, seq, digest))
        return boot.writer.acknowledged_at_ns > 0

    first, second = hashes["later"][0], hashes["later"][1]
    assert not await renews("later", 0, GENESIS), "nothing at all is acknowledged"
    assert await renews("later", 1, first)
    assert await renews("later", 2, second)
    assert await renews("later", 2, second), "the collector has nothing new to say, and lives"
    assert not await renews("later", 2, first), "another hash"
    assert not await renews("later", 1, first), "an old one"
    assert not await renews("later", 0, GENESIS)
    assert await renews("boot", len(hashes["boot"]), hashes["boot"][-1]), "a former boot, forgotten with this"
    await boot.writer.close()


async def test_closing_waits_for_a_commit_that_nobody_waits_for(tmp_path: Path) -> None:
    boot = Boot(tmp_path)
    await boot.writer.open(IDENTITY, START)
    flush = boot.used("one")
    begun = boot.begun()
    with boot.slow_disk():
        appending = asyncio.create_task(boot.writer.append(flush))
        assert await asyncio.to_thread(begun.wait, 10)
        appending.cancel()
        leaving = asyncio.create_task(boot.writer.close())
        await asyncio.sleep(0)  # its turn: it has begun to wait
    await leaving
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as database:
        assert database.execute("SELECT COUNT(*) FROM records").fetchone() == (len(flush.records),)


async def test_a_size_that_cannot_be_read_does_not_fail_the_flush_that_is_on_disk(boot: Boot) -> None:
    def no_pragma(action: int, *_: object) -> int:
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_PRAGMA else sqlite3.SQLITE_OK

    boot.own_connection().set_authorizer(no_pragma)
    flush = boot.used("one")
    assert await boot.writer.append(flush, closing=boot.meter.seal(Status.DRAINED))
    assert boot.writer.head is not None
    assert boot.writer.head.sealed


async def test_a_commit_that_fails_is_undone_and_tried_again(boot: Boot) -> None:
    database = boot.own_connection()
    # A constraint that is looked at by COMMIT itself, and not before.
    database.executescript(
        "PRAGMA foreign_keys=ON; CREATE TABLE parents (id PRIMARY KEY);"
        "CREATE TABLE broken (id REFERENCES parents DEFERRABLE INITIALLY DEFERRED);"
        "CREATE TRIGGER breaks AFTER INSERT ON records BEGIN INSERT INTO broken VALUES (1); END;"
    )
    flush = boot.used("one")
    assert not await boot.writer.append(flush)
    assert "FOREIGN KEY" in boot.writer.problem
    database.execute("DROP TRIGGER breaks")
    assert await boot.writer.retry()
    assert (boot.writer.problem, boot.writer.head and boot.writer.head.seq) == ("", len(flush.records))


async def test_a_flush_that_does_not_add_up_leaves_its_records_in_the_log_once_and_not_without_bound(
    boot: Boot, caplog: pytest.LogCaptureFixture
) -> None:
    flush = boot.used("one")
    cheat = replace(flush, records=flush.records * 2000)
    assert not await boot.writer.append(cheat)
    assert not await boot.writer.retry()
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused: ")]
    assert len(told) == 1
    assert told[0].splitlines()[1:3] == [canonical(record).decode() for record in flush.records[:2]]
    assert f"refused: {len(cheat.records)} records" in told[0]
    assert 2**15 < len(told[0]) < 2**17


async def test_a_flush_that_cannot_be_written_as_records_is_told_and_logged(
    boot: Boot, caplog: pytest.LogCaptureFixture
) -> None:
    flush = boot.used("one")
    odd = replace(flush, records=tuple(replace(record, model="\ud800") for record in flush.records))
    assert not await boot.writer.append(odd)
    assert "a flush was refused" in boot.writer.problem
    assert any(record.getMessage().startswith("refused: ") for record in caplog.records)
