"""The databases that a ledger can be kept in, for tests that must hold in all of them.

Owns an empty database of each kind per test, and the way behind the ledger's back into it. A test asks for `database`
and runs once on each; PostgreSQL is one server a run, copied from a database that is migrated already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text

from gpumeter_operator.adapters.ledger.store import Ledger
from rigs.debian import NoPackages
from rigs.postgres import Server, server

KINDS = ("sqlite", "postgresql")


@dataclass
class Database:
    """One empty database. `file` is where SQLite keeps it; `server` is who keeps it in PostgreSQL."""

    kind: str
    url: str
    file: Path | None = None
    server: Server | None = None
    name: str = ""

    @contextmanager
    def raw(self) -> Iterator[Connection]:
        """A transaction of whoever owns the database: what a clumsy or dishonest hand can do."""
        engine = create_engine(self.url.replace("postgresql://", "postgresql+psycopg://"))
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()

    def run(self, statement: str, **values: object) -> None:
        """One statement behind the ledger's back."""
        with self.raw() as connection:
            connection.execute(text(statement), values)

    def disarm(self) -> None:
        """Take every trigger off, as whoever owns the database can."""
        with self.raw() as connection:
            if self.kind == "sqlite":
                names = connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).scalars()
                for name in names.all():
                    connection.execute(text(f"DROP TRIGGER {name}"))
            else:
                connection.execute(text("SET session_replication_role = replica"))
                tables = (
                    "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace"
                )
                for name in connection.execute(text(tables)).scalars().all():
                    connection.execute(text(f'ALTER TABLE "{name}" DISABLE TRIGGER ALL'))


@dataclass
class Databases:
    """Gives out databases; those of PostgreSQL are removed at the end."""

    server: Server | None
    template: str = ""
    _given: list[str] = field(default_factory=list)

    def fresh(self, kind: str, folder: Path) -> Database:
        """An empty database of a kind. One of PostgreSQL holds the newest schema already, which costs no test time."""
        if kind == "sqlite":
            file = folder / f"ledger-{len(self._given)}.db"
            self._given.append("")
            return Database(kind, f"sqlite:///{file}", file=file)
        assert self.server is not None
        name = self.server.database(self.template)
        self._given.append(name)
        return Database(kind, self.server.url(name), server=self.server, name=name)

    def remove(self) -> None:
        """Drop what was given out since the last time."""
        for name in filter(None, self._given):
            assert self.server is not None
            self.server.drop(name)
        self._given.clear()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server for the whole run; a test that needs it is skipped, with the reason, where there is none."""
    try:
        with server() as running:
            yield running
    except NoPackages as reason:
        pytest.skip(f"PostgreSQL: {reason}")


@pytest.fixture(scope="session")
def migrated(postgres: Server) -> str:
    """The name of a database with the newest schema and nothing in it, to copy from."""
    name = postgres.database(locale="C.UTF-8")
    Ledger(postgres.url(name)).close()
    return name


@pytest.fixture(params=KINDS)
def databases(request: pytest.FixtureRequest) -> Iterator[tuple[str, Databases]]:
    """The kind of this run of the test, and where its databases come from."""
    if request.param == "sqlite":
        yield request.param, Databases(None)
        return
    given = Databases(request.getfixturevalue("postgres"), request.getfixturevalue("migrated"))
    yield request.param, given
    given.remove()


@pytest.fixture
def database(databases: tuple[str, Databases], tmp_path: Path) -> Database:
    """One database of the kind of this run."""
    kind, given = databases
    return given.fresh(kind, tmp_path)
