"""Retention: what was removed is a fact, and nothing else can go. In PostgreSQL, records in partitions by day.

Owns the step from the third schema. A partition holds the periods that end in a UTC day, (start, end]; it is made by
`ledger_make_day`, and removed by `ledger_drop_day`, which refuses while a record in it is not in the log of removals.
Both belong to whoever owns the schema, so the role that collects needs no right to make or drop tables.

PostgreSQL wants a partition's key in every unique key, so (worker_uid, boot_id, seq) is unique within a day only. That
no record is there twice is kept by the chain's cursor instead: `boots` has one row a chain, with a unique key, and a
page's transaction moves it from the seq before the page to the last one, under that row's lock, before it inserts what
lies between. Two that bring the same records wait for each other at that row, and the second finds it moved.
"""

import sqlalchemy as sa
from alembic import op

from gpumeter_operator.adapters.ledger import dialect

revision = "0004"
down_revision = "0003"

DAY_NS = 86_400 * 10**9
EARLY_END_NS = 1_577_836_800 * 10**9  # 2020: what lies before is no day of ours, and is kept in one place
LEAST_DAYS = 90


def upgrade() -> None:
    """Add the log of removals, and what lets only that go which is in it."""
    op.create_table(
        "removals",
        sa.Column("worker_uid", sa.String(64), nullable=False),
        sa.Column("boot_id", sa.String(64), nullable=False),
        sa.Column("day_end_ns", sa.BigInteger, nullable=False),
        sa.Column("first_seq", sa.BigInteger, nullable=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("last_hash", sa.String(64), nullable=False),
        sa.Column("records", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("service", sa.String(256), nullable=False),
        sa.Column("first_end_ns", sa.BigInteger, nullable=False),
        sa.Column("last_end_ns", sa.BigInteger, nullable=False),
        sa.Column("retention_days", sa.BigInteger, nullable=False),
        sa.Column("removed_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("worker_uid", "boot_id", "day_end_ns", "first_seq"),
        sa.CheckConstraint(f"retention_days >= {LEAST_DAYS}", name="removals_keep_90_days"),
        sa.CheckConstraint(f"removed_ns - day_end_ns >= retention_days * {DAY_NS}", name="removals_are_old"),
        sa.CheckConstraint(
            f"last_end_ns <= day_end_ns AND first_end_ns > day_end_ns - {DAY_NS}", name="removals_in_day"
        ),
    )
    op.create_index("removals_by_service", "removals", ["service", "last_end_ns"])
    dialect.append_only(op.get_bind(), "removals")
    if op.get_bind().dialect.name == "sqlite":
        _let_go_what_is_logged()
    else:
        _partition()


def _let_go_what_is_logged() -> None:
    op.execute("DROP TRIGGER records_no_delete")
    dialect.refuse(
        op.get_bind(),
        "records",
        "DELETE",
        "the ledger is append-only: DELETE on records is refused",
        when="NOT EXISTS (SELECT 1 FROM removals r WHERE r.worker_uid = OLD.worker_uid AND r.boot_id = OLD.boot_id "
        "AND OLD.seq BETWEEN r.first_seq AND r.last_seq "
        "AND OLD.booked_end_ns BETWEEN r.first_end_ns AND r.last_end_ns)",
    )


def _partition() -> None:
    for statement in (
        # No released version kept records in PostgreSQL before this one, so there are none to move.
        "ALTER TABLE records RENAME TO records_before",
        "CREATE TABLE records (LIKE records_before) PARTITION BY RANGE (booked_end_ns)",
        "DROP TABLE records_before",
        "ALTER TABLE records ADD PRIMARY KEY (worker_uid, boot_id, seq, booked_end_ns)",
        "CREATE INDEX records_by_period ON records (service, booked_end_ns)",
    ):
        op.execute(statement)
    dialect.append_only(op.get_bind(), "records")
    op.execute(f"CREATE TABLE records_early PARTITION OF records FOR VALUES FROM (MINVALUE) TO ({EARLY_END_NS + 1})")
    _refuse_truncate("records_early")
    # Made beside the ledger and attached: that lets others read and write it meanwhile.
    op.execute(f"""
        CREATE FUNCTION ledger_make_day(day_end_ns bigint) RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS $$
        DECLARE
            name text := 'records_' || to_char(to_timestamp((day_end_ns - {DAY_NS}) / 1000000000) AT TIME ZONE 'UTC',
                                               'YYYYMMDD');
        BEGIN
            IF day_end_ns % {DAY_NS} <> 0 OR day_end_ns <= {EARLY_END_NS} THEN
                RAISE EXCEPTION '% ns is not the end of a UTC day after 2019', day_end_ns;
            END IF;
            PERFORM pg_advisory_xact_lock(hashtext('ledger_make_day'));
            IF to_regclass(format('%I', name)) IS NULL THEN
                EXECUTE format('CREATE TABLE %I (LIKE records)', name);
                EXECUTE format('ALTER TABLE records ATTACH PARTITION %I FOR VALUES FROM (%s) TO (%s)',
                               name, day_end_ns - {DAY_NS} + 1, day_end_ns + 1);
                EXECUTE format('CREATE TRIGGER records_no_truncate BEFORE TRUNCATE ON %I FOR EACH STATEMENT '
                               'EXECUTE FUNCTION ledger_refuse(%L)', name,
                               'the ledger is append-only: TRUNCATE on records is refused');
            END IF;
            RETURN name;
        END $$
    """)
    op.execute(
        f"""
        CREATE FUNCTION ledger_drop_day(day_end_ns bigint) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
        DECLARE
            name text := 'records_' || to_char(to_timestamp((day_end_ns - {DAY_NS}) / 1000000000) AT TIME ZONE 'UTC',
                                               'YYYYMMDD');
            left_over bigint;
        BEGIN
            EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', name);
            EXECUTE format('SELECT count(*) FROM %I r WHERE NOT EXISTS (SELECT 1 FROM removals m WHERE '
                           'm.worker_uid = r.worker_uid AND m.boot_id = r.boot_id AND m.day_end_ns = $1 AND '
                           'r.seq BETWEEN m.first_seq AND m.last_seq AND '
                           'r.booked_end_ns BETWEEN m.first_end_ns AND m.last_end_ns)', name)
                INTO left_over USING day_end_ns;
            IF left_over > 0 THEN
                RAISE EXCEPTION 'the ledger is append-only: % records of % are not in the log of removals',
                    left_over, name USING ERRCODE = 'restrict_violation';
            END IF;
            EXECUTE format('ALTER TABLE records DETACH PARTITION %I', name);
            EXECUTE format('DROP TABLE %I', name);
        END $$
        """  # noqa: S608 - names are made here
    )
    for function in ("ledger_make_day", "ledger_drop_day"):
        op.execute(f"REVOKE ALL ON FUNCTION {function}(bigint) FROM PUBLIC")
        # Whoever calls it must not be able to put other tables or functions in the place of the ledger's.
        op.execute(
            f"DO $$ BEGIN EXECUTE format('ALTER FUNCTION {function}(bigint) SET search_path = %I, pg_temp', "
            "current_schema()); END $$"
        )


def _refuse_truncate(table: str) -> None:
    op.execute(
        f"CREATE TRIGGER records_no_truncate BEFORE TRUNCATE ON {table} FOR EACH STATEMENT "
        "EXECUTE FUNCTION ledger_refuse('the ledger is append-only: TRUNCATE on records is refused')"
    )
