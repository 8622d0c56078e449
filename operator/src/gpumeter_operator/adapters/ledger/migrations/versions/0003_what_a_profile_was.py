"""The parameters behind each profile hash that records name.

Owns the step from the second schema. Profiles of workers that are gone already are not to be had any more.
"""

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the table, and let nobody change it."""
    op.create_table(
        "profiles",
        sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("worker_uid", sa.String(64), nullable=False),
        sa.Column("kept_ns", sa.BigInteger, nullable=False),
    )
    dialect.append_only(op.get_bind(), "profiles")
