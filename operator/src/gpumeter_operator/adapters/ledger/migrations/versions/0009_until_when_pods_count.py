"""Until when each pod may matter to a period: a round of closing finds its pods by it, however many came and went.

Owns the step from the schema before. It is state that follows from `workers` and `containers`, and the database itself
keeps it: a collector of an older version, which does not know of it, cannot leave it behind.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

FOR_EVER_NS = 2**63 - 1
UNTIL = f"""
    CASE WHEN EXISTS (SELECT 1 FROM containers c WHERE c.worker_uid = {{uid}} AND c.container_id = ''
                      AND c.event = 'gone')
    THEN coalesce((SELECT max(c.at_ns) FROM containers c WHERE c.worker_uid = {{uid}}
                   AND c.event IN ('ended', 'vanished')), 0)
    ELSE {FOR_EVER_NS} END
"""  # noqa: S608 - no name or number comes from outside
BEGINS = f"INSERT INTO lives VALUES (NEW.worker_uid, NEW.namespace, NEW.service, {FOR_EVER_NS})"  # noqa: S608
ENDS = f"UPDATE lives SET until_ns = {UNTIL.format(uid='NEW.worker_uid')} WHERE worker_uid = NEW.worker_uid"  # noqa: S608


def upgrade() -> None:
    """Add the table, fill it, and let the database keep it."""
    op.create_table(
        "lives",
        sa.Column("worker_uid", sa.String(64), primary_key=True),
        sa.Column("namespace", sa.String(256), nullable=False),
        sa.Column("service", sa.String(256), nullable=False),
        sa.Column("until_ns", sa.BigInteger, nullable=False),
    )
    op.create_index("lives_by_service", "lives", ["namespace", "service", "until_ns"])
    op.execute(
        f"INSERT INTO lives SELECT w.worker_uid, w.namespace, w.service, {UNTIL.format(uid='w.worker_uid')} "  # noqa: S608
        "FROM workers w"
    )
    for table, name, statement in (("workers", "lives_begin", BEGINS), ("containers", "lives_end", ENDS)):
        if op.get_bind().dialect.name == "sqlite":
            op.execute(f"CREATE TRIGGER {name} AFTER INSERT ON {table} BEGIN {statement}; END")
            continue
        # As the schema's owner: who collects needs no right to change what follows from facts.
        op.execute(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS "
            f"$$ BEGIN {statement}; RETURN NULL; END $$"
        )
        op.execute(
            f"DO $$ BEGIN EXECUTE format('ALTER FUNCTION {name}() SET search_path = %I, pg_temp', current_schema()); "
            "END $$"
        )
        op.execute(f"REVOKE ALL ON FUNCTION {name}() FROM PUBLIC")
        op.execute(f"CREATE TRIGGER {name} AFTER INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()")
