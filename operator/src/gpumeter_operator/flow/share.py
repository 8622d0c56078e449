"""This collector's share of the work: which workers it pulls, and whether it is the one that closes and publishes.

Owns what is known of the other collectors and how old that is. The rules are decide.shares', the table is the ledger's.
Where the database has one writer (SQLite) nothing is shared: the oldest collector does everything, the others stand by.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from gpumeter_operator.adapters.ledger.members import Member
from gpumeter_operator.decide.shares import CLOCKS_NS, leads, owner_of
from gpumeter_operator.flow.collect import Execute
from gpumeter_usage.period import SECOND_NS

log = logging.getLogger(__name__)


class MembersPort(Protocol):
    """The collectors of a ledger. Methods block, and raise LedgerUnavailable."""

    def beat(self) -> Sequence[Member]:
        """Say that this one lives; all who do, oldest first."""
        ...

    def leave(self) -> None:
        """Say that this one ends."""
        ...


class Share:
    """What of the work is this collector's, as of its last beat."""

    def __init__(
        self,
        member_id: str,
        members: MembersPort,
        execute: Execute,
        monotonic_ns: Callable[[], int],
        *,
        one_works: bool = False,
    ) -> None:
        self.members: tuple[Member, ...] = ()
        self._member_id = member_id
        self._port = members
        self._execute = execute
        self._monotonic_ns = monotonic_ns
        self._one_works = one_works
        self._beat_ns = 0
        self._owners: dict[str, str] = {}

    async def beat(self) -> bool:
        """Tell the others, and hear who they are; whether anything has changed. Raises LedgerUnavailable."""
        begun_ns = self._monotonic_ns()  # before anybody else can see it
        found = tuple(await self._execute(self._port.beat))
        self._beat_ns = begun_ns
        if found == self.members:
            return False
        names = ", ".join(member.name for member in found)
        log.info("%d collector(s) work on this ledger: %s", len(found), names)
        self.members, self._owners = found, {}
        return True

    async def leave(self) -> None:
        """Let the others take over at once. Raises LedgerUnavailable."""
        await self._execute(self._port.leave)

    @property
    def leads(self) -> bool:
        """Whether this one closes and publishes now."""
        by_age = [member.member_id for member in self.members]
        return leads(self._member_id, by_age, self._monotonic_ns() - self._beat_ns)

    @property
    def works(self) -> bool:
        """Whether this one does anything at all now."""
        return self.leads if self._one_works else self._is_member

    @property
    def _is_member(self) -> bool:
        return any(member.member_id == self._member_id for member in self.members)

    def mine(self, worker_uid: str) -> bool:
        """Whether this one pulls a worker."""
        if self._one_works:
            return self.leads
        if worker_uid not in self._owners:
            self._owners[worker_uid] = owner_of(worker_uid, [member.member_id for member in self.members])
        return self._owners[worker_uid] == self._member_id

    def stands_by(self) -> str | None:
        """A sentence where this one only waits for another to end."""
        if self.works or not self.members:
            return None
        if not self._is_member:
            return (
                f"The clock of this collector is more than {CLOCKS_NS // 60 // SECOND_NS} minutes from the database's; "
                f"it leaves the work to {self.members[0].name} until they agree. Set the node's clock by NTP."
            )
        return (
            f"The collector {self.members[0].name} works on this ledger, which has one writer; this one stands by, and "
            "takes over when that one ends. Several share the work where ledger.url names a PostgreSQL."
        )
