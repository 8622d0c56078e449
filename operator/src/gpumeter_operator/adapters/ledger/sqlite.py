"""The ledger in SQLite: how it is opened, how safely it writes, and how a transaction begins.

Owns what is SQLite's own about connections. Knows no table.
"""

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event

BUSY_TIMEOUT_MS = 30_000  # a reader's or another process's lock is waited for; a page takes a tenth of a second


def open_engine(path: Path, *, read_only: bool) -> Engine:
    """An engine for a file."""
    target = f"file:{path}?mode=ro&uri=true" if read_only else str(path)
    engine = create_engine(f"sqlite:///{target}", connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
    event.listen(engine, "connect", _prepare_read_only if read_only else _prepare)
    event.listen(engine, "begin", _begin)
    return engine


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
    # A write transaction takes its lock at once: between reading a cursor and advancing it nobody else may write.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
