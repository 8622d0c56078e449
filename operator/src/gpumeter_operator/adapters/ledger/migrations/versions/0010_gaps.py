"""Gaps: what workers were told to forget and this ledger never had.

Owns the step from the schema before.
"""

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the table, and let nobody change it."""
    op.create_table(
        "gaps",
        sa.Column("worker_uid", sa.String(64), nullable=False),
        sa.Column("boot_id", sa.String(64), nullable=False),
        sa.Column("first_seq", sa.BigInteger, nullable=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("last_hash", sa.String(64), nullable=False),
        sa.Column("after_ns", sa.BigInteger, nullable=False),
        sa.Column("until_ns", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("made_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("worker_uid", "boot_id", "first_seq"),
    )
    dialect.append_only(op.get_bind(), "gaps")
