"""Corrections by hand: what was wrong with a Final report, and who booked the difference in a later period.

Owns the step from the schema before.
"""

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Add the table, and let nobody change it."""
    op.create_table(
        "corrections",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("namespace", sa.String(256), nullable=False),
        sa.Column("service", sa.String(256), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("report", sa.String(256), nullable=False),
        sa.Column("report_digest", sa.String(64), nullable=False),
        sa.Column("closed_start_ns", sa.BigInteger, nullable=False),
        sa.Column("closed_end_ns", sa.BigInteger, nullable=False),
        sa.Column("booked_end_ns", sa.BigInteger, nullable=False),
        sa.Column("gpu_class", sa.String(256), nullable=False),
        sa.Column("gpu_ns", sa.BigInteger, nullable=False),
        sa.Column("plan_name", sa.String(256), nullable=False),
        sa.Column("plan_version", sa.BigInteger, nullable=False),
        sa.Column("plan_hash", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("actor", sa.String(256), nullable=False),
        sa.Column("made_ns", sa.BigInteger, nullable=False),
    )
    op.create_index("corrections_by_period", "corrections", ["namespace", "service", "booked_end_ns"])
    dialect.append_only(op.get_bind(), "corrections")
