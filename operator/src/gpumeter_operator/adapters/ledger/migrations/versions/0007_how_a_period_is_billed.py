"""How a service was billed in a period: by which mode, and to whom it was dedicated.

Owns the step that adds it. Periods that were opened before say nothing, and were billed as measured.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the table, and let nobody change it."""
    op.create_table(
        "period_terms",
        sa.Column("namespace", sa.String(256), nullable=False),
        sa.Column("service", sa.String(256), nullable=False),
        sa.Column("end_ns", sa.BigInteger, nullable=False),
        sa.Column("billing_mode", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("namespace", "service", "end_ns"),
    )
    if op.get_bind().dialect.name != "sqlite":
        return  # there the ledger's role may neither update nor delete
    for action in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER period_terms_no_{action.lower()} BEFORE {action} ON period_terms BEGIN "
            f"SELECT RAISE(ABORT, 'the ledger is append-only: {action} on period_terms is refused'); END"
        )
