"""A command beside a running collector sees one state of the ledger, whatever is written between two of its queries."""

import pytest
from psycopg import Connection
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable, reading
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.cli.accounts import rows_of
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from rigs.audited import DAY_NS, DIGESTED_NS, HOUR_NS, audited, digested, fill
from rigs.databases import Database
from rigs.ledger import FakeWorker, open_ledger, started, worker

SERVICE = ("team-a", "busy")
BUSY_FROM_NS = DIGESTED_NS + HOUR_NS
"""When its worker started: after every digest."""


class BusyCollector:
    """Takes a page whenever it is asked to, each of a minute more, and closes the minutes before it now and then."""

    def __init__(self, ledger: Ledger, closing_every: int = 1) -> None:
        self._ledger = ledger
        self._fake = FakeWorker(worker(7, service="busy"), BUSY_FROM_NS)
        ledger.observe(self._fake.identity, [started("c-7", BUSY_FROM_NS)], BUSY_FROM_NS)
        self._closer = Closer(ledger, MINUTE_NS)
        self._closing_every = closing_every
        self.pages = 0
        self.work()

    def before_query(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        """One minute more before whatever reads what it writes."""
        if any(f"FROM {table}" in statement for table in ("records", "boots", "pod_accounts", "reports")):
            self.work()

    def work(self) -> None:
        """One minute more."""
        fake, sent = self._fake, len(self._fake.boot.links)
        fake.serve(f"s-{self.pages}", "acme", fake.frontier_ns + MINUTE_NS)
        now_ns = fake.frontier_ns + SECOND_NS
        self._ledger.take(fake.identity, fake.page("boot-1", sent), now_ns)
        self._ledger.settle(fake.identity.worker_uid, fake.frontier_ns)
        if self.pages % self._closing_every == 0:
            self._closer.close_all(Pricing({}, {}), now_ns)
        self.pages += 1


def test_what_a_collector_writes_between_two_queries_is_no_difference(database: Database) -> None:
    url = database.url
    ledger = open_ledger(url)
    fill(ledger)
    digested(ledger)
    collector = BusyCollector(ledger, closing_every=20)
    reader = Reader(url, one_state=True)
    event.listen(reader.engine, "before_cursor_execute", collector.before_query)
    found = audited(reader, DIGESTED_NS + DAY_NS)
    busy_pages = collector.pages
    event.remove(reader.engine, "before_cursor_execute", collector.before_query)
    assert [each.message for each in found] == []
    assert busy_pages > 20, "it wrote between the queries"
    reader.close()
    ledger.close()


def test_no_row_of_the_accounts_is_there_twice_or_lacks_where_its_period_closes_meanwhile(database: Database) -> None:
    url = database.url
    ledger = open_ledger(url)
    collector = BusyCollector(ledger)
    reader = Reader(url, one_state=True)
    event.listen(reader.engine, "before_cursor_execute", collector.before_query)
    now_ns = BUSY_FROM_NS + 2 * MINUTE_NS
    periods = [row.period.start_ns for row in rows_of(reader, SERVICE, now_ns)]
    assert periods == sorted(set(periods)), "each once"
    assert len(periods) == (max(periods) - min(periods)) // MINUTE_NS + 1, "and none between them is missing"
    event.remove(reader.engine, "before_cursor_execute", collector.before_query)
    reader.close()
    ledger.close()


def test_a_reader_of_one_state_goes_on_after_a_query_that_failed(database: Database) -> None:
    url = database.url
    open_ledger(url).close()
    reader = Reader(url, one_state=True)
    with pytest.raises((DBAPIError, LedgerUnavailable)), reading(reader.engine) as connection:
        connection.exec_driver_sql("SELECT nothing FROM nowhere")
    assert reader.services() == []
    reader.close()


def test_whoever_asks_again_sees_what_came_since(database: Database) -> None:
    url = database.url
    ledger = open_ledger(url)
    first = Reader(url, one_state=True)
    assert first.services() == []
    BusyCollector(ledger)
    assert first.services() == [], "it sees what it saw"
    again = Reader(url, one_state=True)
    assert again.services() == [SERVICE]
    again.close()
    first.close()
    usual = Reader(url)
    assert usual.services() == [SERVICE]
    usual.close()
    ledger.close()


def test_a_state_that_could_not_be_kept_is_fixed_by_whoever_asks_again(database: Database) -> None:
    if database.kind == "sqlite":
        return  # a file has no server that ends a connection before it lends its state
    taken: list[int] = []

    def cut_the_second(driver: Connection[object], *_: object) -> None:
        """The first one is the reader's own; the second one is to keep the state."""
        taken.append(driver.info.backend_pid)
        if len(taken) == 2:
            with database.raw() as connection:
                assert connection.scalar(text(f"SELECT pg_terminate_backend({taken[1]}, 5000)"))

    reader = Reader(database.url, one_state=True)
    event.listen(reader.engine, "checkout", cut_the_second)
    with pytest.raises(LedgerUnavailable):
        reader.services()
    assert reader.services() == []
    reader.close()


def test_a_server_that_ended_the_transaction_is_told_with_what_to_do(database: Database) -> None:
    if database.kind == "sqlite":
        return  # a file has no server that ends transactions
    reader = Reader(database.url, one_state=True)
    assert reader.services() == []
    end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :name AND state LIKE 'idle in%'"
    with database.raw() as connection:
        ended = connection.scalars(text(end), {"name": database.name}).all()
    assert ended == [True], "it is gone, and not only told to go"
    with pytest.raises(LedgerUnavailable, match="run it again"):
        reader.services()
    reader.close()
