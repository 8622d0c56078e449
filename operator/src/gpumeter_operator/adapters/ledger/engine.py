"""Opens the ledger's database, brings its schema up to date, and translates its failures.

Owns transactions, and which database is spoken to: what differs between the two is in `sqlite` and `postgres`, and only
here is it decided which of them it is. Knows no table.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gpumeter_operator.adapters.ledger import postgres, sqlite
from gpumeter_operator.adapters.ledger.locks import Lock

MIGRATIONS = Path(__file__).parent / "migrations"
WRITE_ONE = "sqlite:////var/lib/gpumeter/ledger.db or postgresql://USER:PASSWORD@HOST/DATABASE"


class LedgerUnavailable(Exception):
    """The database cannot be opened, read or written now; the message is a sentence."""


def open_engine(url: str, *, read_only: bool, one_state: bool = False) -> Engine:
    """Connect to `sqlite:///PATH` or `postgresql://...`. Raises LedgerUnavailable; what it says names no password.

    With `one_state` every read transaction sees what the first one saw, until the engine is disposed of; it is for one
    thread then.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise LedgerUnavailable(f"The ledger's URL cannot be read; write {WRITE_ONE}.") from None
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return postgres.open_engine(parsed, read_only=read_only, one_state=one_state)
    if backend != "sqlite" or not parsed.database:
        raise LedgerUnavailable(
            f"The ledger is kept in SQLite or PostgreSQL; {backend} cannot be used. Write {WRITE_ONE}."
        )
    path = Path(parsed.database).absolute()
    if read_only and not path.exists():
        raise LedgerUnavailable(
            f"There is no ledger at {path}. Run this where it is (kubectl -n gpumeter exec deploy/gpumeter-collector "
            "-- gpumeter ...), or name another one with --ledger."
        )
    if not read_only and not path.parent.is_dir():
        raise LedgerUnavailable(f"The folder of the ledger, {path.parent}, does not exist; mount a volume there.")
    return sqlite.open_engine(path, read_only=read_only, one_state=one_state)


def has_one_writer(engine: Engine) -> bool:
    """Whether the database lets one transaction at a time write."""
    return engine.dialect.name == "sqlite"


@contextmanager
def writing(engine: Engine, *locks: Lock) -> Iterator[Connection]:
    """One write transaction: all of it is on disk after the block, or none of it.

    Nobody else writes meanwhile; where `locks` are named, others may, but for what these keep from them (`locks`).
    """
    with translated(), engine.connect().execution_options(writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            postgres.take_locks(connection, locks)
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One read transaction: everything in it sees the same state of the ledger."""
    with translated(), engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            postgres.see_one_state(connection)
        with connection.begin():
            yield connection


@contextmanager
def translated() -> Iterator[None]:
    """Turn what the database raises into LedgerUnavailable, once and only here.

    A sum that leaves 64 bits is a fault of its figures: the ledger is there, and every other query works.
    """
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        if str(error.orig) == "integer overflow":
            raise
        raise LedgerUnavailable(_sentence(error.orig)) from error
    except DatabaseError as error:
        if isinstance(error.orig, sqlite3.DatabaseError) and not isinstance(error.orig, sqlite3.IntegrityError):
            raise LedgerUnavailable(_sentence(error.orig)) from error
        if isinstance(error.orig, psycopg.Error) and postgres.is_of_the_database(error.orig):
            raise LedgerUnavailable(_sentence(error.orig)) from error
        raise
    except psycopg.Error as error:  # from COPY, which goes straight to the driver
        if not postgres.is_of_the_database(error):
            raise
        raise LedgerUnavailable(_sentence(error)) from error
    except PoolTimeout as error:
        raise LedgerUnavailable("The ledger cannot be used: all connections to it are busy.") from error


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


def refuse_other_schema(engine: Engine) -> None:
    """Raise LedgerUnavailable, with what to do, where the tables are not those that this version reads: an earlier one
    left them, or a newer one made them."""
    with reading(engine) as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    known = _schemas()
    if found == known[-1]:
        return
    if found is None:
        raise LedgerUnavailable("There is no ledger in this database; the collector or `gpumeter migrate` makes it.")
    if found in known:
        raise LedgerUnavailable(
            f"The ledger has schema {found}, and this gpumeter reads schema {known[-1]}: start the collector of this "
            "version, which brings it up to date, or run `gpumeter migrate` as the owner of its tables (with its "
            "--grant- options where there are roles)."
        )
    raise LedgerUnavailable(
        f"The ledger was written by a newer version of gpumeter (schema {found}; this one reads {known[-1]}); use that "
        "version."
    )


@cache
def _schemas() -> tuple[str, ...]:
    """Every schema that there was, the newest last."""
    script = ScriptDirectory(str(MIGRATIONS))
    return tuple(str(each.revision) for each in script.walk_revisions())[::-1]


def _sentence(error: BaseException | None) -> str:
    if isinstance(error, psycopg.Error):
        return postgres.sentence(error)
    return f"The ledger cannot be used: {error}."
