"""The ledger's tables.

Owns names, types and keys; the migrations create exactly these (a test compares them). Times are UTC nanoseconds.

Facts (never updated, never deleted; triggers in the database refuse it): records, workers, containers, periods,
period_terms, price_plans, plan_observations, granularities, reports, rollups, pod_accounts, adjustments, alarms,
profiles, digests, digest_facts, signing_keys, removals, gaps, corrections.
State (follows from facts, may be rebuilt): boots (the cursor of each chain), progress (how far each worker is settled),
lives (until when each pod may matter to a period; the database keeps it by triggers), collectors (who works on it now).
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

_ID = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only for INTEGER
_UID = String(64)
_HASH = String(64)
_NAME = String(256)

records = Table(
    "records",
    metadata,
    Column("worker_uid", _UID, nullable=False),
    Column("boot_id", _UID, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("hash", _HASH, nullable=False),
    Column("body", LargeBinary, nullable=False),  # as received; the columns below are read from it
    Column("service", _NAME, nullable=False),
    Column("booked_end_ns", BigInteger, nullable=False),  # the end of the period in which it is billed
    Column("ended_at", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("account", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("session_id", _NAME, nullable=False),
    Column("clock", String(32), nullable=False),
    Column("gpu_ns", BigInteger, nullable=False),
    Column("prefill_ns", BigInteger, nullable=False),
    Column("decode_ns", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("batch_ns", BigInteger, nullable=False),
    Column("kv_byte_s", BigInteger),  # NULL in rows of an earlier schema
    Column("energy_mj", BigInteger),  # NULL where the record states none
    PrimaryKeyConstraint("worker_uid", "boot_id", "seq"),
)
Index("records_by_period", records.c.service, records.c.booked_end_ns)

boots = Table(
    "boots",
    metadata,
    Column("worker_uid", _UID, nullable=False),
    Column("boot_id", _UID, nullable=False),
    Column("started_ns", BigInteger, nullable=False),
    Column("committed_seq", BigInteger, nullable=False),
    Column("head_hash", _HASH, nullable=False),
    Column("seal", String(16), nullable=False),  # "" while the chain is open
    Column("sealed_ns", BigInteger, nullable=False),
    Column("accounts_ns", BigInteger, nullable=False),  # claimed so far by account records, and by sessions' slices
    Column("slices_ns", BigInteger, nullable=False),
    Column("open_seq", BigInteger, nullable=False),  # of which record the next three hold: of no other than the last
    Column("open_ns", BigInteger, nullable=False),  # of slices that no account has booked yet, the end of the minute in
    Column("open_minute_ns", BigInteger, nullable=False),  # which they end, and whether there may be more before them
    Column("open_cut", Boolean, nullable=False),
    Column("tokens", BigInteger, nullable=False),  # that its sessions computed
    PrimaryKeyConstraint("worker_uid", "boot_id"),
)

progress = Table(
    "progress",
    metadata,
    Column("worker_uid", _UID, primary_key=True),
    Column("settled_ns", BigInteger, nullable=False),
    Column("problem", Text, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("worker_uid", _UID, primary_key=True),
    Column("namespace", _NAME, nullable=False),
    Column("service", _NAME, nullable=False),
    Column("service_uid", _UID, nullable=False),
    Column("model", _NAME, nullable=False),
    Column("gpu_class", _NAME, nullable=False),
    Column("devices", Integer, nullable=False),
    Column("pod", _NAME, nullable=False),
    Column("first_seen_ns", BigInteger, nullable=False),
)
Index("workers_by_service", workers.c.namespace, workers.c.service)

containers = Table(
    "containers",
    metadata,
    Column("worker_uid", _UID, nullable=False),
    Column("container_id", _NAME, nullable=False),  # "" where it is about the pod as a whole
    Column("event", String(16), nullable=False),  # started, ended, vanished, gone
    Column("at_ns", BigInteger, nullable=False),
    Column("observed_ns", BigInteger, nullable=False),
    PrimaryKeyConstraint("worker_uid", "container_id", "event"),
)

lives = Table(
    "lives",
    metadata,
    Column("worker_uid", _UID, primary_key=True),
    Column("namespace", _NAME, nullable=False),
    Column("service", _NAME, nullable=False),
    Column("until_ns", BigInteger, nullable=False),  # the last end of its containers; 2^63 - 1 until it was seen to go
)
Index("lives_by_service", lives.c.namespace, lives.c.service, lives.c.until_ns)

granularities = Table(
    "granularities",
    metadata,
    Column("effective_from_ns", BigInteger, primary_key=True, autoincrement=False),
    Column("granularity", String(16), nullable=False),
    Column("set_ns", BigInteger, nullable=False),
)

price_plans = Table(
    "price_plans",
    metadata,
    Column("name", _NAME, nullable=False),
    Column("hash", _HASH, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("spec", LargeBinary, nullable=False),
    Column("observed_ns", BigInteger, nullable=False),
    PrimaryKeyConstraint("name", "hash"),
)

plan_observations = Table(
    "plan_observations",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("name", _NAME, nullable=False),
    Column("hash", _HASH, nullable=False),  # of the version that was seen in force from then on; "" where it was gone
    Column("observed_ns", BigInteger, nullable=False),
)
Index("plan_observations_by_name", plan_observations.c.name, plan_observations.c.observed_ns)

periods = Table(
    "periods",
    metadata,
    Column("namespace", _NAME, nullable=False),
    Column("service", _NAME, nullable=False),
    Column("end_ns", BigInteger, nullable=False),
    Column("start_ns", BigInteger, nullable=False),
    Column("granularity", String(16), nullable=False),
    Column("plan_name", _NAME, nullable=False),
    Column("plan_hash", _HASH, nullable=False),  # "" where no plan was there when the period was opened
    Column("opened_ns", BigInteger, nullable=False),
    PrimaryKeyConstraint("namespace", "service", "end_ns"),
)

period_terms = Table(
    "period_terms",
    metadata,
    Column("namespace", _NAME, nullable=False),
    Column("service", _NAME, nullable=False),
    Column("end_ns", BigInteger, nullable=False),
    Column("billing_mode", String(16), nullable=False),
    Column("owner", String(64), nullable=False),  # the tenant to whom the service was dedicated; "" for none
    PrimaryKeyConstraint("namespace", "service", "end_ns"),
)

reports = Table(
    "reports",
    metadata,
    Column("namespace", _NAME, nullable=False),
    Column("service", _NAME, nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("period_end_ns", BigInteger, nullable=False),
    Column("phase", String(16), nullable=False),  # the first version of each phase is kept; there is one Final
    Column("name", _NAME, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("digest", _HASH, nullable=False),  # SHA-256 of body
    Column("kept_ns", BigInteger, nullable=False),
    PrimaryKeyConstraint("namespace", "service", "tenant", "period_end_ns", "phase"),
)
Index("reports_by_end", reports.c.phase, reports.c.period_end_ns)
Index("reports_by_name", reports.c.namespace, reports.c.name)

rollups = Table(
    "rollups",
    metadata,
    Column("namespace", _NAME, nullable=False),
    Column("service", _NAME, nullable=False),
    Column("granularity", String(16), nullable=False),  # Day or Month; these are Final, others are not kept
    Column("period_end_ns", BigInteger, nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("name", _NAME, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("digest", _HASH, nullable=False),  # SHA-256 of body
    Column("kept_ns", BigInteger, nullable=False),
    PrimaryKeyConstraint("namespace", "service", "granularity", "period_end_ns", "tenant"),
)
Index("rollups_by_end", rollups.c.period_end_ns)
Index("rollups_by_name", rollups.c.namespace, rollups.c.name)

pod_accounts = Table(
    "pod_accounts",
    metadata,
    Column("worker_uid", _UID, nullable=False),
    Column("period_end_ns", BigInteger, nullable=False),
    *(
        Column(name, BigInteger, nullable=False)
        for name in (
            "allocated",
            "init",
            "load",
            "warmup",
            "attributed",
            "nonbillable",
            "idle",
            "drain",
            "unaccounted",
            "host_gap",
        )
    ),
    PrimaryKeyConstraint("worker_uid", "period_end_ns"),
)

adjustments = Table(
    "adjustments",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("kind", String(16), nullable=False),  # records: late ones; allocation: a span of a closed period changed
    Column("namespace", _NAME, nullable=False),
    Column("service", _NAME, nullable=False),
    Column("worker_uid", _UID, nullable=False),
    Column("boot_id", _UID, nullable=False),
    Column("first_seq", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("closed_end_ns", BigInteger, nullable=False),  # the end of the Final period to which it would have belonged
    Column("booked_end_ns", BigInteger, nullable=False),  # the end of the period in which it is booked instead
    Column("allocated_ns", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("made_ns", BigInteger, nullable=False),
)
Index("adjustments_by_period", adjustments.c.namespace, adjustments.c.service, adjustments.c.booked_end_ns)

alarms = Table(
    "alarms",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("reason", String(64), nullable=False),
    Column("worker_uid", _UID, nullable=False),
    Column("boot_id", _NAME, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("ended_at", BigInteger, nullable=False),  # of the record it is about; 0 where it is about none
    Column("our_hash", _HASH, nullable=False),
    Column("their_hash", _HASH, nullable=False),
    Column("their_body", LargeBinary, nullable=False),
    Column("message", Text, nullable=False),
    Column("fingerprint", _HASH, nullable=False),  # the same trouble is one alarm, however often it is met
    Column("raised_ns", BigInteger, nullable=False),
    UniqueConstraint("fingerprint"),
)
Index("alarms_by_worker", alarms.c.worker_uid)

profiles = Table(
    "profiles",
    metadata,
    Column("hash", _HASH, primary_key=True),  # SHA-256 of body; records name it
    Column("body", LargeBinary, nullable=False),  # canonical JSON of the parameters
    Column("worker_uid", _UID, nullable=False),  # who told it first
    Column("kept_ns", BigInteger, nullable=False),
)

collectors = Table(
    "collectors",
    metadata,
    Column("member_id", _UID, primary_key=True),
    Column("name", _NAME, nullable=False),
    Column("joined_ns", BigInteger, nullable=False),  # both by the database's clock
    Column("seen_ns", BigInteger, nullable=False),
)

digests = Table(
    "digests",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("namespace", _NAME, nullable=False),  # these three as in the body; "" and 0 where it is of no period
    Column("service", _NAME, nullable=False),
    Column("period_end_ns", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),  # what is signed
    Column("digest", _HASH, nullable=False),  # SHA-256 of body
    Column("signature", String(128), nullable=False),
)
Index("digests_by_period", digests.c.namespace, digests.c.service, digests.c.period_end_ns)

digest_facts = Table(
    "digest_facts",
    metadata,
    Column("seq", BigInteger, nullable=False),  # of the digest that covers the fact
    Column("position", BigInteger, nullable=False),  # of its leaf, from 0
    Column("of_table", _UID, nullable=False),
    Column("row_key", Text, nullable=False),  # the values of its primary key, with spaces between
    Column("line", LargeBinary, nullable=False),  # what is hashed: the row as it was
    PrimaryKeyConstraint("seq", "position"),
    UniqueConstraint("of_table", "row_key"),
)

signing_keys = Table(
    "signing_keys",
    metadata,
    Column("key_id", _HASH, primary_key=True),  # SHA-256 of public_der
    Column("public_der", LargeBinary, nullable=False),
    Column("first_used_ns", BigInteger, nullable=False),
)

# What no digest covers yet is looked for among the rows that came last.
for _came in (
    adjustments.c.made_ns,
    alarms.c.raised_ns,
    containers.c.observed_ns,
    period_terms.c.end_ns,
    periods.c.opened_ns,
    plan_observations.c.observed_ns,
    pod_accounts.c.period_end_ns,
    reports.c.kept_ns,
    rollups.c.kept_ns,
    workers.c.first_seen_ns,
):
    Index(f"{_came.table.name}_by_coming", _came)
removals = Table(
    "removals",
    metadata,
    Column("worker_uid", _UID, nullable=False),
    Column("boot_id", _UID, nullable=False),
    Column("day_end_ns", BigInteger, nullable=False),
    Column("first_seq", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("last_hash", _HASH, nullable=False),  # of the last record that went: what follows is chained to it
    Column("records", BigInteger, nullable=False),
    Column("digest", _HASH, nullable=False),  # SHA-256 over the hashes of what went, in the order of seq
    Column("service", _NAME, nullable=False),
    Column("first_end_ns", BigInteger, nullable=False),  # of the periods in which they were booked
    Column("last_end_ns", BigInteger, nullable=False),
    Column("retention_days", BigInteger, nullable=False),
    Column("removed_ns", BigInteger, nullable=False),
    PrimaryKeyConstraint("worker_uid", "boot_id", "day_end_ns", "first_seq"),
)
Index("removals_by_service", removals.c.service, removals.c.last_end_ns)

gaps = Table(
    "gaps",
    metadata,
    Column("worker_uid", _UID, nullable=False),
    Column("boot_id", _UID, nullable=False),
    Column("first_seq", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("last_hash", _HASH, nullable=False),  # as the worker stated it: what follows is chained to it
    Column("after_ns", BigInteger, nullable=False),  # what they booked ended after this, and
    Column("until_ns", BigInteger, nullable=False),  # at this time at the latest
    Column("reason", Text, nullable=False),
    Column("made_ns", BigInteger, nullable=False),
    PrimaryKeyConstraint("worker_uid", "boot_id", "first_seq"),
)

corrections = Table(
    "corrections",
    metadata,
    Column("id", _UID, primary_key=True),  # given by whoever booked it, or derived from what it says
    Column("namespace", _NAME, nullable=False),
    Column("service", _NAME, nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("report", _NAME, nullable=False),  # the name of the Final report that it corrects
    Column("report_digest", _HASH, nullable=False),  # SHA-256 of that report's bytes
    Column("closed_start_ns", BigInteger, nullable=False),  # the period of that report
    Column("closed_end_ns", BigInteger, nullable=False),
    Column("booked_end_ns", BigInteger, nullable=False),  # the end of the period in which it is booked
    Column("gpu_class", _NAME, nullable=False),
    Column("gpu_ns", BigInteger, nullable=False),  # to the tenant's time; the platform's share moves the other way
    Column("plan_name", _NAME, nullable=False),  # the version of the price plan that prices it
    Column("plan_version", BigInteger, nullable=False),
    Column("plan_hash", _HASH, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", _NAME, nullable=False),
    Column("made_ns", BigInteger, nullable=False),
    Column("part_start_ns", BigInteger),  # of the part whose price it has; NULL before 0013: the period's first
    Column("model", _NAME),  # of tokens that it is of, where standard rates billed them; NULL where it is of time
    Column("prompt_tokens", BigInteger),
    Column("cached_tokens", BigInteger),
    Column("completion_tokens", BigInteger),
)
Index("corrections_by_period", corrections.c.namespace, corrections.c.service, corrections.c.booked_end_ns)

FACTS = (
    records,
    workers,
    containers,
    granularities,
    price_plans,
    plan_observations,
    periods,
    period_terms,
    reports,
    rollups,
    pod_accounts,
    adjustments,
    alarms,
    profiles,
    digests,
    digest_facts,
    signing_keys,
    removals,
    gaps,
    corrections,
)
