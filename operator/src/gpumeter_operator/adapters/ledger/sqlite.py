"""The ledger in SQLite: how it is opened, how safely it writes, and how a transaction begins.

Owns what is SQLite's own about connections. Knows no table.
"""

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, StaticPool, create_engine, event

BUSY_TIMEOUT_MS = 30_000  # a reader's or another process's lock is waited for; a page takes a tenth of a second


def open_engine(path: Path, *, read_only: bool, one_state: bool = False) -> Engine:
    """An engine for a file. With `one_state`, which only readers may ask for, every transaction sees what its first one
    saw; it is for one thread."""
    target = f"file:{path}?mode=ro&uri=true" if read_only else str(path)
    how: dict[str, Any] = {"timeout": BUSY_TIMEOUT_MS / 1000}
    if one_state:
        how["factory"] = _NeverEnding
    pool = {"poolclass": StaticPool} if one_state else {}
    engine = create_engine(f"sqlite:///{target}", connect_args=how, **pool)
    event.listen(engine, "connect", _prepare_read_only if read_only else _prepare)
    event.listen(engine, "begin", _begin)
    return engine


class _NeverEnding(sqlite3.Connection):
    """A connection whose first transaction goes on until it is closed. The journal of changes (WAL) grows meanwhile by
    what others write."""

    def commit(self) -> None:
        """Go on."""

    def rollback(self) -> None:
        """Go on: a query that failed changed nothing."""


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say, not where the driver guesses
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # what is acknowledged must survive a power cut
    # A full page of records is 5 MB of log: a checkpoint after each would write the same pages of the index every time.
    connection.execute("PRAGMA wal_autocheckpoint = 8000")
    connection.execute("PRAGMA cache_size = -65536")  # 64 MiB: the leaves of the indexes that many workers grow at once
    connection.execute("PRAGMA foreign_keys = ON")


def _prepare_read_only(connection: Any, _record: Any) -> None:
    connection.isolation_level = None


def _begin(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    if driver.in_transaction:  # of one state, and it has begun
        return
    # A write transaction takes its lock at once: between reading a cursor and advancing it nobody else may write.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
