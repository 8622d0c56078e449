"""Opens the ledger's database, brings its schema up to date, and translates its failures.

Owns connections, transactions and how safely SQLite writes. Knows no table.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_MS = 30_000  # a reader's or another process's lock is waited for; a page takes a tenth of a second


class LedgerUnavailable(Exception):
    """The database cannot be opened, read or written now; the message is a sentence."""


def open_engine(url: str, *, read_only: bool) -> Engine:
    """Connect to `sqlite:///PATH`. Raises LedgerUnavailable."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise LedgerUnavailable(
            "The ledger's URL cannot be read; write sqlite:////var/lib/gpumeter/ledger.db."
        ) from None
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise LedgerUnavailable(
            f"This version keeps the ledger in SQLite only; {parsed.get_backend_name()} cannot be used. "
            "Write sqlite:////var/lib/gpumeter/ledger.db."
        )
    path = Path(parsed.database).absolute()
    if read_only and not path.exists():
        raise LedgerUnavailable(f"There is no ledger at {path}.")
    if not read_only and not path.parent.is_dir():
        raise LedgerUnavailable(f"The folder of the ledger, {path.parent}, does not exist; mount a volume there.")
    target = f"file:{path}?mode=ro&uri=true" if read_only else str(path)
    engine = create_engine(f"sqlite:///{target}", connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
    event.listen(engine, "connect", _prepare_read_only if read_only else _prepare)
    event.listen(engine, "begin", _begin)
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One write transaction: all of it is on disk after the block, or none of it."""
    with translated(), engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One read transaction: everything in it sees the same state of the ledger."""
    with translated(), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def translated() -> Iterator[None]:
    """Turn what the database raises into LedgerUnavailable, once and only here.

    A sum that leaves 64 bits is a fault of its figures: the ledger is there, and every other query works.
    """
    try:
        yield
    except OperationalError as error:
        if str(error.orig) == "integer overflow":
            raise
        raise LedgerUnavailable(f"The ledger cannot be used: {error.orig}.") from error
    except DatabaseError as error:
        if isinstance(error.orig, sqlite3.DatabaseError) and not isinstance(error.orig, sqlite3.IntegrityError):
            raise LedgerUnavailable(f"The ledger cannot be used: {error.orig}.") from error
        raise


def upgrade(engine: Engine) -> None:
    """Bring the schema up to date. Raises LedgerUnavailable where it was made by a newer version."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise LedgerUnavailable(
                f"The ledger was written by a newer version of gpumeter ({error}); install that version, or restore a "
                "backup made before it."
            ) from error


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say, not where the driver guesses
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # what is acknowledged must survive a power cut
    connection.execute("PRAGMA foreign_keys = ON")


def _prepare_read_only(connection: Any, _record: Any) -> None:
    connection.isolation_level = None


def _begin(connection: Connection) -> None:
    # A write transaction takes its lock at once: between reading a cursor and advancing it nobody else may write.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
