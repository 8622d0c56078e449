"""What a worker wrote is read from its file when its pod is gone: the real journal, the real ledger, once each."""

import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpumeter_operator.adapters.journals import JournalFile, JournalUnreadable, journals_in
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.cli.main import main
from gpumeter_operator.flow.collect import Collector
from gpumeter_operator.flow.leftover import NOWHERE, Leftover, take_journal
from gpumeter_usage.page import Acknowledgement
from gpumeter_usage.period import Granularity
from gpumeter_worker.metering.journalpages import Reader as JournalReader
from rigs.databases import Database
from rigs.journal import SERVICE, START, WORKER, Boot
from rigs.ledger import gone, inline, started

pytestmark = pytest.mark.shared

LATER = START + 10**12
OF = Worker(WORKER, "team", "model", "svc", "model", "cpu", 1, "model-1")


def a_dead_worker(folder: Path, *, acknowledged: int = 0) -> Path:
    """Two boots: one that ended and was sealed by the next, one that died with its node, as its file was left.

    What is left is a copy that was made while the second boot wrote: its write-ahead log was never folded, and no
    connection is open that would fold it whenever it happens to be collected.
    """
    with tempfile.TemporaryDirectory() as alive:
        first = Boot(Path(alive), "a")
        for number in range(3):
            first.journal.append(first.used(f"s-{number}"))
        first.journal.close()
        second = Boot(Path(alive), "b", START + 10**10)
        for number in range(3):
            second.journal.append(second.used(f"t-{number}"))
        if acknowledged:
            page = JournalReader(Path(alive), WORKER, SERVICE).page("a", 0, acknowledged)
            assert page is not None
            second.journal.acknowledge(Acknowledgement("a", len(page.links), page.links[-1].hash))
        shutil.copytree(alive, folder)
        second.journal.close()
    assert (folder / "journal.sqlite-wal").stat().st_size > 0
    return folder / "journal.sqlite"


def a_ledger(url: str) -> Ledger:
    ledger = Ledger(url)
    ledger.set_granularity(Granularity.HOUR, LATER)
    ledger.observe(OF, [started("c", START // 10**9 * 10**9), gone(START + 10**11)], LATER)
    return ledger


async def take(path: Path, ledger: Ledger) -> Leftover:
    return await take_journal(path, ledger, inline, lambda: LATER)


def held(ledger: Reader) -> list[tuple[str, int, str]]:
    return [(boot, seq, digest) for boot, seq, digest, *_ in ledger.bodies(WORKER)]


def written(folder: Path) -> list[tuple[str, int, str]]:
    """What a worker would tell of its journal; read from a copy, because a reader, too, writes beside the file."""
    with tempfile.TemporaryDirectory() as copy:
        reader = JournalReader(Path(shutil.copytree(folder, copy, dirs_exist_ok=True)), WORKER, SERVICE)
        pages = [reader.page(boot.boot_id, boot.acknowledged_seq, 5000) for boot in reader.status().boots]
    return [(page.boot_id, page.after + n, link.hash) for page in pages if page for n, link in enumerate(page.links, 1)]


async def test_a_journal_left_by_a_dead_pod_is_taken_once_however_often_it_is_given(
    tmp_path: Path, database: Database
) -> None:
    path, ledger = a_dead_worker(tmp_path / "journal"), a_ledger(database.url)
    before = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    taken = await take(path, ledger)
    assert (taken.reason, taken.records) == ("", len(held(ledger)))
    assert held(ledger) == written(path.parent) and {boot for boot, *_ in held(ledger)} == {"a", "b"}
    again = await take(path, ledger)
    assert (again.reason, again.records) == ("", 0)
    pod = ledger.pod(WORKER)
    assert pod is not None and pod.settled_ns >= START + 10**10 + 3000, "its periods can be closed"
    after = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    assert sorted(after) == sorted(before), "nothing was put beside the file of the dead"
    assert [name for name in after if after[name] != before[name]] == [], "the file of the dead was written to"
    ledger.close()


async def test_a_worker_that_comes_back_after_its_journal_was_taken_doubles_nothing(tmp_path: Path) -> None:
    path, ledger = a_dead_worker(tmp_path / "journal"), a_ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    copy = Path(shutil.copytree(path.parent, tmp_path / "copy")) / path.name
    assert (await take(copy, ledger)).reason == ""
    back = Boot(path.parent, "c", START + 2 * 10**10)
    back.journal.append(back.used("u"))
    alive = JournalFile(path)
    assert await Collector(ledger, alive, inline, lambda: LATER).pull(OF, NOWHERE)
    alive.close()
    assert held(ledger) == written(path.parent)
    assert ledger.alarms() == []


async def test_only_what_was_not_acknowledged_is_in_a_journal_and_it_joins_what_is_in_the_ledger(
    tmp_path: Path,
) -> None:
    path, ledger = a_dead_worker(tmp_path / "a"), a_ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    assert (await take(path, ledger)).reason == ""
    other = a_ledger(f"sqlite:///{tmp_path / 'other.db'}")
    refused = await take(a_dead_worker(tmp_path / "b", acknowledged=2), other)
    assert refused.reason == "JournalRefused" and "records 1 to 2 were acknowledged" in refused.message
    assert refused.message.endswith(". Take an older copy of this journal; where there is none, give --over-gaps.")
    assert "restart" not in refused.message, "there is no pod to be restarted"
    assert [alarm[0] for alarm in other.alarms()] == ["AcknowledgedAhead"]
    assert {boot for boot, *_ in held(other)} == {"b"}, "what is whole is taken all the same"


async def test_where_nobody_has_what_is_missing_a_journal_is_taken_over_the_gap(tmp_path: Path) -> None:
    path = a_dead_worker(tmp_path / "b", acknowledged=2)
    for database in ("before", "ledger"):
        ledger = a_ledger(f"sqlite:///{tmp_path / database}.db")
        if database == "before":
            assert (await take(path, ledger)).reason == "JournalRefused", "an older copy may have it"
            continue
        taken = await take_journal(path, ledger, inline, lambda: LATER, over_gaps=True)
        assert (taken.reason, {boot for boot, *_ in held(ledger)}) == ("", {"a", "b"})
        pod = ledger.pod(WORKER)
        assert pod is not None and [(gap.boot_id, gap.first_seq, gap.last_seq) for gap in pod.gaps] == [("a", 1, 2)]
        assert held(ledger) == written(path.parent)
        assert (await take_journal(path, ledger, inline, lambda: LATER, over_gaps=True)).records == 0
    told = CliRunner().invoke(main, ["journal", "--help"])
    assert "--over-gaps" in told.output and "older copies" in told.output


async def test_a_journal_of_a_worker_that_kubernetes_never_told_of_is_refused(tmp_path: Path) -> None:
    path, ledger = a_dead_worker(tmp_path / "journal"), Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    refused = await take(path, ledger)
    assert (refused.reason, refused.records) == ("WorkerUnknown", 0)
    assert "nobody says whose" in refused.message


def with_a_changed_record(path: Path) -> str:
    with sqlite3.connect(path) as database:
        (body,) = database.execute("SELECT body FROM records WHERE boot_id = 'b' AND seq = 3").fetchone()
        changed = body.replace(b'"worker"', b'"other!"')
        assert changed != body
        database.execute("UPDATE records SET body = ? WHERE boot_id = 'b' AND seq = 3", (changed,))
    return "ChainBroken"


def of_another_service(path: Path) -> str:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE boots SET identity = replace(identity, 'team/model', 'team/other')")
    return "ForeignService"


def with_a_record_of_thirty_megabytes(path: Path) -> str:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE records SET body = zeroblob(30000000) WHERE boot_id = 'b' AND seq = 2")
    return "ChainBroken"


@pytest.mark.parametrize("harm", [with_a_changed_record, of_another_service, with_a_record_of_thirty_megabytes])
async def test_a_journal_that_was_tampered_with_is_an_alarm_like_a_page(harm: object, tmp_path: Path) -> None:
    path, ledger = a_dead_worker(tmp_path / "journal"), a_ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    reason = harm(path)  # type: ignore[operator]
    refused = await take(path, ledger)
    assert refused.reason == "JournalRefused"
    assert [alarm[0] for alarm in ledger.alarms()] == [reason]
    assert "b" not in {boot for boot, *_ in held(ledger)}


def test_what_is_no_journal_is_told_in_a_sentence(tmp_path: Path) -> None:
    for name, content in (("text", b"no database at all, but long enough to be looked at" * 100), ("empty", b"")):
        path = tmp_path / name / "journal.sqlite"
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(JournalUnreadable, match=r"cannot be read as a worker's journal|holds records of 0"):
            JournalFile(path)
    assert len(journals_in(tmp_path)) == 2


def test_the_command_takes_every_journal_below_a_folder_and_tells_of_each(tmp_path: Path) -> None:
    a_dead_worker(tmp_path / "volume" / "pod-1")
    (tmp_path / "volume" / "pod-2").mkdir()
    (tmp_path / "volume" / "pod-2" / "journal.sqlite").write_bytes(b"x" * 5000)
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    absent = CliRunner().invoke(main, ["journal", "--ledger", url, str(tmp_path / "volume")])
    assert (absent.exit_code, "There is no ledger at" in absent.output) == (1, True)
    assert not (tmp_path / "ledger.db").exists(), "a ledger is its collector's to make"
    a_ledger(url).close()
    done = CliRunner().invoke(main, ["journal", "--ledger", url, str(tmp_path / "volume")])
    assert done.exit_code == 1, "one of them could not be read"
    assert f"Looking for journals below {tmp_path / 'volume'}." in done.output
    assert "Pod team/model-1:" in done.output and "JournalUnreadable" in done.output
    assert len(held(Reader(url))) > 6
