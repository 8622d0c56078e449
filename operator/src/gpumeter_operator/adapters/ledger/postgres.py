"""The ledger in PostgreSQL: how it is opened, what a transaction sees and locks, and what its failures mean.

Owns what is PostgreSQL's own about connections. Knows no table.
"""

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import errors
from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    Engine,
    PoolProxiedConnection,
    bindparam,
    create_engine,
    event,
    func,
    select,
)

from gpumeter_operator.adapters.ledger.locks import Lock, in_order

POOL_SIZE = 8  # the collector has four threads at the ledger; probes and commands find one at once
POOL_WAIT_S = 30
CONNECTION = {
    "connect_timeout": "5",
    "application_name": "gpumeter",
    # A server that vanished without a word must not hold a thread for the two hours of the kernel's default.
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
# synchronous_commit: what is acknowledged must survive a power cut, whatever the server's default is.
# idle_in_transaction_session_timeout: a collector that was stopped in a transaction must not keep its locks for ever.
SESSION = (
    "SET lock_timeout = '30s'; SET idle_in_transaction_session_timeout = '120s'; SET timezone = 'UTC';"
    "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
)


def open_engine(url: URL, *, read_only: bool, one_state: bool = False) -> Engine:
    """An engine for a database; nothing is connected yet. With `one_state`, which only readers may ask for, every
    transaction sees what its first one saw; it is for one thread."""
    given = {name: value for name, value in CONNECTION.items() if name not in url.query}
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args=given,
        # Whatever the database's default is: what is read after a lock must be as its former holder left it.
        isolation_level="READ COMMITTED",
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_timeout=POOL_WAIT_S,
        pool_pre_ping=True,  # a server that was restarted meanwhile is not a failure of the next page
        hide_parameters=True,
    )
    event.listen(engine, "connect", _prepare_read_only if read_only else _prepare)
    if one_state:
        state = _OneState()
        event.listen(engine, "begin", state.join)
        event.listen(engine, "engine_disposed", state.end)
    return engine


class _OneState:
    """The state that all transactions of an engine see.

    One transaction is kept open and lends its snapshot to the others (PostgreSQL's documentation, "Snapshot
    Synchronization Functions"): each of them fails by itself, where one for all would not survive a query that failed.
    Nothing waits for the one that is kept, but VACUUM. For one thread: two that began at once would each fix a state.
    """

    def __init__(self) -> None:
        self._kept: PoolProxiedConnection | None = None
        self._snapshot = ""

    def join(self, connection: Connection) -> None:
        """Let the transaction that this connection begins see the state; the first one fixes it."""
        if self._kept is None:
            kept = connection.engine.raw_connection()
            try:
                self._snapshot = _lent(kept.driver_connection)
            except BaseException:
                kept.invalidate()
                raise
            self._kept = kept
        driver: Any = connection.connection.driver_connection
        try:
            driver.execute(f"SET TRANSACTION SNAPSHOT '{self._snapshot}'")
        except (errors.InvalidParameterValue, errors.UndefinedObject):
            raise psycopg.OperationalError(
                "the server ended the transaction whose state is looked at; run it again"
            ) from None

    def end(self, _engine: Engine) -> None:
        """Let the state go."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.invalidate()


def _lent(driver: Any) -> str:
    """The name of the snapshot of a transaction that begins here and stays open."""
    driver.isolation_level, driver.read_only = psycopg.IsolationLevel.REPEATABLE_READ, True
    driver.execute("SET LOCAL idle_in_transaction_session_timeout = 0")  # it holds no lock that anybody waits for
    return str(driver.execute("SELECT pg_export_snapshot()").fetchone()[0])


def take_locks(connection: Connection, locks: Sequence[Lock]) -> None:
    """Wait for these locks; they end with the transaction. What is read after it is as the former holders left it:
    each statement of a write transaction sees what was committed before it began."""
    taken = []
    for number, lock in enumerate(in_order(locks)):
        key = bindparam(f"key_{number}", lock.key, BigInteger)
        take = func.pg_advisory_xact_lock_shared if lock.shared else func.pg_advisory_xact_lock
        taken.append(take(key))
    connection.execute(select(*taken))


def see_one_state(connection: Connection) -> None:
    """Let the connection's next transaction read one state of the database from its first statement to its last."""
    connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def is_of_the_database(error: psycopg.Error) -> bool:
    """Whether it says that the database is away, full, locked or not to be used; not that a statement is wrong."""
    return isinstance(
        error,
        psycopg.OperationalError
        | psycopg.InterfaceError
        | errors.ReadOnlySqlTransaction
        | errors.InsufficientPrivilege
        | errors.UndefinedTable
        | errors.UndefinedColumn
        | errors.InvalidSchemaName,
    )


def sentence(error: psycopg.Error) -> str:
    """What happened, and what to do about it."""
    told = str(error).strip().splitlines()
    what = told[0].rstrip(".") if told else type(error).__name__
    if isinstance(error, errors.UndefinedTable | errors.UndefinedColumn):
        return f"There is no ledger in this database, or none of this version ({what}); `gpumeter migrate` makes it."
    if isinstance(error, errors.InsufficientPrivilege):
        return (
            f"The ledger cannot be used: {what}. Whoever owns the schema runs `gpumeter migrate`, and grants this role "
            "what it needs."
        )
    if isinstance(error, errors.DiskFull):
        return f"The ledger cannot be used: its disk is full ({what}). Nothing is lost; give it room."
    return f"The ledger cannot be used: {what}."


def _prepare(connection: Any, _record: Any) -> None:
    _session(connection, SESSION)


def _prepare_read_only(connection: Any, _record: Any) -> None:
    _session(connection, SESSION + "; SET default_transaction_read_only = on")


def _session(connection: Any, statements: str) -> None:
    former, connection.autocommit = connection.autocommit, True
    connection.execute(statements)
    connection.autocommit = former
