"""Days and months: the sums of Final reports, kept as they were published.

Owns the step that adds the table. A day that was over before it was there is summed at the next start.
"""

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the table, and let nobody change it."""
    op.create_table(
        "rollups",
        sa.Column("namespace", sa.String(256), nullable=False),
        sa.Column("service", sa.String(256), nullable=False),
        sa.Column("granularity", sa.String(16), nullable=False),
        sa.Column("period_end_ns", sa.BigInteger, nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("kept_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("namespace", "service", "granularity", "period_end_ns", "tenant"),
    )
    op.create_index("rollups_by_end", "rollups", ["period_end_ns"])
    op.create_index("rollups_by_name", "rollups", ["namespace", "name"])
    dialect.append_only(op.get_bind(), "rollups")
