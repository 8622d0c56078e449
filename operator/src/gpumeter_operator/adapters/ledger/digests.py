"""Digests in the ledger: what is due, the transaction that makes one, and reading them again.

Owns the access to the tables digests, digest_facts and signing_keys, and which rows of other tables no digest covers
yet. What an entry says and how it is hashed is billing's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Table,
    Text,
    and_,
    cast,
    exists,
    func,
    insert,
    literal,
    not_,
    select,
)
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.engine import reading, writing
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.digest import Digest, Entry, canonical_entry, fact_line
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.merkle import Tree
from gpumeter_operator.billing.signing import SigningKey
from gpumeter_usage.chain import GENESIS
from gpumeter_usage.period import SECOND_NS

OWN = (t.records, t.digests, t.digest_facts)
"""Records have a root of their own; digests are what covers."""

COVERED: tuple[Table, ...] = tuple(
    sorted((table for table in t.FACTS if table not in OWN), key=lambda table: table.name)
)
"""The tables whose rows are facts of a digest."""

CAME = {
    "adjustments": "made_ns",
    "alarms": "raised_ns",
    "containers": "observed_ns",
    "corrections": "made_ns",
    "gaps": "made_ns",
    "granularities": "set_ns",
    "period_terms": "end_ns",
    "periods": "opened_ns",
    "plan_observations": "observed_ns",
    "pod_accounts": "period_end_ns",
    "price_plans": "observed_ns",
    "profiles": "kept_ns",
    "removals": "removed_ns",
    "reports": "kept_ns",
    "rollups": "kept_ns",
    "signing_keys": "first_used_ns",
    "workers": "first_seen_ns",
}
"""When a row came, by table; of one that is not named here all rows are looked at."""

LATE_NS = 3600 * SECOND_NS
"""A row is committed at most this long after the time that it states: it may wait for a lock, and clocks differ."""

FACTS_PER_DIGEST = 20_000
"""An older ledger has millions of facts when its first digest is made; each takes as many as memory holds easily."""

_READ_AT_ONCE = 5_000


@dataclass(frozen=True, slots=True)
class Due:
    """A Final period that no digest covers. Without a service: facts that none covers."""

    namespace: str = ""
    service: str = ""
    start_ns: int = 0
    end_ns: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """A digest as it is kept, and what the columns beside its body say."""

    seq: int
    digest: Digest
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Compared:
    """A row of facts as it is, and as a digest states it (`line` is None where none covers it)."""

    table: str
    key: str
    row: Mapping[str, Any]
    came_ns: int | None
    seq: int | None
    line: bytes | None


def due(engine: Engine, services: list[tuple[str, str]]) -> list[Due]:
    """The Final periods that have no digest, oldest first."""
    r, d, p = t.reports.c, t.digests.c, t.periods.c
    found = []
    with reading(engine) as connection:
        for namespace, service in services:
            last = select(func.max(d.period_end_ns)).where(d.namespace == namespace, d.service == service)
            last_ns = int(connection.scalar(last) or 0)
            query = (
                select(r.period_end_ns, func.max(func.coalesce(p.start_ns, 0)))
                .select_from(
                    t.reports.outerjoin(
                        t.periods,
                        and_(p.namespace == r.namespace, p.service == r.service, p.end_ns == r.period_end_ns),
                    )
                )
                .where(r.namespace == namespace, r.service == service, r.tenant == PLATFORM)
                .where(r.phase == Phase.FINAL.value, r.period_end_ns > last_ns)
                .group_by(r.period_end_ns)
            )
            found += [Due(namespace, service, int(row[1]), int(row[0])) for row in connection.execute(query)]
    return sorted(found, key=lambda each: (each.end_ns, each.namespace, each.service))


def make(engine: Engine, of: Due, key: SigningKey, now_ns: int, *, since_ns: int) -> Entry | None:
    """Make the next digest, of a period and of the facts that came after `since_ns` and that none covers.

    None where another collector made one meanwhile, or where there is nothing to cover.
    """
    with reading(engine) as connection:
        last = connection.execute(
            select(t.digests.c.seq, t.digests.c.digest).order_by(t.digests.c.seq.desc()).limit(1)
        ).first()
        records = Tree()
        if of.service:
            for digest in _hashes(connection, of.namespace, of.service, of.end_ns):
                records.add(bytes.fromhex(digest))
        facts = list(_uncovered(connection, since_ns))
    if not of.service and not facts:
        return None
    lines = Tree()
    for _, _, line in facts:
        lines.add(line)
    entry = Entry(
        seq=(last.seq if last else 0) + 1,
        previous=last.digest if last else GENESIS,
        namespace=of.namespace,
        service=of.service,
        period_start_ns=of.start_ns,
        period_end_ns=of.end_ns,
        records=records.count,
        records_root=records.root,
        facts=lines.count,
        facts_root=lines.root,
        made_ns=now_ns,
        key_id=key.key_id,
    )
    body = canonical_entry(entry)
    return entry if _keep(engine, entry, _signed(body, key), facts) else None


def keep_key(engine: Engine, key: SigningKey, now_ns: int) -> None:
    """Keep the public half of a key by which digests are signed from now on, once."""
    k = t.signing_keys.c
    with writing(engine) as connection:
        if connection.scalar(select(k.key_id).where(k.key_id == key.key_id)) is None:
            values = {"key_id": key.key_id, "public_der": key.public_der, "first_used_ns": now_ns}
            connection.execute(insert(t.signing_keys).values(values))


def kept_keys(engine: Engine) -> dict[str, bytes]:
    """The public keys that have signed, by key id."""
    k = t.signing_keys.c
    with reading(engine) as connection:
        rows = connection.execute(select(k.key_id, k.public_der).order_by(k.first_used_ns, k.key_id))
        return {row[0]: bytes(row[1]) for row in rows}


def last_made(engine: Engine) -> Digest | None:
    """The newest digest."""
    return next(
        (each.digest for each in _kept(engine, select(t.digests).order_by(t.digests.c.seq.desc()).limit(1))), None
    )


def of_seq(engine: Engine, seq: int) -> Digest | None:
    """The digest of a number; None where there is none yet."""
    return next((each.digest for each in _kept(engine, select(t.digests).where(t.digests.c.seq == seq))), None)


def kept(engine: Engine, after: int | None = None) -> Iterator[Kept]:
    """The digests after a number (or all that there are, whatever their numbers), in order."""
    query = select(t.digests) if after is None else select(t.digests).where(t.digests.c.seq > after)
    return _kept(engine, query.order_by(t.digests.c.seq))


def kept_lines(engine: Engine) -> Iterator[tuple[int, int, str, str, bytes]]:
    """(seq of the digest, position, table, key, line) of all facts that digests cover, in the order of their leaves."""
    f = t.digest_facts.c
    query = select(f.seq, f.position, f.of_table, f.row_key, f.line).order_by(f.seq, f.position)
    with reading(engine) as connection:
        for row in connection.execution_options(yield_per=_READ_AT_ONCE).execute(query):
            yield row[0], row[1], row[2], row[3], bytes(row[4])


def record_hashes(engine: Engine, namespace: str, service: str, end_ns: int) -> Iterator[str]:
    """The hashes of the records that are booked in a period, in the order of their leaves."""
    with reading(engine) as connection:
        yield from _hashes(connection, namespace, service, end_ns)


def compare(engine: Engine, table: Table) -> Iterator[Compared]:
    """Every row of a table of facts beside what a digest states of it."""
    f = t.digest_facts.c
    came = table.c.get(CAME.get(table.name, ""))
    key = _key(table)
    joined = table.outerjoin(t.digest_facts, and_(f.of_table == table.name, f.row_key == key))
    query = select(table, key.label("_key"), f.seq.label("_seq"), f.line.label("_line")).select_from(joined)
    with reading(engine) as connection:
        for row in (
            connection.execution_options(yield_per=_READ_AT_ONCE).execute(query.order_by(*table.primary_key)).mappings()
        ):
            values = {column.name: row[column.name] for column in table.columns}
            yield Compared(
                table.name,
                row["_key"],
                values,
                values[came.name] if came is not None else None,
                row["_seq"],
                row["_line"],
            )


def lost(engine: Engine, table: Table) -> list[tuple[int, str]]:
    """(seq of the digest, key) of the facts that digests state and the table has not.

    Asked for only where a count tells that there are any: it compares all keys in memory.
    """
    f = t.digest_facts.c
    with reading(engine) as connection:
        there = set(connection.scalars(select(_key(table))))
        rows = connection.execute(select(f.seq, f.row_key).where(f.of_table == table.name).order_by(f.seq, f.position))
        return [(row[0], row[1]) for row in rows if row[1] not in there]


def covered_count(engine: Engine, table: Table) -> int:
    """How many facts of a table digests state."""
    query = select(func.count()).where(t.digest_facts.c.of_table == table.name)
    with reading(engine) as connection:
        return int(connection.scalar(query) or 0)


def covered_tables(engine: Engine) -> set[str]:
    """The tables of which digests state facts."""
    with reading(engine) as connection:
        return set(connection.scalars(select(t.digest_facts.c.of_table).distinct()))


def _keep(engine: Engine, entry: Entry, digest: Digest, facts: list[tuple[str, str, bytes]]) -> bool:
    values = {
        "seq": entry.seq,
        "namespace": entry.namespace,
        "service": entry.service,
        "period_end_ns": entry.period_end_ns,
        "body": digest.body,
        "digest": digest.digest,
        "signature": digest.signature,
    }
    rows = [
        {"seq": entry.seq, "position": position, "of_table": table, "row_key": key, "line": line}
        for position, (table, key, line) in enumerate(facts)
    ]
    try:
        with writing(engine) as connection:
            newest = connection.scalar(select(func.max(t.digests.c.seq)))
            if (newest or 0) + 1 != entry.seq:
                return False
            connection.execute(insert(t.digests).values(values))
            if rows:
                connection.execute(insert(t.digest_facts), rows)
    except IntegrityError:  # another collector made a digest between our look and our commit
        return False
    return True


def _signed(body: bytes, key: SigningKey) -> Digest:
    """A body with its hash and its signature."""
    return Digest(body, sha256(body).hexdigest(), key.sign(body))


def _uncovered(connection: Connection, since_ns: int) -> Iterator[tuple[str, str, bytes]]:
    f = t.digest_facts.c
    left = FACTS_PER_DIGEST
    for table in COVERED:
        key = _key(table)
        query = select(table, key.label("_key")).where(not_(exists().where(f.of_table == table.name, f.row_key == key)))
        came = table.c.get(CAME.get(table.name, ""))
        if came is not None:
            query = query.where(came > since_ns)
        for row in connection.execute(query.order_by(*table.primary_key).limit(left)).mappings():
            left -= 1
            yield (
                table.name,
                row["_key"],
                fact_line(table.name, {column.name: row[column.name] for column in table.columns}),
            )
        if left <= 0:
            return


def _hashes(connection: Connection, namespace: str, service: str, end_ns: int) -> Iterator[str]:
    r = t.records.c
    bytewise = connection.dialect.name == "postgresql"  # whose order is the database's locale, otherwise
    order = [r.worker_uid.collate("C"), r.boot_id.collate("C")] if bytewise else [r.worker_uid, r.boot_id]
    query = select(r.hash).where(r.service == f"{namespace}/{service}", r.booked_end_ns == end_ns)
    return iter(connection.execution_options(yield_per=_READ_AT_ONCE).scalars(query.order_by(*order, r.seq)))


def _kept(engine: Engine, query: Any) -> Iterator[Kept]:
    with reading(engine) as connection:
        for row in connection.execution_options(yield_per=_READ_AT_ONCE).execute(query).mappings():
            columns = {name: row[name] for name in ("seq", "namespace", "service", "period_end_ns")}
            yield Kept(row["seq"], Digest(bytes(row["body"]), row["digest"], row["signature"]), columns)


def _key(table: Table) -> ColumnElement[str]:
    parts = [cast(column, Text) for column in table.primary_key]
    return reduce(lambda left, right: left.concat(literal(" ")).concat(right), parts[1:], parts[0])
