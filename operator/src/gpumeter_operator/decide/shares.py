"""How collectors share the workers, and which of them closes periods. Pure.

Owns the rules. A share need not be exclusive to be right: two collectors that pull one worker commit each record once,
because the ledger's key and cursor decide. So nobody holds a lease on a worker; who lives decides whose it is, and a
worker changes hands only when its collector does. Closing and publishing is the oldest one's, for as long as its last
sign of life is fresh by its own clock: what it may still do ends before the others miss it.
"""

from collections.abc import Sequence
from hashlib import blake2b

from gpumeter_usage.period import SECOND_NS

BEAT_S = 2.0
"""How often a collector says that it lives."""

LIFE_NS = 10 * SECOND_NS
"""How long after its last sign of life a collector counts as alive; four beats may be late."""

LEAD_NS = LIFE_NS - 2 * SECOND_NS
"""How long it may lead after it began to give that sign: less, so that two never lead at once."""


CLOCKS_NS = 15 * 60 * SECOND_NS
"""How far a collector's clock may be from the database's while others work. A digest covers what came until an hour
before it, by the collectors' clocks; NTP holds them to milliseconds."""


def stands_aside(off_ns: int | None, others: int) -> bool:
    """Whether a collector whose clock is `off_ns` from the database's (None where that is not asked) leaves the work to
    the others. One that is alone goes on: what it says is in order by its own clock."""
    return off_ns is not None and abs(off_ns) > CLOCKS_NS and others > 0


def owner_of(worker_uid: str, member_ids: Sequence[str]) -> str:
    """Whose a worker is: the member with the highest hash for it (rendezvous hashing, Thaler and Ravishankar 1998), so
    that only the workers of a member that comes or goes change hands. "" where there is no member."""
    return max(member_ids, key=lambda member: (_weight(worker_uid, member), member), default="")


def leads(member_id: str, members_by_age: Sequence[str], beat_age_ns: int) -> bool:
    """Whether a member closes and publishes now: it is the oldest, and its last beat is younger than LEAD_NS."""
    return bool(members_by_age) and members_by_age[0] == member_id and beat_age_ns < LEAD_NS


def _weight(worker_uid: str, member_id: str) -> bytes:
    return blake2b(f"{worker_uid}\0{member_id}".encode(), digest_size=8).digest()
