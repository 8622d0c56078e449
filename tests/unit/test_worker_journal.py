"""The journal: what it refuses, what survives, and what it forgets only when it may."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from gpumeter_usage.chain import GENESIS, verify
from gpumeter_usage.page import Acknowledgement
from gpumeter_usage.record import Account, Kind, Status, parse
from gpumeter_worker.metering.journal import AcknowledgementRefused, FlushRefused, Journal
from gpumeter_worker.metering.journalfile import FILE_NAME, JournalUnusable, check_directory
from gpumeter_worker.metering.journalpages import Reader, RecordsGone
from gpumeter_worker.metering.meter import Identity
from gpumeter_worker.metering.parts import Part
from rigs.journal import START, Boot


def test_a_flush_whose_slices_do_not_sum_to_the_change_of_attributed_is_refused(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    flush = boot.used("one")
    cheat = tuple(
        replace(record, gpu_ns=record.gpu_ns + 1, prefill_ns=record.prefill_ns + 1)
        if record.kind is Kind.SESSION
        else record
        for record in flush.records
    )
    with pytest.raises(FlushRefused, match="slices sum to 1001 ns, the account attributed changed by 1000 ns"):
        boot.journal.append(replace(flush, records=cheat))
    assert boot.journal.append(flush).seq == len(flush.records)


def test_a_flush_whose_accounts_do_not_cover_the_time_is_refused(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    flush = boot.used("one")
    with pytest.raises(FlushRefused, match="not measured, and the time since the last one is 1001 ns"):
        boot.journal.append(replace(flush, frontier_ns=flush.frontier_ns + 1))


def test_time_that_was_not_measured_is_in_no_record_and_the_watermark_passes_it(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    boot.meter.begin("one", "acme", boot.now)
    boot.meter.step(boot.now, boot.now + 100, 100, [Part("one", 1, 0, True, 1)])
    boot.meter.lose(boot.now + 700)  # the engine died in its second step
    boot.meter.end("one", Status.FAILED, boot.now + 700)
    flush = boot.meter.cut(boot.now + 900)
    assert flush is not None
    with pytest.raises(FlushRefused, match="sum to 300 ns, 0 ns were not measured"):
        boot.journal.append(replace(flush, unmeasured_ns=0))
    boot.journal.append(flush)
    page = Reader(tmp_path, "worker", "team/model").page("a", 0, 100)
    assert page is not None
    records = [parse(link.body) for link in page.links]
    assert sum(record.gpu_ns for record in records if record.kind is Kind.ACCOUNT) == 300
    assert page.watermark_ns == boot.now + 900


def test_the_same_flush_cannot_be_stored_twice(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    flush = boot.used("one")
    boot.journal.append(flush)
    with pytest.raises(FlushRefused):
        boot.journal.append(flush)


def test_a_chain_continues_over_flushes_and_verifies(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    boot.journal.append(boot.used("one"))
    head = boot.journal.append(boot.used("two"))
    page = Reader(tmp_path, "worker", "team/model").page("a", 0, 100)
    assert page is not None
    assert verify(GENESIS, page.links) == head.hash
    assert [parse(link.body).seq for link in page.links] == list(range(1, head.seq + 1))
    assert page.watermark_ns == boot.now


def test_a_boot_that_crashed_is_sealed_at_its_last_frontier_by_the_next(tmp_path: Path) -> None:
    first = Boot(tmp_path, "a")
    first.journal.append(first.used("one"))
    frontier = first.now
    Boot(tmp_path, "b", START + 10**9)
    page = Reader(tmp_path, "worker", "team/model").page("a", 0, 100)
    assert page is not None
    verify(GENESIS, page.links)
    last = parse(page.links[-1].body)
    assert (last.kind, last.status, last.ended_at, last.boot_id) == (Kind.SEAL, Status.RECOVERED, frontier, "a")
    status = Reader(tmp_path, "worker", "team/model").status()
    assert [(boot.boot_id, boot.sealed) for boot in status.boots] == [("a", True), ("b", False)]


def test_nothing_follows_a_seal(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    boot.journal.append(boot.used("one"), closing=boot.meter.seal(Status.DRAINED))
    with pytest.raises(FlushRefused, match="sealed"):
        boot.journal.append(boot.used("two"))


def test_a_drained_boot_is_not_sealed_again(tmp_path: Path) -> None:
    first = Boot(tmp_path, "a")
    head = first.journal.append(first.used("one"), closing=first.meter.seal(Status.DRAINED))
    Boot(tmp_path, "b", START + 10**9)
    page = Reader(tmp_path, "worker", "team/model").page("a", 0, 100)
    assert page is not None
    assert len(page.links) == head.seq
    assert parse(page.links[-1].body).status is Status.DRAINED


def test_records_are_trimmed_only_below_the_acknowledgement(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    boot.journal.append(boot.used("one"))
    reader = Reader(tmp_path, "worker", "team/model")
    page = reader.page("a", 0, 100)
    assert page is not None
    second = Acknowledgement("a", 2, page.links[1].hash)
    boot.journal.acknowledge(second)
    boot.journal.acknowledge(second)  # the answer was lost and the collector says it again
    rest = reader.page("a", 2, 100)
    assert rest is not None
    assert rest.links == page.links[2:]
    (told,) = reader.status().boots
    assert (told.acknowledged_seq, told.acknowledged_hash) == (2, page.links[1].hash), "what follows is chained to it"
    with pytest.raises(RecordsGone):
        reader.page("a", 0, 100)


def test_an_acknowledgement_of_another_chain_trims_nothing(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    head = boot.journal.append(boot.used("one"))
    for seq, digest in ((head.seq, "f" * 64), (head.seq + 1, head.hash)):
        with pytest.raises(AcknowledgementRefused):
            boot.journal.acknowledge(Acknowledgement("a", seq, digest))
    with pytest.raises(AcknowledgementRefused, match="no boot"):
        boot.journal.acknowledge(Acknowledgement("nobody", 1, head.hash))
    assert boot.journal.head().acknowledged_seq == 0


def test_a_sealed_boot_is_forgotten_once_it_is_acknowledged_whole(tmp_path: Path) -> None:
    first = Boot(tmp_path, "a")
    first.journal.append(first.used("one"))
    second = Boot(tmp_path, "b", START + 10**9)
    reader = Reader(tmp_path, "worker", "team/model")
    page = reader.page("a", 0, 100)
    assert page is not None
    second.journal.acknowledge(Acknowledgement("a", len(page.links), page.links[-1].hash))
    assert [boot.boot_id for boot in reader.status().boots] == ["b"]
    assert reader.page("a", 0, 100) is None


def test_a_page_holds_no_more_than_was_asked_for(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    for number in range(5):
        boot.journal.append(boot.used(f"s{number}"))
    page = Reader(tmp_path, "worker", "team/model").page("a", 3, 4)
    assert page is not None
    assert [parse(link.body).seq for link in page.links] == [4, 5, 6], "7 and 8 are one flush, and 8 would be a fifth"


def test_a_page_ends_where_a_flush_ends_so_that_no_slice_arrives_without_its_account(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    first, second = boot.used("one"), boot.used("two")
    boot.journal.append(first)
    boot.journal.append(second)
    reader = Reader(tmp_path, "worker", "team/model")
    for limit in range(len(first.records), len(first.records) + len(second.records)):
        page = reader.page("a", 0, limit)
        assert page is not None and len(page.links) == len(first.records)
    cut = reader.page("a", 0, len(first.records) - 1)
    assert cut is not None and len(cut.links) == len(first.records) - 1, "a flush larger than a page is cut"


def test_another_workers_journal_is_refused(tmp_path: Path) -> None:
    Boot(tmp_path, "a").journal.close()
    stranger = Identity("other", "b", "team/model", "model", "cpu", "host")
    with pytest.raises(JournalUnusable, match="a journal directory of its own"):
        Journal(tmp_path, stranger, START)


def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"this was never a database" * 100)
    with pytest.raises(JournalUnusable, match="cannot be used"):
        Boot(tmp_path, "a")
    assert (tmp_path / FILE_NAME).read_bytes().startswith(b"this was never")


def test_a_damaged_journal_refuses_to_go_on_and_what_is_readable_is_served(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    for number in range(200):
        boot.journal.append(boot.used(f"s{number}"))
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    boot.journal.close()
    data = bytearray((tmp_path / FILE_NAME).read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 4096] = b"\xff" * 4096
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(JournalUnusable, match="damaged"):
        Boot(tmp_path, "b", START + 10**12)
    reader = Reader(tmp_path, "worker", "team/model")
    assert [one.boot_id for one in reader.status().boots] == ["a"]
    page = reader.page("a", 0, 10)
    assert page is not None
    assert len(page.links) == 10


def test_a_full_disk_loses_nothing_and_the_flush_is_taken_when_there_is_room(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    database = boot.journal._database
    database.execute(f"PRAGMA max_page_count = {database.execute('PRAGMA page_count').fetchone()[0]}")
    before, flush = boot.journal.head(), boot.used("s0")
    with pytest.raises(JournalUnusable, match="full"):
        for number in range(1, 1000):  # until the pages that are there already are used up
            boot.journal.append(flush)
            before, flush = boot.journal.head(), boot.used(f"s{number}")
    assert boot.journal.head() == before
    database.execute("PRAGMA max_page_count = 100000")
    assert boot.journal.append(flush).seq == before.seq + len(flush.records)


def test_a_directory_that_cannot_be_written_is_told_by_name(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(JournalUnusable, match=str(blocked)):
        check_directory(blocked / "journal")


def test_accounts_survive_in_the_journal_by_name(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "a")
    boot.now += 500
    boot.meter.accounts.catch_up(boot.now)
    boot.journal.append(boot.used("one"))
    page = Reader(tmp_path, "worker", "team/model").page("a", 0, 100)
    assert page is not None
    records = [parse(link.body) for link in page.links]
    sums = {record.account: record.gpu_ns for record in records if record.kind is Kind.ACCOUNT}
    assert sums == {Account.IDLE: 500, Account.ATTRIBUTED: 1000}


@pytest.mark.parametrize(
    ("gpu_ns", "part"),
    [
        (100, Part("one", None, 0, True, 1)),  # type: ignore[arg-type]
        (-100, Part("one", 1, 0, True, 1)),
        (100, Part("one", 1, 0, True, None)),  # type: ignore[arg-type]
    ],
)
def test_a_step_that_makes_no_sense_is_the_platforms_and_the_journal_goes_on(
    tmp_path: Path, gpu_ns: int, part: Part
) -> None:
    boot = Boot(tmp_path, "a")
    boot.meter.begin("one", "acme", boot.now)
    with pytest.raises((ValueError, TypeError, ArithmeticError)):
        boot.meter.step(boot.now + 10, boot.now + 100, gpu_ns, [part])
    boot.now += 100
    boot.meter.step(boot.now, boot.now + 100, 100, [Part("one", 1, 0, True, 1)])
    boot.meter.end("one", Status.FINISHED, boot.now + 100)
    boot.now += 100
    flush = boot.meter.cut(boot.now)
    assert flush is not None
    boot.journal.append(flush)
    assert boot.journal.append(boot.used("two")).frontier_ns == boot.now
