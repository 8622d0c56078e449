"""What sessions of each boot claim that no account has booked yet, so that a page is judged to the nanosecond.

Owns the step from the schema before. Of a boot that is there nobody counted: its next account may book more than the
slices that come before it from here on, and after that it is exact.
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Add the columns."""
    for name in ("open_ns", "open_minute_ns"):
        op.add_column("boots", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("boots", sa.Column("open_cut", sa.Boolean, nullable=False, server_default=sa.true()))
