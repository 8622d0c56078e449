"""Backup and restore as docs/ledger.md describes them: a copy made beside the collector goes on without doubling."""

import re
import subprocess
import sys
from pathlib import Path

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import Account
from rigs.databases import Database, Databases
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, open_ledger, started, worker
from rigs.pulled import Pulled

POD = worker()
SERVICE = ("team-a", "smollm2")
NOW_NS = START_NS + 3 * MINUTE_NS
DOCS = Path(__file__).parents[2] / "docs"


def test_a_restored_ledger_goes_on_where_the_copy_was_made_and_doubles_nothing(
    database: Database, databases: tuple[str, Databases], tmp_path: Path
) -> None:
    fake = FakeWorker(POD, START_NS)
    for second in range(1, 101):
        fake.spend(Account.IDLE, START_NS + second * SECOND_NS)
    fake.seal()
    ledger = open_ledger(database.url)
    ledger.observe(POD, [started("c", START_NS)], NOW_NS)
    ledger.take(POD, fake.page("boot-1", 0, limit=40), NOW_NS)
    Closer(ledger, SECOND_NS).close_all(Pricing({}, {}), START_NS + 70 * SECOND_NS)
    restored_url = copied(database, databases, tmp_path)  # while the ledger is open

    ledger.take(POD, fake.page("boot-1", 40), NOW_NS)  # after the copy: lost with the machine
    before = finals(ledger)
    ledger.close()

    again = Ledger(restored_url)
    assert again.boots(POD.worker_uid)[0].committed_seq == 40
    assert finals(again) == before
    assert again.take(POD, fake.page("boot-1", 0), NOW_NS).inserted == len(fake.boot.links) - 40
    assert again.take(POD, fake.page("boot-1", 0), NOW_NS).inserted == 0
    again.observe(POD, [ended("c", START_NS + 100 * SECOND_NS), gone(NOW_NS)], NOW_NS)
    Closer(again, SECOND_NS).close_all(Pricing({}, {}), NOW_NS)
    assert [row[1] for row in again.bodies(POD.worker_uid)] == list(range(1, len(fake.boot.links) + 1))
    assert audit(again, SERVICE) == []
    assert {key: report for key, report in finals(again).items() if key in before} == before
    again.close()


async def test_what_a_restored_ledger_does_not_have_is_told_and_its_workers_go_on(
    database: Database, databases: tuple[str, Databases], tmp_path: Path
) -> None:
    fake = FakeWorker(POD, START_NS)
    one = Pulled(database.url, fake, START_NS + 30 * SECOND_NS)
    fake.spend(Account.IDLE, one.clock())
    one.observe(started("c", START_NS))
    assert await one.pull()
    restored_url = copied(database, databases, tmp_path)
    one.clock.now_ns = START_NS + 50 * SECOND_NS
    fake.serve("s-1", "acme", one.clock())
    assert await one.pull()
    one.ledger.close()  # and is lost with its machine; the worker has trimmed what it was told to

    again = one.ledger = Ledger(restored_url)
    one.clock.now_ns = START_NS + 100 * SECOND_NS
    fake.serve("s-2", "acme", one.clock())
    fake.seal()
    assert await one.pull()
    assert fake.boot.acknowledged_seq == len(fake.boot.links)
    again.observe(POD, [ended("c", one.clock()), gone(NOW_NS)], NOW_NS)
    one.close_periods(NOW_NS)
    first, second = (finals(again)[START_NS + minute * MINUTE_NS, "_platform"]["status"] for minute in (1, 2))
    assert first["completeness"]["missing"][0]["reason"] == "SequenceGap"
    assert first["accounts"]["unaccounted"] == str(20 * SECOND_NS), "what is gone is billed to nobody"
    assert finals(again)[START_NS + MINUTE_NS, "acme"]["status"]["gpuNanoseconds"] == str(10 * SECOND_NS)
    assert second["completeness"]["missing"] == [] and second["accounts"]["unaccounted"] == "0"
    assert audit(again, SERVICE) == []
    again.close()


def copied(database: Database, databases: tuple[str, Databases], tmp_path: Path) -> str:
    """A copy made by the documented command, restored beside the original; its URL."""
    if database.file is not None:
        page = (DOCS / "billing-explained.md").read_text()
        program = re.search(r"python3? -c \"\n(.*?)\" > ledger.db", page, re.DOTALL)
        assert program, "docs/billing-explained.md has lost its command"
        assert "billing-explained.md" in (DOCS / "ledger.md").read_text(), "docs/ledger.md leads there"
        source = program[1].replace("/var/lib/gpumeter/ledger.db", str(database.file))
        source = source.replace("/var/lib/gpumeter", str(tmp_path))
        copy = subprocess.run([sys.executable, "-c", source], capture_output=True, check=True).stdout
        (tmp_path / "restored.db").write_bytes(copy)
        return f"sqlite:///{tmp_path / 'restored.db'}"
    server = database.server
    assert server is not None
    assert "pg_dump --format=custom" in (DOCS / "ledger.md").read_text()
    dump = tmp_path / "ledger.dump"
    dump.write_bytes(server.run("pg_dump", "--format=custom", database.name))
    name = server.database()
    databases[1].given(name)
    server.run("pg_restore", "--exit-on-error", "--single-transaction", "--dbname", name, str(dump))
    return server.url(name)
