"""The waiting room: who waits for a worker of which service, who may come in, and who is next.

Owns the bounds (requests and bytes, in all and per tenant) and the order: tenants of a service take turns, and inside a
tenant the oldest goes first. Takes the clock as an argument (monotonic nanoseconds). Does not know workers, nor what
becomes of a request.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from gpumeter_operator.gateway.refusal import Refusal

FULL_RETRY_S = 5


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many may wait, and how many bytes their bodies may have."""

    requests: int
    tenant_requests: int
    size: int
    tenant_size: int


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place. It keeps its number, so that who has to come back finds its old place again."""

    number: int
    service: str
    tenant: str
    size: int
    since_ns: int
    not_before_ns: int = 0  # others go first until then

    def __lt__(self, other: "Ticket") -> bool:
        return self.number < other.number


@dataclass(slots=True)
class _Held:
    requests: int = 0
    size: int = 0


class Room:
    """Everybody who waits."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._numbers = count(1)
        self._queues: dict[str, dict[str, list[Ticket]]] = {}  # service -> tenants in the order of their turns
        self._pausing: set[Ticket] = set()
        self._all = _Held()
        self._tenants: dict[str, _Held] = {}

    def ticket(self, service: str, tenant: str, size: int, now_ns: int) -> Ticket:
        """A place for a request that has just come. It does not wait yet."""
        return Ticket(next(self._numbers), service, tenant, size, now_ns)

    def enter(self, ticket: Ticket) -> None:
        """Let somebody in. Raises Refusal (503, with a time to come back) when the room is full.

        The whole is asked last: who is told of it can be sure that others fill it.
        """
        bounds, held = self._bounds, self._tenants.get(ticket.tenant, _Held())
        if held.requests >= bounds.tenant_requests or held.size + ticket.size > bounds.tenant_size:
            raise Refusal(
                503,
                "tenant_waiting_room_full",
                f"{ticket.service} has no worker that is free, and your requests that wait for one are as many as one "
                f"tenant may have here ({bounds.tenant_requests} requests, {bounds.tenant_size} bytes). Send it again "
                "later.",
                retry_after_s=FULL_RETRY_S,
            )
        if self._all.requests >= bounds.requests or self._all.size + ticket.size > bounds.size:
            raise Refusal(
                503,
                "waiting_room_full",
                f"{ticket.service} has no worker that is free, and the gateway's waiting room is full. Send it again "
                "later.",
                retry_after_s=FULL_RETRY_S,
            )
        self.come_back(ticket)

    def come_back(self, ticket: Ticket) -> None:
        """Take the old place again, after a worker did not take the request. It was let in before, so nobody asks."""
        if ticket.not_before_ns:
            self._pausing.add(ticket)
        insort(self._queues.setdefault(ticket.service, {}).setdefault(ticket.tenant, []), ticket)
        for held in (self._all, self._tenants.setdefault(ticket.tenant, _Held())):
            held.requests += 1
            held.size += ticket.size

    def first(self, service: str, now_ns: int) -> Ticket | None:
        """Who is next, of those whose time has come."""
        for queue in self._queues.get(service, {}).values():
            for ticket in queue:
                if ticket.not_before_ns <= now_ns:
                    return ticket
        return None

    def admit(self, ticket: Ticket) -> None:
        """A worker takes this one: it leaves, and its tenant's next turn is after all others'."""
        tenants = self._queues[ticket.service]
        self.leave(ticket)
        if ticket.tenant in tenants:
            tenants[ticket.tenant] = tenants.pop(ticket.tenant)

    def leave(self, ticket: Ticket) -> None:
        """Go without having been served; a tenant and a service of whom nobody waits are forgotten."""
        self._pausing.discard(ticket)
        tenants = self._queues[ticket.service]
        tenants[ticket.tenant].remove(ticket)
        if not tenants[ticket.tenant]:
            del tenants[ticket.tenant]
        if not tenants:
            del self._queues[ticket.service]
        held = self._tenants[ticket.tenant]
        for one in (self._all, held):
            one.requests -= 1
            one.size -= ticket.size
        if not held.requests:
            del self._tenants[ticket.tenant]

    def waiting(self, service: str) -> Iterator[Ticket]:
        """All who wait for this service."""
        for queue in tuple(self._queues.get(service, {}).values()):
            yield from tuple(queue)

    def count(self, service: str) -> int:
        """How many wait for this service."""
        return sum(len(queue) for queue in self._queues.get(service, {}).values())

    def since_ns(self, service: str) -> int | None:
        """When the one who waits longest came."""
        return min((queue[0].since_ns for queue in self._queues.get(service, {}).values()), default=None)

    def first_pause_ns(self, service: str, now_ns: int) -> int | None:
        """When the first of those whose time has not come may be asked again."""
        times = (ticket.not_before_ns for ticket in self._pausing if ticket.service == service)
        return min((time_ns for time_ns in times if time_ns > now_ns), default=None)

    @property
    def services(self) -> tuple[str, ...]:
        """Services for which somebody waits."""
        return tuple(self._queues)

    @property
    def requests(self) -> int:
        """How many wait, for whatever service."""
        return self._all.requests
