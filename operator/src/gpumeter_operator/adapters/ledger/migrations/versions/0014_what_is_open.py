"""What sessions of each boot claim that no account has booked yet, so that a page is judged to the nanosecond.

Owns the step from the schema before. What is open holds of the record `open_seq`: of a boot that is there nobody
counted, nor while a collector of the schema before goes on with it. Its next account may book more than the slices that
come before it from here on, and after that it is exact. `tokens` are counted from here on, too.
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Add the columns."""
    for name in ("open_seq", "open_ns", "open_minute_ns", "tokens"):
        op.add_column("boots", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("boots", sa.Column("open_cut", sa.Boolean, nullable=False, server_default=sa.false()))
