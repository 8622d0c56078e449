"""Of which part of a closed period a correction is: prices may change within it.

Owns the step from the schema before. Corrections that are there keep NULL: they were priced as the beginning of their
period was, and are so for ever.
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Add the column."""
    op.add_column("corrections", sa.Column("part_start_ns", sa.BigInteger, nullable=True))
