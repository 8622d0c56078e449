"""The first ledger: facts that only grow, and the cursors beside them.

Owns the schema as of this version, written out in full: it must not change when the tables of a later version do.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

revision = "0001"
down_revision = None

UID = sa.String(64)
HASH = sa.String(64)
NAME = sa.String(256)
ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")

FACTS = (
    "records",
    "workers",
    "containers",
    "granularities",
    "price_plans",
    "periods",
    "reports",
    "pod_accounts",
    "adjustments",
    "alarms",
)


def upgrade() -> None:
    """Create everything."""
    _create_records()
    _create_pods()
    _create_periods()
    _create_exceptions()
    _forbid_changes()


def _column(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False)


def _big(*names: str) -> list[sa.Column[Any]]:
    return [_column(name, sa.BigInteger) for name in names]


def _create_records() -> None:
    op.create_table(
        "records",
        _column("worker_uid", UID),
        _column("boot_id", UID),
        _column("seq", sa.BigInteger),
        _column("hash", HASH),
        _column("body", sa.LargeBinary),
        _column("service", NAME),
        *_big("booked_end_ns", "ended_at"),
        _column("kind", sa.String(16)),
        _column("account", sa.String(16)),
        _column("status", sa.String(16)),
        _column("tenant", sa.String(64)),
        _column("session_id", NAME),
        _column("clock", sa.String(32)),
        *_big("gpu_ns", "prefill_ns", "decode_ns", "prompt_tokens", "cached_tokens", "completion_tokens", "batch_ns"),
        sa.PrimaryKeyConstraint("worker_uid", "boot_id", "seq"),
    )
    op.create_index("records_by_period", "records", ["service", "booked_end_ns"])
    op.create_table(
        "boots",
        _column("worker_uid", UID),
        _column("boot_id", UID),
        _column("started_ns", sa.BigInteger),
        _column("committed_seq", sa.BigInteger),
        _column("head_hash", HASH),
        _column("seal", sa.String(16)),
        _column("sealed_ns", sa.BigInteger),
        sa.PrimaryKeyConstraint("worker_uid", "boot_id"),
    )
    op.create_table(
        "progress",
        sa.Column("worker_uid", UID, primary_key=True),
        *_big("settled_ns", "heard_ns"),
        _column("problem", sa.Text),
    )


def _create_pods() -> None:
    op.create_table(
        "workers",
        sa.Column("worker_uid", UID, primary_key=True),
        _column("namespace", NAME),
        _column("service", NAME),
        _column("service_uid", UID),
        _column("model", NAME),
        _column("gpu_class", NAME),
        _column("devices", sa.Integer),
        _column("pod", NAME),
        _column("first_seen_ns", sa.BigInteger),
    )
    op.create_index("workers_by_service", "workers", ["namespace", "service"])
    op.create_table(
        "containers",
        _column("worker_uid", UID),
        _column("container_id", NAME),
        _column("event", sa.String(16)),
        *_big("at_ns", "observed_ns"),
        sa.PrimaryKeyConstraint("worker_uid", "container_id", "event"),
    )


def _create_periods() -> None:
    op.create_table(
        "granularities",
        sa.Column("effective_from_ns", sa.BigInteger, primary_key=True, autoincrement=False),
        _column("granularity", sa.String(16)),
        _column("set_ns", sa.BigInteger),
    )
    op.create_table(
        "price_plans",
        _column("name", NAME),
        _column("hash", HASH),
        _column("version", sa.BigInteger),
        _column("spec", sa.LargeBinary),
        _column("observed_ns", sa.BigInteger),
        sa.PrimaryKeyConstraint("name", "hash"),
    )
    op.create_table(
        "periods",
        _column("namespace", NAME),
        _column("service", NAME),
        *_big("end_ns", "start_ns"),
        _column("granularity", sa.String(16)),
        _column("plan_name", NAME),
        _column("plan_hash", HASH),
        _column("opened_ns", sa.BigInteger),
        sa.PrimaryKeyConstraint("namespace", "service", "end_ns"),
    )
    op.create_table(
        "reports",
        _column("namespace", NAME),
        _column("service", NAME),
        _column("tenant", sa.String(64)),
        _column("period_end_ns", sa.BigInteger),
        _column("phase", sa.String(16)),
        _column("name", NAME),
        _column("body", sa.LargeBinary),
        _column("digest", HASH),
        _column("kept_ns", sa.BigInteger),
        sa.PrimaryKeyConstraint("namespace", "service", "tenant", "period_end_ns", "phase"),
    )
    op.create_index("reports_by_end", "reports", ["phase", "period_end_ns"])
    op.create_index("reports_by_name", "reports", ["namespace", "name"])
    op.create_table(
        "pod_accounts",
        _column("worker_uid", UID),
        *_big("period_end_ns", "allocated", "init", "load", "warmup", "attributed", "nonbillable", "idle", "drain"),
        *_big("unaccounted", "host_gap"),
        sa.PrimaryKeyConstraint("worker_uid", "period_end_ns"),
    )


def _create_exceptions() -> None:
    op.create_table(
        "adjustments",
        sa.Column("id", ID, primary_key=True),
        _column("kind", sa.String(16)),
        _column("namespace", NAME),
        _column("service", NAME),
        _column("worker_uid", UID),
        _column("boot_id", UID),
        *_big("first_seq", "last_seq", "closed_end_ns", "booked_end_ns", "allocated_ns"),
        _column("reason", sa.Text),
        _column("made_ns", sa.BigInteger),
    )
    op.create_index("adjustments_by_period", "adjustments", ["namespace", "service", "booked_end_ns"])
    op.create_table(
        "alarms",
        sa.Column("id", ID, primary_key=True),
        _column("reason", sa.String(64)),
        _column("worker_uid", UID),
        _column("boot_id", NAME),
        *_big("seq", "ended_at"),
        _column("our_hash", HASH),
        _column("their_hash", HASH),
        _column("their_body", sa.LargeBinary),
        _column("message", sa.Text),
        _column("fingerprint", HASH),
        _column("raised_ns", sa.BigInteger),
        sa.UniqueConstraint("fingerprint"),
    )
    op.create_index("alarms_by_worker", "alarms", ["worker_uid"])


def _forbid_changes() -> None:
    connection = op.get_bind()
    for table in FACTS:
        dialect.append_only(connection, table)
    dialect.refuse(
        connection,
        "boots",
        "UPDATE",
        "a cursor only moves forward, and never beyond a seal",
        when="NEW.committed_seq <= OLD.committed_seq OR OLD.seal <> ''",
        name="boots_only_forward",
    )
    dialect.refuse(connection, "boots", "DELETE", "the ledger is append-only: DELETE on boots is refused")
