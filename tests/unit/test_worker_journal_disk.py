"""The journal on disks as they are: small and full. Nothing is lost for want of room."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from gpumeter_usage.chain import GENESIS, verify
from gpumeter_usage.page import Acknowledgement
from gpumeter_worker.metering.journalfile import FILE_NAME, LOG_BYTES
from gpumeter_worker.metering.journalpages import Reader
from gpumeter_worker.metering.writer import JournalWriter
from rigs.journal import SERVICE, START, WORKER, Boot, Usage, identity

FILL = """
import asyncio, json, resource, sys
from pathlib import Path
from gpumeter_usage.chain import GENESIS, verify
from gpumeter_usage.page import Acknowledgement
from gpumeter_usage.record import Status, parse
from gpumeter_worker.metering.journalpages import Reader
from gpumeter_worker.metering.journalfile import DiskFull, JournalUnusable
from rigs.journal import START, Boot

folder = Path(sys.argv[1])

def filled(boot):
    \"\"\"Write until there is no room; the flush that found none.\"\"\"
    for number in range(100_000):
        flush = boot.used(f"s{number}")
        try:
            boot.journal.append(flush)
        except DiskFull:
            return flush
    raise AssertionError("the disk is not full")

def collect(boot, limit):
    reader, ledger, head = Reader(folder, "worker", "team/model"), [], GENESIS
    while (page := reader.page("a", len(ledger), limit)) and (links := page.links):
        head = verify(head, links)
        ledger += links
        boot.journal.acknowledge(Acknowledgement("a", len(ledger), head))
    return [parse(link.body) for link in ledger]
"""


def on_small_tmpfs(tmp_path: Path, size: str, script: str) -> dict[str, object]:
    """Run a script with a tmpfs of this size as its argument, in a mount namespace of its own; what it printed last."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("a small disk is a mount, and this user may make none")
    program, disk = tmp_path / "fill.py", tmp_path / "disk"
    program.write_text(FILL + dedent(script))
    disk.mkdir()
    mounted = f'mount -t tmpfs -o size={size} tmpfs "$1" && exec "$2" "$3" "$1"'
    out = printed_by("unshare", "-m", "sh", "-c", mounted, "sh", disk, sys.executable, program)
    printed: dict[str, object] = json.loads(out.splitlines()[-1])
    return printed


def printed_by(*command: str | Path) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": "tests"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("limit", [5000, 64])
def test_a_disk_without_a_free_byte_is_emptied_by_acknowledgements_and_nothing_was_lost(
    tmp_path: Path, limit: int
) -> None:
    seen = on_small_tmpfs(
        tmp_path,
        "8m",
        f"""
        boot = Boot(folder, "a")
        refused = filled(boot)
        head = boot.journal.head()
        (folder / "other").write_bytes(b"")  # some room is left in blocks, none in pages
        records = collect(boot, {limit})
        after = boot.journal.append(refused)
        print(json.dumps({{
            "written": head.seq, "collected": len(records), "after": after.seq, "refused": len(refused.records),
            "seqs": [record.seq for record in records] == list(range(1, len(records) + 1)),
        }}))
        """,
    )
    assert seen["written"] == seen["collected"] > 1000
    assert seen["seqs"] is True
    assert seen["after"] == seen["written"] + seen["refused"]


def test_a_boot_is_sealed_and_the_next_one_begun_on_a_disk_without_a_free_byte(tmp_path: Path) -> None:
    seen = on_small_tmpfs(
        tmp_path,
        "8m",
        """
        boot = Boot(folder, "a")
        refused = filled(boot)
        head = boot.journal.append(refused, closing=boot.meter.seal(Status.DRAINED))
        with open(folder / "ballast", "wb", buffering=0) as file:  # whatever the seal left free is taken
            try:
                while file.write(b"x" * 512):
                    pass
            except OSError:
                pass
        boot.journal.close()
        def take_all():
            with open(folder / "ballast", "ab", buffering=0) as file:
                try:
                    while file.write(b"x" * 512):
                        pass
                except OSError:
                    pass
        take_all()
        next_boot = Boot(folder, "b", START + 10**12)
        boots = Reader(folder, "worker", "team/model").status().boots
        take_all()  # and it is emptied then as well
        records = collect(next_boot, 5000)
        left = [one.boot_id for one in Reader(folder, "worker", "team/model").status().boots]
        print(json.dumps({
            "sealed": head.sealed, "boots": [[one.boot_id, one.sealed] for one in boots],
            "collected": len(records) - head.seq, "left": left,
        }))
        """,
    )
    assert seen == {"sealed": True, "boots": [["a", True], ["b", False]], "collected": 0, "left": ["b"]}


@pytest.mark.parametrize("ending", ["seal", "keep"])
def test_what_a_full_disk_refused_while_serving_is_written_into_the_reserve_when_the_process_leaves(
    tmp_path: Path, ending: str
) -> None:
    seen = on_small_tmpfs(
        tmp_path,
        "8m",
        f"""
        import time
        from gpumeter_worker.deadline import Deadline
        from gpumeter_worker.metering.flushing import Flusher
        from gpumeter_worker.metering.writer import JournalWriter
        from rigs.journal import Usage, identity

        async def main():
            writer, boot = JournalWriter(folder, "worker", "team/model", 2**30), Usage("a")
            await writer.open(identity("a"), START)
            flusher = Flusher(boot.meter, writer, lambda: boot.now, 10**6, before=lambda: None)
            while await writer.append(boot.used("s")):
                pass
            with open(folder / "ballast", "wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 512):
                        pass
                except OSError:
                    pass
            refused = not await flusher.flush()
            boot.meter.begin("last", "acme", boot.now)  # in flight when the worker is told to leave
            boot.meter.end("last", Status.CANCELLED, boot.now)
            if "{ending}" == "seal":
                await flusher.seal(Deadline(time.monotonic() + 3), asyncio.Event())
            else:
                await flusher.keep()
            head, problem = writer.head, writer.problem
            await writer.close()
            reader, after, records = Reader(folder, "worker", "team/model"), 0, []
            while links := reader.page("a", after, 5000).links:
                records += [parse(link.body) for link in links]
                after += len(links)
            print(json.dumps({{
                "refused": refused, "problem": problem, "sealed": head.sealed, "frontier": head.frontier_ns == boot.now,
                "last": [record.session_id for record in records if record.session_id][-1],
                "read": len(records) == head.seq,
            }}))

        asyncio.run(main())
        """,
    )
    assert seen == {
        "refused": True,
        "problem": "",
        "sealed": ending == "seal",
        "frontier": True,
        "last": "last",
        "read": True,
    }


def test_a_disk_that_is_full_at_the_start_is_waited_for(tmp_path: Path) -> None:
    seen = on_small_tmpfs(
        tmp_path,
        "4m",
        """
        from gpumeter_worker.metering.writer import JournalWriter
        from rigs.journal import identity

        async def main():
            (folder / "ballast").write_bytes(b"x" * (4 * 2**20 - 4096))
            writer = JournalWriter(folder, "worker", "team/model", 2**30)
            opening = asyncio.create_task(writer.open(identity("a"), START))
            await writer.opening_over.wait()
            problem, open_then = writer.problem, writer.head is not None
            (folder / "ballast").unlink()
            await opening
            seen = {"problem": problem, "then": open_then, "now": writer.head.boot_id, "left": writer.problem}
            print(json.dumps(seen))
            await writer.close()

        asyncio.run(main())
        """,
    )
    assert "full" in str(seen["problem"])
    assert (seen["then"], seen["now"], seen["left"]) == (False, "a", "")


def test_a_file_that_may_not_grow_refuses_a_flush_and_takes_it_once_it_may(tmp_path: Path) -> None:
    program = tmp_path / "fill.py"
    program.write_text(
        FILL
        + dedent(
            """
            none = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, none[1]))
            boot = Boot(folder, "a")
            refused = filled(boot)
            resource.setrlimit(resource.RLIMIT_FSIZE, none)
            boot.journal.append(refused)
            records = collect(boot, 5000)
            print(len(records), boot.journal.head().seq)
            """
        )
    )
    collected, head = map(int, printed_by(sys.executable, program, tmp_path).split())
    assert head == collected > 1000


async def test_a_journal_beyond_its_bound_says_so_drops_nothing_and_an_acknowledgement_ends_it(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, WORKER, SERVICE, 2**17)
    await writer.open(identity("a"), START)
    boot, written = Usage("a"), 0
    while not writer.full:
        assert await writer.append(boot.used(f"s{written}"))
        written += 1
    assert written > 50
    for number in range(10):  # what runs when admission stops is still written
        assert await writer.append(boot.used(f"late-{number}"))
    page = await writer.page("a", 0, 5000)
    assert page is not None and len(page.links) == 2 * (written + 10)
    assert "nobody has acknowledged (at most 131072)" in writer.full
    await writer.acknowledge(Acknowledgement("a", len(page.links), verify(GENESIS, page.links)))
    assert writer.full == ""
    await writer.close()


def test_the_write_ahead_log_stays_small_however_much_is_written(tmp_path: Path) -> None:
    boot, log = Boot(tmp_path, "a"), tmp_path / f"{FILE_NAME}-wal"
    biggest = 0
    for number in range(400):
        boot.journal.append(boot.used(f"s{number}"))
        biggest = max(biggest, log.stat().st_size)
    assert biggest <= LOG_BYTES + 2**16


def test_trimmed_room_is_used_again(tmp_path: Path) -> None:
    boot, sizes = Boot(tmp_path, "a"), []
    reader = Reader(tmp_path, WORKER, SERVICE)
    for round_ in range(6):
        for number in range(60):
            boot.journal.append(boot.used(f"r{round_}-{number}"))
        page = reader.page("a", boot.journal.head().acknowledged_seq, 5000)
        assert page is not None
        boot.journal.acknowledge(Acknowledgement("a", boot.journal.head().seq, page.links[-1].hash))
        sizes.append((tmp_path / FILE_NAME).stat().st_size)
    assert sizes[-1] <= sizes[1] + 2**16


def test_a_reserve_that_fits_no_more_is_taken_by_half_and_made_whole_when_there_is_room(tmp_path: Path) -> None:
    seen = on_small_tmpfs(
        tmp_path,
        "4m",
        """
        from gpumeter_worker.metering.reserve import Reserve

        reserve, sizes = Reserve(folder, "reserve"), []
        def look(done):
            sizes.append([done, (folder / "reserve").stat().st_size if (folder / "reserve").exists() else None])
        look(reserve.take())
        reserve.give()
        (folder / "ballast").write_bytes(b"x" * (5 * 2**19))
        look(reserve.take_again())
        look(reserve.take())
        (folder / "ballast").unlink()
        look(reserve.take())
        print(json.dumps({"sizes": sizes}))
        """,
    )
    assert seen == {"sizes": [[True, 2**21], [True, 2**20], [False, 2**20], [True, 2**21]]}
