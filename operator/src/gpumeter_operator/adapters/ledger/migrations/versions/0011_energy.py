"""What records say of energy and of the cache that sessions held, as columns that can be summed.

Owns the step from the schema before. Rows that are there keep NULL in both: no fact is changed, and the reports that
were made of them are made of them again, byte for byte.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Add the two columns."""
    for name in ("kv_byte_s", "energy_mj"):
        op.add_column("records", sa.Column(name, sa.BigInteger, nullable=True))
