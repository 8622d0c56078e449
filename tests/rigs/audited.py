"""A small ledger that is whole: two services, two boots, late facts, a price plan, and a signed digest of every period.

Owns how it is made and with which key; the tests of digests, verify and usage change copies of it.
"""

import asyncio
import json
import sqlite3
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from shutil import copyfile

from click.testing import CliRunner, Result

from devcluster.layout import REPOSITORY
from gpumeter_operator.adapters.ledger import digests
from gpumeter_operator.adapters.ledger.days import day_end_ns
from gpumeter_operator.adapters.ledger.digests import Due
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.resume import take_after_gap
from gpumeter_operator.adapters.ledger.retention import remove_old
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.correct import Wanted
from gpumeter_operator.billing.signing import Keyring, SigningKey, signing_key
from gpumeter_operator.billing.tariff import canonical_spec
from gpumeter_operator.cli.verify import verify as command
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.correct import book
from gpumeter_operator.flow.digests import Digester
from gpumeter_operator.flow.verify import Audit, Finding, Tally, verify
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import Account, Status
from rigs.ledger import START_NS, FakeWorker, ended, gone, inline, open_ledger, started, worker

SCRIPT = REPOSITORY / "docs/verify.py"
HOUR_NS = 3600 * SECOND_NS
DIGESTED_NS = START_NS + 20 * HOUR_NS
"""When the digests are made: hours later, so that nothing that claims to be older can still be on its way."""

DAY_NS = 24 * 3600 * SECOND_NS

DAY_END_NS = day_end_ns(START_NS + HOUR_NS)
OLD_NS = DAY_END_NS + 90 * DAY_NS
"""When retention may remove its records."""

PRIVATE_PEM = b"""-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIEJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJC
-----END PRIVATE KEY-----
"""
"""Thirty-two times the letter B: of tests, and of nothing else."""


def key() -> SigningKey:
    return signing_key(PRIVATE_PEM)


def fill(ledger: Ledger) -> None:
    """Three minutes of two services: a crash, a gap, a late page, a late end of a container, alarms, two plans."""
    plans = {}
    for version, price in enumerate(("2.39", "2.50"), start=1):
        spec = canonical_spec({"currency": "EUR", "rates": [{"gpuClass": "h100", "perGpuHour": price}]})
        plans["default"] = ledger.keep_plan("default", version, spec, START_NS + version)
    _serve(ledger)
    another = _serve_another(ledger)
    closer = Closer(ledger, MINUTE_NS)
    closer.close_all(Pricing({}, plans), START_NS + 30 * SECOND_NS)  # a version of the open period
    closer.close_all(Pricing({}, plans), START_NS + 4 * MINUTE_NS + 10 * SECOND_NS)
    _come_late(ledger, another)
    closer.close_all(Pricing({}, plans), START_NS + 7 * MINUTE_NS)
    closer.close_all(Pricing({}, plans), START_NS + 15 * HOUR_NS)  # the day is over


def digested(ledger: Ledger, now_ns: int = DIGESTED_NS, file: Path | None = None, by: SigningKey | None = None) -> None:
    """Make every digest that is due, and export them where a file is named."""
    asyncio.run(Digester(ledger, inline, by or key(), file).run(now_ns))


def made(path: Path, *, corrected: bool = False) -> Path:
    """A filled and digested ledger in a file of this name, all of it in one file; with a correction, or without one."""
    ledger = open_ledger(path)
    fill(ledger)
    if corrected:
        credit = Wanted("team-a", "smollm2-acme-20261121t1000", -SECOND_NS, "It was a probe.", "alice")
        book(ledger, credit, START_NS + 16 * HOUR_NS)
        Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), START_NS + 17 * HOUR_NS)
    digested(ledger, file=path.with_suffix(".jsonl"))
    ledger.close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.execute("PRAGMA journal_mode = DELETE")
    raw.close()
    return path


def run(ledger_path: Path, *arguments: str) -> Result:
    """`gpumeter verify` on this ledger, with nothing of the environment."""
    return CliRunner(env={"GPUMETER_SIGNING_KEY_FILE": None}).invoke(
        command, ["--ledger", f"sqlite:///{ledger_path}", *arguments]
    )


def found(path: Path, *arguments: str) -> list[dict[str, str]]:
    """What it finds, as data."""
    done = run(path, "-o", "json", *arguments)
    assert done.exit_code in (0, 1), done.output
    told = json.loads(done.stdout)
    assert told["verified"] is (done.exit_code == 0)
    return list(told["findings"])


def made_old(path: Path, *, covered: bool = True) -> Path:
    """The same after retention removed the day of its records; a digest covers the removals too, or none does yet."""
    ledger = Ledger(f"sqlite:///{made(path)}")
    assert [each.chains for each in remove_old(ledger, 90, OLD_NS)] == [3]
    if covered:
        assert digests.make(ledger.engine, Due(), key(), OLD_NS + DAY_NS, since_ns=-1) is not None
    ledger.close()
    return path


def audited(reader: Reader, now_ns: int = DIGESTED_NS + DAY_NS, by: SigningKey | None = None) -> list[Finding]:
    """What an auditor finds at a time of the test's, who believes one key."""
    own = by or key()
    return list(verify(Audit(reader, Keyring({own.key_id: own.public_der}), now_ns), Tally()))


class Arena:
    """A copy of a ledger that is changed and put back again and again, without its triggers: what somebody can do who
    may write the file, and what an auditor finds who has it open."""

    def __init__(self, source: Path, file: Path, now_ns: int = DIGESTED_NS + DAY_NS) -> None:
        self._now_ns = now_ns
        opened_up(source, file).close()
        self._reader = Reader(f"sqlite:///{file}")
        self.raw = sqlite3.connect(file, isolation_level=None)
        self._pristine = sqlite3.connect(":memory:")
        self.raw.backup(self._pristine)

    def put_back(self) -> None:
        """Undo every change."""
        self._pristine.backup(self.raw)

    def found(self, by: SigningKey | None = None) -> list[Finding]:
        """What an auditor finds who believes one key."""
        return audited(self._reader, self._now_ns, by)


def opened_up(source: Path, target: Path) -> sqlite3.Connection:
    """A copy without triggers, for somebody who may write the file."""
    copyfile(source, target)
    raw = sqlite3.connect(target, isolation_level=None)
    for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        raw.execute(f"DROP TRIGGER {name}")
    return raw


def _serve(ledger: Ledger) -> None:
    fake = FakeWorker(worker(1), START_NS)
    fake.spend(Account.LOAD, START_NS + 10 * SECOND_NS)
    fake.serve("s-1", "acme", START_NS + 70 * SECOND_NS)
    fake.serve("s-2", "beta-corp", START_NS + 80 * SECOND_NS, Status.CANCELLED)
    fake.restart("boot-2", START_NS + 90 * SECOND_NS)
    fake.spend(Account.WARMUP, START_NS + 100 * SECOND_NS)
    fake.serve("s-3", "acme", START_NS + 130 * SECOND_NS, batch=3)
    fake.seal()
    life = [
        started("c-1", START_NS),
        ended("c-1", START_NS + 85 * SECOND_NS),
        started("c-2", START_NS + 89 * SECOND_NS),
        ended("c-2", START_NS + 140 * SECOND_NS),
        gone(START_NS + 141 * SECOND_NS),
    ]
    for boot_id in ("boot-1", "boot-2"):
        ledger.observe(fake.identity, life, START_NS + 141 * SECOND_NS)
        ledger.take(fake.identity, fake.page(boot_id, 0), START_NS + 141 * SECOND_NS)
    ledger.settle(fake.identity.worker_uid, START_NS + 5 * MINUTE_NS)
    ledger.keep_profiles(fake.identity.worker_uid, [(_profile_hash(), b'{"phi":1}')], START_NS + 50 * SECOND_NS)
    ledger.raise_alarm("PageRefused", fake.identity.worker_uid, "It sent what nobody can read.", START_NS + MINUTE_NS)


def _serve_another(ledger: Ledger) -> FakeWorker:
    fake = FakeWorker(worker(2, service="other"), START_NS + 18 * SECOND_NS)
    fake.spend(Account.INIT, START_NS + 20 * SECOND_NS)  # acknowledged by somebody else: it is a gap
    lost = fake.boot.head_hash
    fake.serve("s-4", "acme", START_NS + 50 * SECOND_NS)
    fake.spend(Account.IDLE, START_NS + 58 * SECOND_NS)
    ledger.observe(fake.identity, [started("c-3", START_NS + 20 * SECOND_NS)], START_NS + 21 * SECOND_NS)
    take_after_gap(ledger, fake.identity, fake.page("boot-1", 1), lost, START_NS + 59 * SECOND_NS)
    ledger.settle(fake.identity.worker_uid, START_NS + 58 * SECOND_NS)
    return fake


def _come_late(ledger: Ledger, fake: FakeWorker) -> None:
    """What the other service's worker did, told after its periods were closed without it."""
    now_ns = START_NS + 5 * MINUTE_NS + SECOND_NS
    sent = len(fake.boot.links)
    fake.serve("s-5", "beta-corp", START_NS + 65 * SECOND_NS)
    fake.seal()
    ledger.observe(fake.identity, [ended("c-3", START_NS + 70 * SECOND_NS), gone(now_ns)], now_ns)
    ledger.take(fake.identity, fake.page("boot-1", sent), now_ns)
    ledger.settle(fake.identity.worker_uid, now_ns)


def _profile_hash() -> str:
    return sha256(b'{"phi":1}').hexdigest()


def found_by_script(ledger: Path) -> list[str]:
    """What the auditor's own script, docs/verify.py, finds wrong in a ledger of SQLite."""
    done = subprocess.run([sys.executable, "-I", SCRIPT, ledger], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if "closed until" not in line and "all right" not in line]
