"""What is PostgreSQL's own: several writers, roles, days, other languages' order of letters, a server that goes."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import DatabaseError

from gpumeter_operator.adapters.ledger import days, rows
from gpumeter_operator.adapters.ledger.days import DAY_NS, day_end_ns
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable, writing
from gpumeter_operator.adapters.ledger.grants import migrate
from gpumeter_operator.adapters.ledger.intake import take_all
from gpumeter_operator.adapters.ledger.locks import of_service, of_worker
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.retention import remove_old
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, open_ledger, started, worker
from rigs.postgres import Server

POD = worker()
NOW_NS = START_NS + 50 * SECOND_NS


@pytest.fixture
def url(postgres: Server, migrated: str) -> Iterator[str]:
    name = postgres.database(migrated)
    yield postgres.url(name)
    postgres.drop(name)


def a_worker(number: int = 1, records: int = 40) -> FakeWorker:
    fake = FakeWorker(worker(number), START_NS)
    for second in range(1, records + 1):
        fake.spend(Account.IDLE, START_NS + second * SECOND_NS)
    return fake


def count(url: str) -> int:
    reader = Reader(url)
    with reader.engine.connect() as connection:
        found = connection.execute(text("SELECT count(*) FROM records")).scalar_one()
    reader.close()
    return int(found)


def test_of_eight_that_bring_the_same_pages_at_once_one_does_and_nothing_is_there_twice(url: str) -> None:
    """The key of a partition cannot keep a record from being in two days: the cursor's row does."""
    fake, ledgers = a_worker(records=60), [open_ledger(url) for _ in range(2)]
    pages = [fake.page("boot-1", after, limit=20) for after in (0, 20, 40)]
    for page in pages:
        together = threading.Barrier(8)

        def bring(number: int, page: object = page, together: threading.Barrier = together) -> int:
            together.wait()
            return ledgers[number % 2].take(POD, page, START_NS + MINUTE_NS).inserted  # type: ignore[arg-type]

        with ThreadPoolExecutor(8) as threads:
            assert sorted(threads.map(bring, range(8))) == [0] * 7 + [20]
    assert count(url) == 60
    for ledger in ledgers:
        ledger.close()


def test_a_cursor_that_was_moved_by_another_lets_no_record_in_even_without_any_advisory_lock(url: str) -> None:
    ledger, fake = open_ledger(url), a_worker()
    ledger.take(POD, fake.page("boot-1", 0, limit=10), NOW_NS)
    [stale] = ledger.boots(POD.worker_uid)
    from gpumeter_operator.billing.accept import accept  # what a second collector has accepted meanwhile

    late = accept(fake.page("boot-1", 10, limit=10), POD, stale.head_hash, NOW_NS, spent=stale.spent)
    ledger.take(POD, fake.page("boot-1", 10, limit=10), NOW_NS)
    with ledger.engine.begin() as connection:
        assert not rows.advance(connection, stale, late)
        assert not rows.advance(connection, None, late)
    ledger.close()


def test_a_period_is_not_closed_while_a_fact_of_its_service_comes_in_and_other_services_go_on(url: str) -> None:
    ledger = open_ledger(url)
    with writing(ledger.engine, of_service("team-a/smollm2", shared=True), of_worker("pod-uid-1")):
        with writing(ledger.engine, of_service("team-a/smollm2", shared=True), of_worker("pod-uid-2")):
            pass  # another worker of the service
        with writing(ledger.engine, of_service("team-a/other", shared=False)):
            pass  # another service is closed
        for locks in ([of_service("team-a/smollm2", shared=False)], []):
            with ledger.engine.begin() as other, pytest.raises(DatabaseError, match="lock timeout"):
                other.execute(text("SET LOCAL lock_timeout = '50ms'"))
                from gpumeter_operator.adapters.ledger.postgres import take_locks

                take_locks(other, locks)
    ledger.close()


def test_the_collectors_role_adds_facts_and_removes_whole_days_but_changes_and_removes_no_row(
    postgres: Server, url: str
) -> None:
    database = url.partition("@/")[2].partition("?")[0]
    postgres.execute(
        "postgres",
        *(f"DROP ROLE IF EXISTS {role}" for role in ("the_collector", "the_auditor")),
        *(f"CREATE ROLE {role} LOGIN" for role in ("the_collector", "the_auditor")),
    )
    migrate(url, ["the_collector"], ["the_auditor"])
    migrate(url, ["the_collector"], ["the_auditor"])
    fake = a_worker()
    ledger = open_ledger(postgres.url(database, "the_collector"), Granularity.HOUR)
    ledger.observe(POD, [started("c", START_NS), ended("c", NOW_NS), gone(NOW_NS)], NOW_NS)
    ledger.take(POD, fake.page("boot-1", 0), NOW_NS)
    ledger.keep_plan("default", 1, b"{}", NOW_NS)
    Closer(ledger, SECOND_NS).close_all(Pricing({}, {}), START_NS + 3 * 3600 * SECOND_NS)
    assert len(finals(ledger)) == 1
    day = f"records_{'20261121'}"
    for statement in (
        "UPDATE records SET gpu_ns = 0", "DELETE FROM records", "TRUNCATE records", f"DELETE FROM {day}",
        f"INSERT INTO {day} SELECT * FROM records", f"SELECT * FROM {day}", "UPDATE reports SET body = ''",
        "DELETE FROM boots", "ALTER TABLE records DISABLE TRIGGER ALL", f"DROP TABLE {day}", "CREATE TABLE x (y int)",
        "SET session_replication_role = replica",
    ):  # fmt: skip
        with pytest.raises(DatabaseError, match=r"permission denied|must be owner"), ledger.engine.begin() as own:
            own.execute(text(statement))
    assert [each.records for each in remove_old(ledger, 90, START_NS + 100 * DAY_NS)] == [40]
    ledger.close()

    auditor = Reader(postgres.url(database, "the_auditor"))
    assert len(auditor.final_reports("team-a", "smollm2")) == 1
    with pytest.raises(DatabaseError, match="permission denied"), auditor.engine.begin() as own:
        own.execute(text("SET default_transaction_read_only = off"))
        own.execute(text("SET TRANSACTION READ WRITE"))
        own.execute(text("INSERT INTO granularities VALUES (1, 'Hour', 1)"))
    auditor.close()


def test_a_role_that_may_not_migrate_is_told_who_does(postgres: Server) -> None:
    name = postgres.database()
    postgres.execute("postgres", "DROP ROLE IF EXISTS nobody_much", "CREATE ROLE nobody_much LOGIN")
    with pytest.raises(LedgerUnavailable, match="Whoever owns the schema runs `gpumeter migrate`"):
        Ledger(postgres.url(name, "nobody_much"))
    postgres.drop(name)


def test_days_are_made_ahead_and_when_a_record_needs_one_and_hold_what_ends_in_them(postgres: Server, url: str) -> None:
    ledger = open_ledger(url)
    midnight_ns = day_end_ns(START_NS)
    assert midnight_ns == START_NS + 14 * 3600 * SECOND_NS
    fake = FakeWorker(POD, midnight_ns - 90 * SECOND_NS)
    fake.spend(Account.IDLE, midnight_ns + 30 * SECOND_NS)  # ends at 23:59, 00:00 and 00:00:30
    ledger.observe(POD, [started("c", midnight_ns - 90 * SECOND_NS)], NOW_NS)
    ledger.take(POD, fake.page("boot-1", 0), midnight_ns + MINUTE_NS)
    with ledger.engine.connect() as connection:
        days = {name for name in inspect(connection).get_table_names() if name.startswith("records_2")}
        held = connection.execute(text("SELECT tableoid::regclass::text, seq FROM records ORDER BY seq")).all()
    assert {"records_20261121", "records_20261122", "records_20261123"} <= days
    assert held == [("records_20261121", 1), ("records_20261121", 2), ("records_20261122", 3)]
    ledger.close()


def test_every_text_sorts_by_its_bytes_whatever_language_the_database_is_made_for(url: str) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    query = text(
        "SELECT table_name || '.' || column_name FROM information_schema.columns WHERE table_schema = 'public' AND "
        "data_type IN ('character varying', 'text') AND collation_name IS DISTINCT FROM 'C' "
        "AND table_name <> 'alembic_version'"
    )
    with engine.connect() as connection:
        assert connection.execute(query).scalars().all() == []
    engine.dispose()


def test_what_a_worker_says_in_letters_that_the_database_has_not_is_kept_readable(url: str) -> None:
    ledger = open_ledger(url)
    assert ledger.raise_alarm("PageInvalid", POD.worker_uid, "a NUL \0 and half a pair \ud800", NOW_NS, boot_id="b\0")
    ledger.note_problem(POD.worker_uid, "\0")
    assert ledger.alarms() == [("PageInvalid", POD.worker_uid, "a NUL \\0 and half a pair \\ud800")]
    ledger.close()


def test_a_server_that_goes_and_comes_back_loses_nothing_and_is_found_again(postgres: Server, url: str) -> None:
    ledger, fake = open_ledger(url), a_worker()
    ledger.take(POD, fake.page("boot-1", 0, limit=10), NOW_NS)
    postgres.crash()
    with pytest.raises(LedgerUnavailable, match="cannot be used"):
        ledger.take(POD, fake.page("boot-1", 10), NOW_NS)
    with pytest.raises(LedgerUnavailable, match="cannot be used"):
        ledger.boots(POD.worker_uid)
    postgres.start()
    assert ledger.take(POD, fake.page("boot-1", 10), NOW_NS).inserted == 30
    assert count(url) == 40
    ledger.close()


def test_a_connection_that_is_cut_within_a_page_takes_nothing_of_it(postgres: Server, url: str) -> None:
    ledger, fake = open_ledger(url), a_worker()
    ledger.take(POD, fake.page("boot-1", 0, limit=10), NOW_NS)
    with pytest.raises(LedgerUnavailable), ledger.writing() as connection:
        connection.execute(text("UPDATE boots SET committed_seq = 99"))
        postgres.execute(
            "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'"
        )
        connection.execute(text("SELECT 1"))
    assert ledger.take(POD, fake.page("boot-1", 10), NOW_NS).inserted == 30
    ledger.close()


def test_a_database_without_room_takes_nothing_and_says_so(postgres: Server, url: str) -> None:
    """The server's own error for a full disk, raised where it would be: when rows are written."""
    ledger, fake = open_ledger(url), a_worker()
    ledger.take(POD, fake.page("boot-1", 0, limit=10), NOW_NS)
    database = url.partition("@/")[2].partition("?")[0]
    postgres.execute(
        database,
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
        "'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$",
        "CREATE TRIGGER full_disk BEFORE INSERT ON records FOR EACH ROW WHEN (NEW.seq = 30) "
        "EXECUTE FUNCTION full_disk()",
    )
    with pytest.raises(LedgerUnavailable, match="its disk is full"):
        ledger.take(POD, fake.page("boot-1", 10), NOW_NS)
    assert ledger.boots(POD.worker_uid)[0].committed_seq == 10
    postgres.execute(database, "DROP TRIGGER full_disk ON records")
    assert ledger.take(POD, fake.page("boot-1", 10), NOW_NS).inserted == 30
    ledger.close()


def test_a_day_that_another_process_removed_is_made_again_and_no_page_is_held_up(url: str) -> None:
    ledger, another = open_ledger(url), open_ledger(url)
    fakes = [a_worker(number) for number in (1, 2)]
    day_ns = day_end_ns(START_NS + MINUTE_NS)
    for each in (ledger, another):
        each.days.make([day_ns])
    for end_ns in (day_ns, day_ns + DAY_NS):
        with another.writing() as connection:
            days.drop(connection, end_ns)
    given = [(fake.identity, fake.page("boot-1", 0), True) for fake in fakes]
    assert [taken.inserted for taken in take_all(ledger, given, NOW_NS)] == [40, 40]  # type: ignore[union-attr]
    assert count(url) == 80
    ledger.close()
    another.close()


def test_a_page_that_a_constraint_refuses_holds_up_no_other(postgres: Server, url: str) -> None:
    ledger, fakes = open_ledger(url), [a_worker(number) for number in (1, 2)]
    database = url.partition("@/")[2].partition("?")[0]
    ledger.days.make([day_end_ns(START_NS + MINUTE_NS)])
    postgres.execute(database, "ALTER TABLE records ADD CONSTRAINT odd CHECK (worker_uid <> 'pod-uid-1' OR seq < 30)")
    refused, taken = take_all(ledger, [(fake.identity, fake.page("boot-1", 0), True) for fake in fakes], NOW_NS)
    assert isinstance(refused, LedgerUnavailable)
    assert "what worker pod-uid-1 sent" in str(refused) and '"odd"' in str(refused)
    assert isinstance(taken, rows.Taken) and taken.inserted == 40
    assert count(url) == 40, "the other worker's page"
    ledger.close()


def test_of_two_that_remove_the_same_day_at_once_one_does_and_the_other_goes_on(url: str) -> None:
    ledgers = [open_ledger(url, Granularity.HOUR) for _ in range(2)]
    fake = a_worker()
    ledgers[0].observe(POD, [started("c", START_NS), ended("c", NOW_NS), gone(NOW_NS)], NOW_NS)
    ledgers[0].take(POD, fake.page("boot-1", 0), NOW_NS)
    Closer(ledgers[0], SECOND_NS).close_all(Pricing({}, {}), START_NS + 3 * 3600 * SECOND_NS)
    together = threading.Barrier(2)

    def remove(ledger: Ledger) -> int:
        together.wait()
        return sum(each.records for each in remove_old(ledger, 90, day_end_ns(START_NS) + 90 * DAY_NS))

    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(remove, ledgers)) == [0, 40]
    assert count(url) == 0
    for ledger in ledgers:
        ledger.close()
