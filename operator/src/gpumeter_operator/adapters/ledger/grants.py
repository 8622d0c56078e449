"""What the roles of a PostgreSQL ledger may do: whoever owns the schema grants, the collector adds, others read.

Owns the grants. The roles themselves are the database administrator's. The owner can do everything, and is needed for
migrations only; the collector's role can change or remove no fact, with or without the triggers.
"""

from collections.abc import Sequence

from sqlalchemy import Connection

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable, open_engine, upgrade, writing
from gpumeter_operator.adapters.ledger.tables import FACTS, metadata

FUNCTIONS = ("ledger_make_day(bigint)", "ledger_drop_day(bigint)")


def migrate(url: str, collectors: Sequence[str] = (), readers: Sequence[str] = ()) -> None:
    """Bring the schema up to date as its owner, and grant these roles what they need; may be repeated.

    Raises LedgerUnavailable.
    """
    engine = open_engine(url, read_only=False)
    try:
        upgrade(engine)
        if not collectors and not readers:
            return
        if engine.dialect.name != "postgresql":
            raise LedgerUnavailable("SQLite knows no roles: whoever may write the file may do everything.")
        with writing(engine) as connection:
            for role in collectors:
                _to_collector(connection, _quoted(connection, role))
            for role in readers:
                _to_reader(connection, _quoted(connection, role))
    finally:
        engine.dispose()


def _to_collector(connection: Connection, role: str) -> None:
    _to_reader(connection, role)
    facts = {table.name for table in FACTS}
    for name in metadata.tables:
        rights = "SELECT, INSERT" if name in facts else "SELECT, INSERT, UPDATE"
        connection.exec_driver_sql(f"GRANT {rights} ON TABLE {name} TO {role}")
    connection.exec_driver_sql(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {_schema(connection)} TO {role}")
    for function in FUNCTIONS:
        connection.exec_driver_sql(f"GRANT EXECUTE ON FUNCTION {function} TO {role}")


def _to_reader(connection: Connection, role: str) -> None:
    schema = _schema(connection)
    connection.exec_driver_sql(f"REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM {role}")
    connection.exec_driver_sql(f"REVOKE CREATE ON SCHEMA {schema} FROM {role}")
    connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
    for name in (*metadata.tables, "alembic_version"):  # through a table its partitions are read, and only so
        connection.exec_driver_sql(f"GRANT SELECT ON TABLE {name} TO {role}")


def _schema(connection: Connection) -> str:
    return _quoted(connection, str(connection.exec_driver_sql("SELECT current_schema()").scalar_one()))


def _quoted(connection: Connection, name: str) -> str:
    return connection.dialect.identifier_preparer.quote_identifier(name)
