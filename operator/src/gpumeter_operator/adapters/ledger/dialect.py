"""Statements that the two databases write in two ways.

Owns the choice between them, by the connection that is to run them. Knows no table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, String, Table
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert


def keep_first(connection: Connection, table: Table, values: Mapping[str, Any]) -> bool:
    """Insert a row unless its key is there already, and then leave that as it is; returns whether it is new."""
    statement = _insert(connection)(table).values(values).on_conflict_do_nothing()
    # Of an INSERT the count is forgotten unless it is asked for.
    return connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount == 1


def keep_first_of_each(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same for many rows, in one statement."""
    if rows:
        connection.execute(_insert(connection)(table).on_conflict_do_nothing(), rows)


def text_type(connection: Connection, chars: int) -> String:
    """Of a text column that is added to a table: in PostgreSQL it sorts by its bytes, like those of new tables."""
    return String(collation="C") if connection.dialect.name == "postgresql" else String(chars)


def put(connection: Connection, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Insert a row of state, or replace its values."""
    statement = _insert(connection)(table).values({**key, **values})
    connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=values))


def append_only(connection: Connection, table: str) -> None:
    """Let the database itself refuse to change or delete the rows of a table; for migrations."""
    for action in ("UPDATE", "DELETE"):
        refuse(connection, table, action, f"the ledger is append-only: {action} on {table} is refused")
    if connection.dialect.name == "postgresql":
        message = f"the ledger is append-only: TRUNCATE on {table} is refused"
        connection.exec_driver_sql(
            f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} FOR EACH STATEMENT "
            f"EXECUTE FUNCTION ledger_refuse('{message}')"
        )


def refuse(connection: Connection, table: str, action: str, message: str, *, when: str = "", name: str = "") -> None:
    """Let the database refuse an UPDATE or DELETE of a row `when` a condition on NEW and OLD holds; for migrations."""
    name = name or f"{table}_no_{action.lower()}"
    if connection.dialect.name == "sqlite":
        condition = f"WHEN {when} " if when else ""
        connection.exec_driver_sql(
            f"CREATE TRIGGER {name} BEFORE {action} ON {table} {condition}BEGIN SELECT RAISE(ABORT, '{message}'); END"
        )
        return
    connection.exec_driver_sql(
        "CREATE OR REPLACE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION USING MESSAGE = TG_ARGV[0], ERRCODE = 'restrict_violation'; END $$"
    )
    condition = f"WHEN ({when}) " if when else ""
    connection.exec_driver_sql(
        f"CREATE TRIGGER {name} BEFORE {action} ON {table} FOR EACH ROW {condition}"
        f"EXECUTE FUNCTION ledger_refuse('{message}')"
    )


def _insert(connection: Connection) -> Any:
    return sqlite_insert if connection.dialect.name == "sqlite" else postgres_insert
