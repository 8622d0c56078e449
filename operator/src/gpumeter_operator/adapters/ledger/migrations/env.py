"""Runs the migrations on the connection that the ledger hands over; there is no other way to run them.

Owns one rule for all of them: in PostgreSQL every text sorts by its bytes and may be of any length, as in SQLite, in
whatever language the database was made. Digests are made in the order of names; how long a name may be is decided where
it is judged, with a sentence.
"""

from typing import Any

from alembic import context
from sqlalchemy import Connection, String, Table, event

from gpumeter_operator.adapters.ledger.tables import metadata


def _plain_text(table: Table, connection: Connection, **_: Any) -> None:
    if connection.dialect.name == "postgresql":
        for column in table.columns:
            if isinstance(column.type, String):
                column.type = type(column.type)(collation="C")


event.listen(Table, "before_create", _plain_text)
try:
    context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
    context.run_migrations()
finally:
    event.remove(Table, "before_create", _plain_text)
