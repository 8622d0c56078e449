"""What each boot has claimed so far, and when each version of a price plan was seen in force.

Owns the step from the first schema. A boot that was there before counts from here on. `heard_ns` goes: nobody read it.
"""

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the two sums and the log of plans; drop what nobody reads."""
    for name in ("accounts_ns", "slices_ns"):
        op.add_column("boots", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.drop_column("progress", "heard_ns")
    op.create_table(
        "plan_observations",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("observed_ns", sa.BigInteger, nullable=False),
    )
    op.create_index("plan_observations_by_name", "plan_observations", ["name", "observed_ns"])
    op.execute(
        "INSERT INTO plan_observations (name, hash, observed_ns) "
        "SELECT name, hash, observed_ns FROM price_plans ORDER BY observed_ns"
    )
    dialect.append_only(op.get_bind(), "plan_observations")
