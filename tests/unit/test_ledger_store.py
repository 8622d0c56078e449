"""The ledger on a real file: what it keeps, what it refuses, and what becomes of what comes late."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger import corrections, digests, rollups
from gpumeter_operator.adapters.ledger.digests import Due
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable, reading
from gpumeter_operator.adapters.ledger.gaps import keep_gap
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.ledger.tables import FACTS, metadata
from gpumeter_operator.billing.accept import PageRefused
from gpumeter_operator.billing.facts import PLATFORM, Correction, Gap
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.chain import Link, link
from gpumeter_usage.page import Page
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity, day_of
from gpumeter_usage.record import Account, Status, canonical, parse
from rigs.audited import key
from rigs.databases import Database
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, open_ledger, started, worker

POD = worker()
SERVICE = ("team-a", "smollm2")
NOW_NS = START_NS + 50 * SECOND_NS


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    ledger = open_ledger(database.url)
    yield ledger
    ledger.close()


def a_worker(until_ns: int = START_NS + 40 * SECOND_NS) -> FakeWorker:
    fake = FakeWorker(POD, START_NS)
    fake.spend(Account.LOAD, START_NS + 10 * SECOND_NS)
    fake.serve("s-1", "acme", START_NS + 20 * SECOND_NS)
    fake.spend(Account.IDLE, until_ns)
    return fake


def take(ledger: Ledger, page: Page, now_ns: int = NOW_NS) -> int:
    return ledger.take(POD, page, now_ns).inserted


def changed(page: Page, index: int, **values: object) -> Page:
    """The page with one record changed and the chain reckoned anew from there, as a dishonest worker would."""
    links = list(page.links[:index])
    for position, old in enumerate(page.links[index:], start=index):
        record = replace(parse(old.body), **(values if position == index else {}))
        links.append(link(links[-1].hash if links else "0" * 64, canonical(record)))
    return replace(page, links=tuple(links))


def test_the_migrations_create_exactly_the_tables_that_the_code_uses(ledger: Ledger) -> None:
    with reading(ledger.engine) as connection:
        # In PostgreSQL names are of any length, and days have tables of their own.
        of_sqlite = connection.dialect.name == "sqlite"
        ours = {"compare_type": of_sqlite, "include_object": lambda _, name, *__: of_sqlite or name not in days}
        inspector = inspect(connection)
        days = {name for name in inspector.get_table_names() if name.startswith("records_")}
        days |= {index["name"] for day in days for index in inspector.get_indexes(day)}
        context = MigrationContext.configure(connection, opts=ours)
        assert compare_metadata(context, metadata) == []


def test_a_database_of_a_newer_version_is_refused_in_words(database: Database) -> None:
    open_ledger(database.url).close()
    database.run("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LedgerUnavailable, match="written by a newer version"):
        Ledger(database.url)


def test_what_cannot_be_a_ledger_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "note.db").write_text("this is a letter, and long enough not to be an empty database\n" * 100)
    for url, told in [
        (f"sqlite:///{tmp_path}/missing/ledger.db", "does not exist"),
        ("mysql://db/ledger", "in SQLite or PostgreSQL; mysql cannot be used"),
        ("postgresql://someone:secret@localhost:1/ledger", "cannot be used: connection .*failed"),
        ("ledger.db", "cannot be read"),
        (f"sqlite:///{tmp_path}/note.db", "not a database"),
    ]:
        with pytest.raises(LedgerUnavailable, match=told):
            Ledger(url)


def test_the_database_itself_refuses_to_change_or_delete_facts(ledger: Ledger, database: Database) -> None:
    fill(ledger)
    database.run(
        "INSERT INTO removals SELECT worker_uid, 'boot-0', 0, 1, 1, '', 1, '', '', 0, 0, 90, :old FROM workers",
        old=91 * 86_400 * SECOND_NS,
    )
    for table in FACTS:
        column = next(iter(table.columns)).name
        statements = [f"UPDATE {table.name} SET {column} = {column}", f"DELETE FROM {table.name}"]
        statements += [f"TRUNCATE {table.name}"] if database.kind == "postgresql" else []
        with database.raw() as raw:
            rows = raw.execute(text(f"SELECT count(*) FROM {table.name}")).scalar_one()
        assert rows > 0, f"a trigger fires only where there are rows, and {table.name} has none"
        for statement in statements:
            with pytest.raises(IntegrityError, match=f"append-only: {statement.split()[0]} on {table.name} is refused"):
                database.run(statement)


def fill(ledger: Ledger) -> None:
    """A row in every table of facts: a period that became Final, and a record that came too late for it."""
    fake = a_worker(START_NS + 59 * SECOND_NS)
    ledger.observe(POD, [started("c1", START_NS)], NOW_NS)
    ledger.keep_plan("default", 1, b"{}", NOW_NS)
    ledger.keep_profiles(POD.worker_uid, [(sha256(b"{}").hexdigest(), b"{}")], NOW_NS)
    take(ledger, fake.page("boot-1", 0, limit=3), START_NS + MINUTE_NS)
    made = Closer(ledger, SECOND_NS).close_all(Pricing({}, {}), START_NS + MINUTE_NS + 10 * SECOND_NS)
    take(ledger, fake.page("boot-1", 3), START_NS + MINUTE_NS + 11 * SECOND_NS)
    day, before = day_of(START_NS + 1), rollups.facts_before(ledger.engine, SERVICE, START_NS)
    of_day = [each for each in made if each["spec"]["period"]["granularity"] == "Day"]
    with ledger.writing() as connection:
        keep_gap(connection, POD.worker_uid, Gap("boot-9", 1, 3, "a" * 64, START_NS, NOW_NS, "gone", NOW_NS))
    assert rollups.keep_rollup(
        ledger.engine, SERVICE, replace(day, end_ns=START_NS), of_day, made_from=before, now_ns=NOW_NS
    )
    end_ns, digest = START_NS + MINUTE_NS, "b" * 64
    credit = Correction("c-1", *SERVICE, "acme", "a-report", digest, START_NS, end_ns, end_ns + MINUTE_NS, "h100", -1,
                        "default", 1, digest, "Because.", "alice", NOW_NS, START_NS)  # fmt: skip
    assert corrections.keep(ledger, credit, made_from=corrections.version(ledger, *SERVICE))
    digests.keep_key(ledger.engine, key(), NOW_NS)
    assert digests.make(ledger.engine, Due(), key(), NOW_NS, since_ns=-1)


def test_a_duplicate_page_changes_nothing(ledger: Ledger) -> None:
    page = a_worker().page("boot-1", 0)
    assert take(ledger, page) == len(page.links)
    before = ledger.boots(POD.worker_uid)
    assert take(ledger, page) == 0
    assert ledger.boots(POD.worker_uid) == before
    assert ledger.alarms() == []


def test_a_page_that_overlaps_adds_only_what_is_new(ledger: Ledger) -> None:
    fake = a_worker()
    take(ledger, fake.page("boot-1", 0, limit=2))
    assert take(ledger, fake.page("boot-1", 1)) == len(fake.boot.links) - 2


def test_a_gap_is_refused_and_the_cursor_stays(ledger: Ledger) -> None:
    fake = a_worker()
    take(ledger, fake.page("boot-1", 0, limit=1))
    with pytest.raises(PageRefused, match="records 2 to 3 are missing") as refused:
        take(ledger, fake.page("boot-1", 3))
    assert refused.value.reason == "SequenceGap"
    assert ledger.boots(POD.worker_uid)[0].committed_seq == 1


def test_two_records_under_one_key_are_both_kept_and_raise_an_alarm_once(ledger: Ledger) -> None:
    page = a_worker().page("boot-1", 0)
    take(ledger, page)
    forged = changed(page, 1, tenant="beta")
    for _ in range(2):
        with pytest.raises(PageRefused, match="both are kept") as refused:
            take(ledger, forged)
    assert refused.value.reason == "ChainForked"
    assert [reason for reason, *_ in ledger.alarms()] == ["ChainForked"]
    assert [row[2] for row in ledger.bodies(POD.worker_uid)] == [each.hash for each in page.links]
    with reading(ledger.engine) as connection:
        kept = connection.exec_driver_sql("SELECT our_hash, their_hash, their_body FROM alarms").one()
    assert tuple(kept) == (page.links[1].hash, forged.links[1].hash, forged.links[1].body)
    assert POD.worker_uid in ledger.forks([POD.worker_uid], START_NS, START_NS + MINUTE_NS)


def test_bytes_changed_on_the_way_are_a_broken_chain_and_no_fork(ledger: Ledger) -> None:
    page = a_worker().page("boot-1", 0)
    take(ledger, page)
    torn = replace(page, links=(page.links[0], Link("f" * 64, page.links[1].body), *page.links[2:]))
    with pytest.raises(PageRefused) as refused:
        take(ledger, torn)
    assert refused.value.reason == "ChainBroken"
    assert ledger.forks([POD.worker_uid], START_NS, START_NS + MINUTE_NS) == {}


@pytest.mark.parametrize(
    ("values", "reason", "told"),
    [
        ({"service": "team-b/other"}, "ForeignRecord", "names worker pod-uid-1, boot boot-1, service team-b/other"),
        ({"worker_uid": "pod-uid-2"}, "ForeignRecord", "names worker pod-uid-2"),
        ({"ended_at": START_NS + 86_400 * SECOND_NS}, "FutureTime", "yet to come"),
        ({"gpu_ns": 2**62, "prefill_ns": 2**62, "decode_ns": 0}, "CountTooLarge", "claims 4611686018427387904 ns"),
        ({"prompt_tokens": 2**60}, "CountTooLarge", "no step can reach"),
        ({"batch_ns": 2**60}, "CountTooLarge", "no step can reach"),
        ({"prompt_tokens": 0, "cached_tokens": 10**9}, "CountTooLarge", "claims 1000000000 cached tokens of 0 of its"),
        ({"completion_tokens": 10**12}, "CountTooLarge", "1000000000000 of answers, more than 11 steps hold"),
        ({"seq": 7}, "SequenceGap", "seq 2 is missing, 7 was sent"),
        ({"tenant": "Acme Inc."}, "TenantInvalid", "is not a tenant's name"),
        ({"tenant": "platform"}, "TenantInvalid", "reserved name"),
    ],
)
def test_a_record_that_cannot_be_true_is_refused_with_a_sentence_and_nothing_of_its_page_is_taken(
    ledger: Ledger, values: dict[str, object], reason: str, told: str
) -> None:
    page = changed(a_worker().page("boot-1", 0), 1, **values)
    with pytest.raises(PageRefused, match=told) as refused:
        take(ledger, page)
    assert refused.value.reason == reason
    assert ledger.boots(POD.worker_uid) == ()


def test_a_negative_count_is_refused(ledger: Ledger) -> None:
    page = a_worker().page("boot-1", 0)
    body = page.links[0].body.replace(b'"steps":0', b'"steps":-1')
    with pytest.raises(PageRefused, match="steps is -1"):
        take(ledger, replace(page, links=(link("0" * 64, body),)))


def test_nothing_follows_a_seal(ledger: Ledger) -> None:
    fake = a_worker()
    fake.seal()
    fake.spend(Account.IDLE, START_NS + 45 * SECOND_NS)
    with pytest.raises(PageRefused, match="after its seal"):
        take(ledger, fake.page("boot-1", 0))
    take(ledger, fake.page("boot-1", 0, limit=len(fake.boot.links) - 1))
    assert ledger.boots(POD.worker_uid)[0].seal is Status.DRAINED
    with pytest.raises(PageRefused, match="after its seal"):
        take(ledger, fake.page("boot-1", len(fake.boot.links) - 1))


def test_a_full_disk_takes_nothing_and_says_so(ledger: Ledger, database: Database) -> None:
    fake = a_worker()
    take(ledger, fake.page("boot-1", 0, limit=1))
    if database.kind == "postgresql":
        pytest.skip("of PostgreSQL's full disk tells test_ledger_postgres")
    with ledger.engine.connect() as connection:  # the pool hands this very connection to the next transaction
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    big = FakeWorker(POD, START_NS, "boot-2")
    for second in range(1, 200):
        big.spend(Account.IDLE, START_NS + second * SECOND_NS // 5)
    with pytest.raises(LedgerUnavailable, match="full"):
        take(ledger, big.page("boot-2", 0))
    assert [boot.boot_id for boot in ledger.boots(POD.worker_uid)] == ["boot-1"]


def test_a_record_that_comes_after_its_period_is_final_is_booked_in_the_next_one_and_not_lost(ledger: Ledger) -> None:
    fake = a_worker(START_NS + 100 * SECOND_NS)
    ledger.observe(POD, [started("c1", START_NS)], NOW_NS)
    take(ledger, fake.page("boot-1", 0, limit=1), START_NS + MINUTE_NS)
    closer = Closer(ledger, 10 * SECOND_NS)
    closer.close_all(Pricing({}, {}), START_NS + 75 * SECOND_NS)
    first = finals(ledger)
    assert {tenant for _, tenant in first} == {PLATFORM}
    assert first[START_NS + MINUTE_NS, PLATFORM]["status"]["accounts"]["unaccounted"] == str(50 * SECOND_NS)

    take(ledger, fake.page("boot-1", 1), START_NS + 101 * SECOND_NS)
    ledger.settle(POD.worker_uid, START_NS + 2 * MINUTE_NS)
    closer.close_all(Pricing({}, {}), START_NS + 130 * SECOND_NS)
    bill = finals(ledger)
    assert {key: report for key, report in bill.items() if key[0] == START_NS + MINUTE_NS} == first
    second = bill[START_NS + 2 * MINUTE_NS, PLATFORM]["status"]
    assert bill[START_NS + 2 * MINUTE_NS, "acme"]["status"]["gpuNanoseconds"] == str(10 * SECOND_NS)
    # 60 s are allocated; 10 s of acme's and 40 + 40 s of idling are booked: 50 s of them belong to the minute before.
    assert (second["accounts"]["allocated"], second["accounts"]["unaccounted"]) == (
        str(60 * SECOND_NS),
        str(-30 * SECOND_NS),
    )
    assert "arrived after the period that ended 2026-11-21T10:01:00Z was Final" in str(second["conditions"])
    assert "LateRecords" in {reason for reason, *_ in ledger.alarms()}


def test_an_end_that_becomes_known_late_is_an_adjustment_and_total_allocation_is_true(ledger: Ledger) -> None:
    ledger.observe(POD, [started("c1", START_NS)], NOW_NS)
    closer = Closer(ledger, 10 * SECOND_NS)
    closer.close_all(Pricing({}, {}), START_NS + 75 * SECOND_NS)
    ledger.observe(POD, [ended("c1", START_NS + 20 * SECOND_NS), gone(NOW_NS)], START_NS + 80 * SECOND_NS)
    closer.close_all(Pricing({}, {}), START_NS + 4 * MINUTE_NS)
    bill = finals(ledger)
    allocated = {end: int(report["status"]["accounts"]["allocated"]) for (end, _), report in bill.items()}
    assert allocated == {START_NS + MINUTE_NS: 60 * SECOND_NS, START_NS + 2 * MINUTE_NS: -40 * SECOND_NS}


def test_a_period_whose_only_container_ended_in_the_second_in_which_it_started_is_closed_too(ledger: Ledger) -> None:
    ledger.observe(POD, [started("c1", START_NS)], START_NS + SECOND_NS)
    closer = Closer(ledger, 10 * SECOND_NS)
    assert len(closer.close_all(Pricing({}, {}), START_NS + 2 * SECOND_NS)) == 1, "the report is opened"
    ledger.observe(POD, [ended("c1", START_NS), gone(NOW_NS)], START_NS + 3 * SECOND_NS)
    closer.close_all(Pricing({}, {}), START_NS + 80 * SECOND_NS)
    [(key, report)] = finals(ledger).items()
    assert key == (START_NS + MINUTE_NS, PLATFORM)
    assert report["status"]["accounts"]["allocated"] == "0"


def test_a_fact_that_comes_in_while_a_period_is_being_closed_is_not_lost(ledger: Ledger) -> None:
    fake = a_worker()
    ledger.observe(POD, [started("c1", START_NS), ended("c1", NOW_NS), gone(NOW_NS)], NOW_NS)
    period = ledger.schedule().period_of(NOW_NS)
    before = ledger.facts_version(*SERVICE, period.end_ns)
    take(ledger, fake.page("boot-1", 0))
    kept = ledger.keep_final(SERVICE, period, manifests=[], accounts=[], made_from=before, now_ns=NOW_NS)
    assert not kept
    assert ledger.last_final_ns(*SERVICE) == 0


def test_another_length_of_periods_holds_from_the_next_full_hour(ledger: Ledger) -> None:
    hour_ns = 60 * MINUTE_NS
    assert ledger.set_granularity(Granularity.HOUR, START_NS + 5) == START_NS + hour_ns
    assert ledger.set_granularity(Granularity.HOUR, START_NS + 5) == START_NS + hour_ns
    assert ledger.set_granularity(Granularity.FIVE_MINUTES, START_NS + 6) == START_NS + 2 * hour_ns


def test_an_auditor_reads_beside_the_collector_and_cannot_write(ledger: Ledger, database: Database) -> None:
    take(ledger, a_worker().page("boot-1", 0))
    reader = Reader(database.url)
    assert len(list(reader.bodies(POD.worker_uid))) == 4
    with pytest.raises(LedgerUnavailable, match=r"read-?only"), reading(reader.engine) as connection:
        connection.exec_driver_sql("DELETE FROM progress")
    reader.close()
