"""Gaps in the ledger: records that a worker was told to forget and that are not here.

Owns the table. That a chain may go on after them is `resume`'s, what they do to a period is billing's.
"""

from collections.abc import Collection
from dataclasses import asdict

from sqlalchemy import Connection, insert, select

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.billing.facts import Gap


def gaps_of(connection: Connection, worker_uids: Collection[str]) -> dict[str, tuple[Gap, ...]]:
    """The gaps of these workers, in the order of their keys; a worker without any is left out."""
    g = t.gaps.c
    columns = (g.boot_id, g.first_seq, g.last_seq, g.last_hash, g.after_ns, g.until_ns, g.reason, g.made_ns)
    query = select(g.worker_uid, *columns).where(g.worker_uid.in_(worker_uids)).order_by(*t.gaps.primary_key)
    found: dict[str, tuple[Gap, ...]] = {}
    for worker_uid, *of in connection.execute(query):
        found[worker_uid] = (*found.get(worker_uid, ()), Gap(*of))
    return found


def keep_gap(connection: Connection, worker_uid: str, gap: Gap) -> None:
    """Keep one, inside a transaction."""
    connection.execute(insert(t.gaps).values(worker_uid=worker_uid, **asdict(gap)))
