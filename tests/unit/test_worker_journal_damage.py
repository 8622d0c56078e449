"""The journal on damaged disks: not all is lost for a bad byte, and no bad byte is billed."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gpumeter_usage.chain import GENESIS, verify
from gpumeter_usage.page import Acknowledgement, Page
from gpumeter_usage.record import Kind, Status, parse
from gpumeter_worker.metering.journal import Journal
from gpumeter_worker.metering.journalfile import FILE_NAME, Damaged, JournalUnusable
from gpumeter_worker.metering.journalpages import Reader
from gpumeter_worker.metering.writer import JournalWriter
from rigs.journal import SERVICE, START, WORKER, Boot, Usage, identity


def filled(tmp_path: Path, sessions: int = 200) -> int:
    """A journal of one boot, closed and folded into its file; its head."""
    boot = Boot(tmp_path, "a")
    for number in range(sessions):
        boot.journal.append(boot.used(f"s{number}"))
    head = boot.journal.head().seq
    boot.journal.close()
    return head


def collected(tmp_path: Path, limit: int = 5000) -> tuple[list[Page], str]:
    """Every page that can be read, one after the other, and why there are no more."""
    reader, pages, head, after = Reader(tmp_path, WORKER, SERVICE), [], GENESIS, 0
    while True:
        try:
            page = reader.page("a", after, limit)
        except JournalUnusable as error:
            return pages, str(error)
        assert page is not None
        if not page.links:
            return pages, ""
        head = verify(head, page.links)
        after += len(page.links)
        pages.append(page)


def test_a_flipped_bit_in_a_record_refuses_the_journal_and_what_comes_before_is_collected(tmp_path: Path) -> None:
    filled(tmp_path)
    data = bytearray((tmp_path / FILE_NAME).read_bytes())
    data[data.index(b'"session_id":"s150"') + 16] ^= 1  # still JSON, and still SQLite
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(Damaged, match=r"after record 30[0-9]"):
        Boot(tmp_path, "b", START + 10**12)
    for limit in (5000, 7):
        pages, why = collected(tmp_path, limit)
        assert 300 <= sum(len(page.links) for page in pages) < 303
        assert "does not continue the chain" in why


def acknowledged(tmp_path: Path, seq: int) -> int:
    """A closed journal of one boot that is acknowledged up to this record; its head."""
    head = filled(tmp_path)
    journal = sqlite3.connect(tmp_path / FILE_NAME)
    digest = journal.execute("SELECT hash FROM records WHERE boot_id = 'a' AND seq = ?", (seq,)).fetchone()[0]
    journal.close()
    boot = Boot(tmp_path, "b", START + 10**12)
    boot.journal.acknowledge(Acknowledgement("a", seq, digest))
    boot.journal.close()
    return head


def test_a_flipped_bit_in_the_first_record_after_an_acknowledgement_is_found(tmp_path: Path) -> None:
    acknowledged(tmp_path, 99)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as database, database:
        database.execute(
            "UPDATE records SET body = CAST(replace(body, 'team/model', 'team/mudel') AS BLOB) WHERE seq = 100"
        )
    with pytest.raises(Damaged, match=r"boot a after record 99"):
        Boot(tmp_path, "c", START + 2 * 10**12)
    with pytest.raises(Damaged, match="damaged at record 100 of the boot a"):
        Reader(tmp_path, WORKER, SERVICE).page("a", 99, 10)


def test_a_file_of_a_build_that_kept_no_acknowledged_hash_is_read_and_opened(tmp_path: Path) -> None:
    head = acknowledged(tmp_path, 99)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as database, database:
        database.execute("ALTER TABLE boots DROP COLUMN acknowledged_hash")
    reader = Reader(tmp_path, WORKER, SERVICE)
    page = reader.page("a", 99, 5000)
    assert page is not None and len(page.links) == head + 1 - 99  # with the seal
    Boot(tmp_path, "c", START + 2 * 10**12).journal.close()
    assert reader.page("a", 99, 5000) == replace(page, watermark_ns=START + 2 * 10**12)
    boot = Boot(tmp_path, "d", START + 3 * 10**12)
    boot.journal.acknowledge(Acknowledgement("a", 100, page.links[0].hash))
    boot.journal.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as database, database:
        database.execute("UPDATE records SET body = CAST(replace(body, '1', '2') AS BLOB) WHERE seq = 101")
    with pytest.raises(Damaged, match=r"boot a after record 100"):
        Boot(tmp_path, "e", START + 4 * 10**12)


def test_a_file_cut_in_the_middle_is_kept_and_served_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    head = filled(tmp_path, 600)
    file = tmp_path / FILE_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2 // 4096 * 4096])
    with pytest.raises(Damaged):
        Boot(tmp_path, "b", START + 10**12)
    assert file.stat().st_size == len(whole) // 2 // 4096 * 4096, "the file is not touched"
    pages, why = collected(tmp_path, 100)
    assert 0 < sum(len(page.links) for page in pages) < head
    assert why


def test_a_log_that_lost_its_end_is_a_boot_that_ended_earlier(tmp_path: Path) -> None:
    boot, frontiers = Boot(tmp_path, "a"), {START}
    for number in range(20):
        boot.journal.append(boot.used(f"s{number}"))
        frontiers.add(boot.now)
    log = (tmp_path / f"{FILE_NAME}-wal").read_bytes()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / FILE_NAME).write_bytes((tmp_path / FILE_NAME).read_bytes())
    (tmp_path / "copy" / f"{FILE_NAME}-wal").write_bytes(log[: len(log) * 3 // 4])
    Boot(tmp_path / "copy", "b", START + 10**12)
    pages, why = collected(tmp_path / "copy")
    last = parse(pages[-1].links[-1].body)
    assert (last.kind, last.status, why) == (Kind.SEAL, Status.RECOVERED, "")
    assert last.ended_at in frontiers, "it ends with a whole flush"
    assert last.ended_at < boot.now


async def test_damage_that_is_found_while_serving_is_told_and_stays_told(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, WORKER, SERVICE, 2**30)
    await writer.open(identity("a"), START)
    boot = Usage("a")
    for number in range(20):
        assert await writer.append(boot.used(f"s{number}"))
    own = writer._journal
    assert own is not None
    own._database.execute("UPDATE records SET body = CAST(replace(body, 's7', 's8') AS BLOB) WHERE seq = 15")
    page = await writer.page("a", 0, 5000)
    assert page is not None and len(page.links) == 14
    assert writer.damage == ""
    with pytest.raises(Damaged):
        await writer.page("a", 14, 5000)
    assert await writer.append(boot.used("later"))
    assert "record 15 of the boot a" in writer.damage
    await writer.close()


def test_reopening_tells_the_former_journal_to_be_whole(tmp_path: Path) -> None:
    head = filled(tmp_path, 5)
    Journal(tmp_path, identity("b"), START + 10**12).close()
    pages, _ = collected(tmp_path)
    assert sum(len(page.links) for page in pages) == head + 1
