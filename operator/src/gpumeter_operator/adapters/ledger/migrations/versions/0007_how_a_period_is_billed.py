"""How a service was billed in a period: by which mode, and to whom it was dedicated.

Owns the step that adds it. Periods that were opened before say nothing, and were billed as measured.
"""

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

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
    dialect.append_only(op.get_bind(), "period_terms")
