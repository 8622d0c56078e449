"""Digests: a signed chain over everything that is Final, the facts that each covers, and the keys that signed.

Owns the step from the schema before. The indexes are by when a row came: what no digest covers yet is looked for among
the newest rows only.
"""

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

revision = "0008"
down_revision = "0007"

CAME = {
    "adjustments": "made_ns",
    "alarms": "raised_ns",
    "containers": "observed_ns",
    "period_terms": "end_ns",
    "periods": "opened_ns",
    "plan_observations": "observed_ns",
    "pod_accounts": "period_end_ns",
    "reports": "kept_ns",
    "rollups": "kept_ns",
    "workers": "first_seen_ns",
}


def upgrade() -> None:
    """Add three tables, and let nobody change them."""
    op.create_table(
        "digests",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("namespace", sa.String(256), nullable=False),
        sa.Column("service", sa.String(256), nullable=False),
        sa.Column("period_end_ns", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("signature", sa.String(128), nullable=False),
    )
    op.create_index("digests_by_period", "digests", ["namespace", "service", "period_end_ns"])
    op.create_table(
        "digest_facts",
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("of_table", sa.String(64), nullable=False),
        sa.Column("row_key", sa.Text, nullable=False),
        sa.Column("line", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("seq", "position"),
        sa.UniqueConstraint("of_table", "row_key"),
    )
    op.create_table(
        "signing_keys",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("public_der", sa.LargeBinary, nullable=False),
        sa.Column("first_used_ns", sa.BigInteger, nullable=False),
    )
    for table, column in CAME.items():
        op.create_index(f"{table}_by_coming", table, [column])
    for table in ("digests", "digest_facts", "signing_keys"):
        dialect.append_only(op.get_bind(), table)
