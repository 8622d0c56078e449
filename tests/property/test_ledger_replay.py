"""Pages repeated, cut and shuffled change nothing: the ledger replayed from journals gives byte-identical reports, of
closing periods, days and months alike."""

import random
import shutil
import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumeter_operator.adapters.ledger import rollups
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.accept import PageRefused
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.page import Page
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity, day_of, month_of
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, ended, gone, live, open_ledger, started, worker
from rigs.postgres import Server
from rigs.thoroughness import examples

SERVICE = ("team-a", "smollm2")
HOUR_NS = 60 * MINUTE_NS
END_NS = START_NS + 200 * SECOND_NS
SPEC = b'{"currency":"USD","idlePayer":"platform","rates":[{"gpuClass":"h100","perGpuHour":"1.234567"}]}'


def two_pods(seed: int) -> list[tuple[Worker, FakeWorker]]:
    """Two workers over more than three minutes, one of which crashes on its way; both drain."""
    random_, pods = random.Random(seed), []
    for number in (1, 2):
        fake = FakeWorker(worker(number), START_NS + number, f"boot-{number}")
        live(fake, random_, START_NS + random_.randrange(20, 150) * SECOND_NS)
        if number == 2:
            fake.restart("boot-3", fake.frontier_ns + 5 * SECOND_NS)
        live(fake, random_, END_NS - SECOND_NS)
        fake.spend(Account.DRAIN, END_NS)
        fake.seal()
        pods.append((fake.identity, fake))
    return pods


def pages_of(fake: FakeWorker, cuts: random.Random) -> list[Page]:
    pages = []
    for boot in fake.boots:
        after = 0
        while after < len(boot.links):
            size = cuts.randrange(1, 40)
            pages.append(fake.page(boot.boot_id, after, size))
            after += size
    return pages


def bill(path: Path | str, pods: list[tuple[Worker, FakeWorker]], deliveries: random.Random | None) -> list[object]:
    """Everything that the ledger makes of these journals, delivered in order, or as a bad network would."""
    ledger = open_ledger(path)
    ledger.keep_plan("default", 1, SPEC, START_NS)
    for identity, _ in pods:
        events = [started("c1", START_NS), ended("c1", END_NS + SECOND_NS), gone(END_NS + 2 * SECOND_NS)]
        if deliveries:
            deliveries.shuffle(events)
        ledger.observe(identity, events, END_NS)
    waiting = [(identity, page) for identity, fake in pods for page in pages_of(fake, deliveries or random.Random(0))]
    if deliveries:
        waiting += deliveries.sample(waiting, k=len(waiting) // 3)
        deliveries.shuffle(waiting)
    _deliver(ledger, waiting)
    plan_hash = ledger.keep_plan("default", 1, SPEC, START_NS)
    pricing = Pricing({}, {"default": plan_hash})
    Closer(ledger, MINUTE_NS).close_all(pricing, END_NS + 2 * MINUTE_NS)
    rounds = [day_of(END_NS).end_ns + HOUR_NS, month_of(END_NS).end_ns + HOUR_NS]
    for now_ns in rounds[deliveries.randrange(2) :] if deliveries else rounds:
        Closer(ledger, MINUTE_NS).close_all(pricing, now_ns)
    assert audit(ledger, SERVICE) == []
    assert ledger.alarms() == []
    found: list[object] = list(ledger.final_reports(*SERVICE))
    for granularity in (Granularity.DAY, Granularity.MONTH):
        sums = rollups.rollup_bodies(ledger.engine, SERVICE, granularity, 0)
        assert len(sums) == 3, "two tenants and the platform"
        found += sums
    found += [row for identity, _ in pods for row in ledger.bodies(identity.worker_uid)]
    ledger.close()
    return found


def _deliver(ledger: Ledger, waiting: list[tuple[Worker, Page]]) -> None:
    while waiting:
        refused = []
        for identity, page in waiting:
            try:
                ledger.take(identity, page, END_NS)
            except PageRefused as refusal:
                assert refusal.reason == "SequenceGap"  # it came too early, and comes again
                refused.append((identity, page))
        assert len(refused) < len(waiting)
        waiting = refused


@settings(max_examples=examples(12), deadline=None)
@given(life=st.integers(0, 2**32), network=st.integers(0, 2**32))
def test_pages_repeated_cut_and_shuffled_change_nothing(life: int, network: int) -> None:
    with TemporaryDirectory() as folder:
        pods = two_pods(life)
        in_order = bill(Path(folder) / "in-order.db", pods, None)
        at_random = bill(Path(folder) / "at-random.db", pods, random.Random(network))
        assert in_order == at_random


@pytest.mark.parametrize("seed", range(3))
def test_postgresql_and_sqlite_make_the_same_bytes_of_the_same_journals(
    tmp_path: Path, postgres: Server, migrated: str, seed: int
) -> None:
    pods, name = two_pods(seed), postgres.database(migrated)
    in_order = bill(tmp_path / "in-order.db", pods, None)
    at_random = bill(postgres.url(name), pods, random.Random(seed))
    postgres.drop(name)
    assert in_order == at_random


FIGURES = ("allocated", "load", "attributed", "nonbillable", "idle", "drain", "unaccounted", "host_gap")


@pytest.fixture(scope="module")
def billed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger in which all is Final and right; to be copied."""
    path = tmp_path_factory.mktemp("billed") / "ledger.db"
    bill(path, two_pods(7), None)
    return path


@settings(max_examples=examples(30), deadline=None)
@given(data=st.data())
def test_a_change_of_any_single_raw_row_is_found(billed: Path, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        shutil.copy(billed, path)
        raw = sqlite3.connect(path)
        for (trigger,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            raw.execute(f"DROP TRIGGER {trigger}")  # whoever has the file has this power
        table = data.draw(st.sampled_from(["records", "pod_accounts", "reports", "rollups"]))
        rowid = data.draw(st.sampled_from([row[0] for row in raw.execute(f"SELECT rowid FROM {table}")]))
        if table == "pod_accounts":
            figure = data.draw(st.sampled_from(FIGURES))
            raw.execute(f"UPDATE pod_accounts SET {figure} = {figure} + 1 WHERE rowid = ?", (rowid,))
        elif table in ("reports", "rollups"):
            (body,) = raw.execute(f"SELECT body FROM {table} WHERE rowid = ?", (rowid,)).fetchone()
            changed = body.replace(b'"gpuNanoseconds":"', b'"gpuNanoseconds":"1')
            raw.execute(f"UPDATE {table} SET body = ? WHERE rowid = ?", (changed, rowid))
        elif data.draw(st.booleans()):
            raw.execute("DELETE FROM records WHERE rowid = ?", (rowid,))
        else:
            (body,) = raw.execute("SELECT body FROM records WHERE rowid = ?", (rowid,)).fetchone()
            at = body.index(b'"gpu_ns":') + len(b'"gpu_ns":')
            raw.execute("UPDATE records SET body = ? WHERE rowid = ?", (body[:at] + b"1" + body[at:], rowid))
        raw.commit()
        raw.close()
        assert audit(Reader(f"sqlite:///{path}"), SERVICE) != []
