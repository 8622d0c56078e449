"""Corrections of tokens: what standard rates billed is corrected as it was billed.

Owns the step from the schema before. Corrections that are there are of time, and keep NULL.
"""

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("corrections", sa.Column("model", dialect.text_type(op.get_bind(), 256), nullable=True))
    for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
        op.add_column("corrections", sa.Column(name, sa.BigInteger, nullable=True))
