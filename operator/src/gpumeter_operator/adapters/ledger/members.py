"""The collectors that work on a ledger: each says now and then that it lives, by the database's clock.

Owns the table `collectors`, a row for each that ever ran: no role that collects may delete anything. Whoever was not
seen for LIFE_NS is gone for the others, and joins anew when it comes back. Does not know what they share among them
(decide.shares).
"""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, func, select, text, update

from gpumeter_operator.adapters.ledger import dialect
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.locks import Lock
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.decide.shares import LIFE_NS, stands_aside

COLLECTORS = Lock("5 collectors")

_NOW_NS = {
    "sqlite": "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) * 1000000",
    "postgresql": "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT) * 1000",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A collector that lives. `name` is its pod's."""

    member_id: str
    name: str
    joined_ns: int


def database_now_ns(connection: Connection) -> int:
    """The time by the one clock that all collectors of a ledger share, to the millisecond or better."""
    return int(connection.scalar(text(_NOW_NS[connection.dialect.name])) or 0)


class Members:
    """One collector's place among the others. Methods block, and raise LedgerUnavailable."""

    def __init__(
        self,
        ledger: Ledger,
        member_id: str,
        name: str,
        clock_ns: Callable[[Connection], int] = database_now_ns,
        own_ns: Callable[[], int] | None = None,
    ) -> None:
        """`own_ns` is the clock of this collector, where it must agree with the database's."""
        self._ledger = ledger
        self._member_id = member_id
        self._name = name
        self._clock_ns = clock_ns
        self._own_ns = own_ns
        self._begun = False

    def beat(self) -> tuple[Member, ...]:
        """Say that this one lives; all who do, in the order in which they joined.

        One whose clock is of another time than the database's leaves the work to the others, and is not among them.
        """
        c = t.collectors.c
        with self._ledger.writing(COLLECTORS) as connection:
            now_ns = self._clock_ns(connection)
            if not self._begun:
                # A container that starts anew in its pod need not wait until its former life is missed.
                former = update(t.collectors).where(c.name == self._name, c.member_id != self._member_id)
                connection.execute(former.values(seen_ns=0))
            known = connection.execute(select(t.collectors).where(c.member_id == self._member_id)).one_or_none()
            stayed = known is not None and known.seen_ns > now_ns - LIFE_NS
            others = select(c.member_id, c.name, c.joined_ns).where(
                c.seen_ns > now_ns - LIFE_NS, c.member_id != self._member_id
            )
            working = tuple(Member(*row) for row in connection.execute(others.order_by(c.joined_ns, c.member_id)))
            if stands_aside(None if self._own_ns is None else self._own_ns() - now_ns, len(working)):
                connection.execute(update(t.collectors).where(c.member_id == self._member_id).values(seen_ns=0))
                return working
            # Whoever was given up joins behind those who did its work meanwhile; nobody joins in the same moment, or
            # before somebody who leads already.
            youngest_ns = int(connection.scalar(select(func.max(c.joined_ns))) or 0)
            joined_ns = known.joined_ns if known is not None and stayed else max(now_ns, youngest_ns + 1)
            values = {"name": self._name, "joined_ns": joined_ns, "seen_ns": now_ns}
            dialect.put(connection, t.collectors, {"member_id": self._member_id}, values)
            living = select(c.member_id, c.name, c.joined_ns).where(c.seen_ns > now_ns - LIFE_NS)
            found = tuple(Member(*row) for row in connection.execute(living.order_by(c.joined_ns, c.member_id)))
        self._begun = True
        return found

    def leave(self) -> None:
        """Say that this one ends; the others need not wait until it is missed."""
        with self._ledger.writing(COLLECTORS) as connection:
            ended = update(t.collectors).where(t.collectors.c.member_id == self._member_id)
            connection.execute(ended.values(seen_ns=0))
