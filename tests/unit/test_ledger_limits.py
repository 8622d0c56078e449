"""What no worker, no figure and no outage may do to the ledger."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import insert, text

from gpumeter_operator.adapters.ledger.engine import MIGRATIONS, open_engine, writing
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.ledger.tables import records
from gpumeter_operator.billing.accept import CLOCK_SKEW_NS, PageRefused
from gpumeter_operator.billing.counts import FREE_TOKENS
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.balance import BALANCED, CUT
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import Account, Kind, Status
from rigs.databases import Database
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, open_ledger, started, worker

POD = worker()
SERVICE = ("team-a", "smollm2")
NOW_NS = START_NS + 50 * SECOND_NS
RUNNING = Pricing({}, {})


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    ledger = open_ledger(database.url)
    yield ledger
    ledger.close()


def a_worker() -> FakeWorker:
    fake = FakeWorker(POD, START_NS)
    fake.serve("s-1", "acme", START_NS + 40 * SECOND_NS)
    return fake


def put(database: Database, **values: object) -> None:
    """A row of records as a damaged disk or a former version may have left it."""
    with database.raw() as raw:
        row = raw.execute(text("SELECT * FROM records LIMIT 1")).mappings().one()
        raw.execute(insert(records).values({**row, **values}))


@pytest.mark.parametrize("column", ["gpu_ns", "prefill_ns", "prompt_tokens", "batch_ns"])
def test_sums_beyond_64_bits_are_exact(ledger: Ledger, database: Database, column: str) -> None:
    fake = a_worker()
    ledger.take(POD, fake.page("boot-1", 0), NOW_NS)
    before = sum(getattr(line, column) for line in ledger.lines(*SERVICE, START_NS + MINUTE_NS))
    for seq in range(100, 104):
        put(database, seq=seq, **{column: 2**63 - 1})
    after = sum(getattr(line, column) for line in ledger.lines(*SERVICE, START_NS + MINUTE_NS))
    assert after - before == 4 * (2**63 - 1)


@pytest.mark.parametrize("kind", [Kind.ACCOUNT, Kind.SESSION])
def test_a_boot_cannot_claim_more_time_than_has_passed_on_its_devices(ledger: Ledger, kind: Kind) -> None:
    pod = replace(POD, devices=2)
    fake = FakeWorker(pod, START_NS)
    ledger.observe(pod, [started("c1", START_NS)], NOW_NS)
    most_ns = 2 * (40 * SECOND_NS + CLOCK_SKEW_NS)
    session = {"session_id": "s-1", "tenant": "acme", "status": Status.OPEN} if kind is Kind.SESSION else {}
    account = Account.ATTRIBUTED if session else Account.IDLE
    for number in range(4):
        claimed = {"gpu_ns": most_ns // 4} | ({"prefill_ns": most_ns // 4} if session else {})
        edge_ns = START_NS + 10 * (number + 1) * SECOND_NS
        fake._append(kind, account, edge_ns - 10 * SECOND_NS, edge_ns, **claimed, **session)
    ledger.take(pod, fake.page("boot-1", 0), NOW_NS)  # all that there is, and every doubt in its favour
    claimed = {"gpu_ns": SECOND_NS} | ({"prefill_ns": SECOND_NS} if session else {})
    fake._append(kind, account, fake.frontier_ns, START_NS + 40 * SECOND_NS, **claimed, **session)
    with pytest.raises(PageRefused, match="cannot have spent more than") as refused:
        ledger.take(pod, fake.page("boot-1", 4), NOW_NS)
    assert refused.value.reason == "MoreThanTime"
    assert ledger.boots(pod.worker_uid)[0].committed_seq == 4


def test_the_boots_of_a_pod_cannot_claim_more_time_together_than_it_has_lived(ledger: Ledger) -> None:
    """Each claims what it may alone: one pod of a minute would be billed for as many as it states boots."""
    ledger.observe(POD, [started("c1", START_NS)], NOW_NS)
    fake = FakeWorker(POD, START_NS)
    for number in (1, 2, 3):
        if number > 1:
            fake.restart(f"boot-{number}", START_NS)
        fake.serve(f"s-{number}", "acme", START_NS + 40 * SECOND_NS)
    for boot_id in ("boot-1", "boot-2"):  # 80 s, of which 50 s had passed: what a clock may be ahead is believed
        ledger.take(POD, fake.page(boot_id, 0), NOW_NS)
    with pytest.raises(PageRefused, match="sessions of its pod's boots claim 120000000000 ns") as refused:
        ledger.take(POD, fake.page("boot-3", 0), NOW_NS)
    assert refused.value.reason == "MoreThanTime"
    assert [boot.boot_id for boot in ledger.boots(POD.worker_uid)] == ["boot-1", "boot-2"]
    ledger.take(POD, fake.page("boot-3", 0), NOW_NS + 20 * SECOND_NS)  # by then it may have


def test_tokens_of_no_time_are_believed_once_a_boot_and_not_in_every_record(ledger: Ledger) -> None:
    """Standard rates bill tokens: what a clock that stands for a step may hide is not what a whole life may."""
    fake = FakeWorker(POD, START_NS)
    for number in range(3):
        at_ns = START_NS + number * SECOND_NS
        session = {"session_id": f"s-{number}", "tenant": "acme", "status": Status.FINISHED, "steps": 1}
        fake._append(Kind.SESSION, Account.ATTRIBUTED, at_ns, at_ns, prompt_tokens=FREE_TOKENS // 2, **session)
    ledger.take(POD, fake.page("boot-1", 0, limit=1), NOW_NS)
    ledger.take(POD, fake.page("boot-1", 1, limit=1), NOW_NS)
    with pytest.raises(PageRefused, match="1572864 computed tokens up to seq 3") as refused:
        ledger.take(POD, fake.page("boot-1", 2), NOW_NS)
    assert refused.value.reason == "CountTooLarge"
    assert ledger.boots(POD.worker_uid)[0].tokens == FREE_TOKENS


def test_a_page_is_taken_after_a_collector_of_an_earlier_schema_moved_its_boot_on(
    ledger: Ledger, database: Database
) -> None:
    """While a Deployment rolls, both work on one database, and the earlier one does not say what it left open."""
    fake = FakeWorker(POD, START_NS)
    for flush in range(2):
        start_ns = START_NS + 4 * flush * SECOND_NS
        for number in range(4):
            times = start_ns + number * SECOND_NS, start_ns + (number + 1) * SECOND_NS
            session = {"session_id": f"s-{number}", "tenant": "acme", "status": Status.FINISHED}
            used = {"gpu_ns": SECOND_NS, "prefill_ns": SECOND_NS}
            fake._append(Kind.SESSION, Account.ATTRIBUTED, *times, **used, **session)
        edges = start_ns, start_ns + 4 * SECOND_NS
        fake._append(Kind.ACCOUNT, Account.ATTRIBUTED, *edges, gpu_ns=4 * SECOND_NS)
    ledger.take(POD, fake.page("boot-1", 0, limit=2), NOW_NS)
    head_hash = fake.boot.links[2].hash
    database.run(f"UPDATE boots SET committed_seq = 3, head_hash = '{head_hash}'")  # all that the earlier one knows of
    ledger.take(POD, fake.page("boot-1", 3), NOW_NS, whole=True)
    (boot,) = ledger.boots(POD.worker_uid)
    assert (boot.committed_seq, boot.open) == (10, BALANCED)


def test_a_boot_cannot_have_begun_before_its_pod(ledger: Ledger) -> None:
    ledger.observe(POD, [started("c1", START_NS)], NOW_NS)
    fake = FakeWorker(POD, START_NS)
    fake._append(Kind.ACCOUNT, Account.IDLE, 1, START_NS + SECOND_NS, gpu_ns=30 * MINUTE_NS)
    with pytest.raises(PageRefused, match="its accounts claim 1800000000000 ns"):
        ledger.take(POD, fake.page("boot-1", 0), NOW_NS)


def test_a_service_that_cannot_be_closed_stops_no_other(ledger: Ledger, database: Database) -> None:
    life = [started("c1", START_NS), ended("c1", NOW_NS), gone(NOW_NS)]
    for number, service in enumerate(("a-broken", "smollm2"), start=1):
        fake = FakeWorker(worker(number, service=service), START_NS)
        fake.spend(Account.IDLE, NOW_NS)
        fake.seal()
        ledger.observe(fake.identity, life, NOW_NS)
        ledger.take(fake.identity, fake.page("boot-1", 0), NOW_NS)
    put(database, worker_uid="pod-uid-1", seq=9, service="team-a/a-broken", kind="account", account="?")
    closer = Closer(ledger, 10 * SECOND_NS)
    for _ in range(2):
        closer.close_all(RUNNING, START_NS + 2 * MINUTE_NS)
    assert finals(ledger, ("team-a", "a-broken")) == {}
    assert len(finals(ledger)) == 1
    assert [alarm[:2] for alarm in ledger.alarms()] == [("CloseFailed", "team-a/a-broken")]


def plan(price: str) -> bytes:
    return json.dumps({"currency": "EUR", "rates": [{"gpuClass": "h100", "perGpuHour": price}]}).encode()


def priced(ledger: Ledger, minute: int) -> tuple[str, str]:
    status = finals(ledger)[START_NS + minute * MINUTE_NS, PLATFORM]["status"]
    return status.get("amount", ""), next(each["message"] for each in status["conditions"] if each["type"] == "Priced")


def test_after_an_outage_periods_are_priced_by_the_plan_that_was_in_force_when_they_began(ledger: Ledger) -> None:
    """Nobody opened a period for five minutes, and the plan changed, changed back, and was deleted meanwhile."""
    ledger.observe(POD, [started("c1", START_NS)], NOW_NS)
    ledger.keep_plan("default", 1, plan("60"), START_NS + 1)
    ledger.keep_plan("default", 2, plan("120"), START_NS + 90 * SECOND_NS)
    ledger.keep_plan("default", 3, plan("60"), START_NS + 150 * SECOND_NS)
    ledger.note_plans(["default"], START_NS + 160 * SECOND_NS)
    ledger.note_plans([], START_NS + 210 * SECOND_NS)
    ledger.note_plans([], START_NS + 220 * SECOND_NS)
    newest = ledger.keep_plan("default", 1, plan("240"), START_NS + 290 * SECOND_NS)
    Closer(ledger, SECOND_NS).close_all(Pricing({}, {"default": newest}), START_NS + 310 * SECOND_NS)
    amounts = [priced(ledger, minute)[0] for minute in range(1, 6)]
    assert amounts == ["1", "1", "2", "1", ""]
    assert "as it stood at 2026-11-21T10:00:00Z" in priced(ledger, 1)[1], "nothing was known when it began"
    assert "(version 1) when the period began" in priced(ledger, 2)[1]


def test_a_ledger_of_the_first_version_is_brought_up_to_date_with_all_that_is_in_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = open_engine(url, read_only=False)
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql("INSERT INTO boots VALUES ('pod-uid-1', 'boot-1', 5, 7, 'h', '', 0)")
        connection.exec_driver_sql("INSERT INTO progress VALUES ('pod-uid-1', 5, 6, 'silent')")
        connection.exec_driver_sql("INSERT INTO price_plans VALUES ('default', 'f00', 1, '{}', 10)")
    engine.dispose()
    ledger = Ledger(url)
    boot = ledger.boots("pod-uid-1")[0]
    assert (boot.committed_seq, boot.accounts_ns, boot.slices_ns) == (7, 0, 0)
    assert boot.open == CUT, "nobody counted its slices so far"
    assert [ledger.plan_in_force("default", at_ns) for at_ns in (9, 10)] == [None, "f00"]


def test_a_boot_began_with_the_earliest_of_its_records_whichever_comes_first(ledger: Ledger) -> None:
    fake = FakeWorker(POD, START_NS)
    ledger.observe(POD, [started("c1", START_NS)], NOW_NS)
    minute_ns = 60 * SECOND_NS
    late_ns, now_ns = START_NS + 10 * minute_ns, START_NS + 11 * minute_ns
    fake._append(Kind.ACCOUNT, Account.IDLE, late_ns, late_ns + SECOND_NS, gpu_ns=SECOND_NS)
    for number in range(10):
        begun_ns = START_NS + number * minute_ns
        fake._append(Kind.ACCOUNT, Account.IDLE, begun_ns, begun_ns + minute_ns, gpu_ns=minute_ns)
    ledger.take(POD, fake.page("boot-1", 0), now_ns)
    [boot] = ledger.boots(POD.worker_uid)
    assert boot.started_ns == START_NS
    assert boot.accounts_ns == 10 * minute_ns + SECOND_NS
