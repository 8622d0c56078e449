"""Runs the migrations on the connection that the ledger hands over; there is no other way to run them."""

from alembic import context

from gpumeter_operator.adapters.ledger.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
