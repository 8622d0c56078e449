"""Lets requests through to workers, one by one: the waiting room's hands and clock.

Owns the waiting itself (who is woken when), the seats that are taken at workers, and what is told of both. Who is next
is decided by room, where to by routing, whether waiting makes sense by outlook. Does not know HTTP.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from gpumeter_operator.gateway.demand import Board, Demand
from gpumeter_operator.gateway.endpoints import Endpoint
from gpumeter_operator.gateway.models import Catalogue, Service
from gpumeter_operator.gateway.outlook import Outlook
from gpumeter_operator.gateway.refusal import Refusal
from gpumeter_operator.gateway.room import Bounds, Room, Ticket
from gpumeter_operator.gateway.routing import FULL_NS, Failure, Load, Retry, choose, retry_after
from gpumeter_operator.gateway.telemetry import Telemetry

logger = logging.getLogger(__name__)

LASTING_RETRY_S = 30  # a person has to change something first
LIMIT_RETRY_S = 5
# A gateway that hears of a thousand services looks at those who wait this often, not after each.
_LOOK_S = 0.02


class Cluster(Protocol):
    """What a doorman needs to know of the cluster: gateway.world.World has it."""

    def catalogue(self) -> Catalogue:
        """All services."""

    def endpoints(self, service: Service) -> tuple[Endpoint, ...]:
        """The ready workers of one."""

    def all_endpoints(self) -> frozenset[Endpoint]:
        """The ready workers of all."""

    def outlook(self, service: Service) -> Outlook:
        """Whether one without a ready worker may get one."""


class Doorman:
    """Everybody who waits for a worker, and everybody who is with one."""

    def __init__(self, cluster: Cluster, bounds: Bounds, telemetry: Telemetry, board: Board, *, limit_ns: int) -> None:
        self.on_demand: Callable[[bool], None] | None = None  # after the board has changed; whether that is urgent
        self._cluster = cluster
        self._room = Room(bounds)
        self._load = Load()
        self._telemetry = telemetry
        self._board = board
        self._limit_ns = limit_ns
        self._visits: dict[Ticket, Visit] = {}
        self._in_flight: dict[str, int] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._look: asyncio.TimerHandle | None = None
        self._closed = False

    @contextmanager
    def visit(self, service: Service, tenant: str, size: int, prefix: bytes | None = None) -> Iterator["Visit"]:
        """One request, from its coming to its end, however that comes."""
        ticket = self._room.ticket(service.qualified, tenant, size, time.monotonic_ns())
        visit = Visit(self, service, ticket, prefix)
        try:
            yield visit
        finally:
            self._end(visit)

    def cluster_changed(self) -> None:
        """Somebody's worker may have become ready, or somebody's wait pointless."""
        if self._look is None and self._room.requests:
            self._look = asyncio.get_running_loop().call_later(_LOOK_S, self._look_at_all)

    def workers_changed(self) -> None:
        """The same for endpoints, at once: a start from zero ends with it."""
        if self._load.remembers:
            self._load.forget_all_but(self._cluster.all_endpoints())
        for name in self._room.services:
            self._look_at(name)

    def close(self) -> None:
        """The gateway ends: whoever still waits is told to come again, to another one."""
        self._closed = True
        why = Refusal(503, "gateway_stopping", "This gateway is stopping; send it again.", retry_after_s=1)
        for name in self._room.services:
            self._turn_away(name, why)

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return self._room.requests

    # What a visit calls

    def seek(self, visit: "Visit") -> None:
        """Give a seat, or a place in the room. Raises Refusal when neither can be."""
        now_ns, ticket = time.monotonic_ns(), visit.ticket
        if ticket.not_before_ns <= now_ns and self._room.first(ticket.service, now_ns) is None:
            endpoint = self._choose(visit, now_ns)
            if endpoint is not None:
                self._give(visit, endpoint, now_ns)
                return
        if (why := self._pointless(visit.service, ready=bool(self._cluster.endpoints(visit.service)))) is not None:
            raise why
        if visit.has_waited:
            self._room.come_back(ticket)
        else:
            self._room.enter(ticket)
            visit.has_waited = True
        self._visits[ticket] = visit
        self._telemetry.waiting(ticket.service, +1)
        self._tell(ticket.service)
        self._dispatch(ticket.service)

    def release(self, visit: "Visit", endpoint: Endpoint) -> None:
        """A seat is free again."""
        name = visit.ticket.service
        self._load.end(endpoint)
        self._in_flight[name] -= 1
        if not self._in_flight[name]:
            del self._in_flight[name]
        self._telemetry.in_flight(name, -1)
        self._tell(name)
        if self._room.requests:
            self._dispatch(name)

    def worked(self, visit: "Visit", endpoint: Endpoint) -> None:
        """A worker answered; where it had failed before, those who wait need not wait for its next trial."""
        if self._load.worked(endpoint):
            self._dispatch(visit.ticket.service)

    def failed(self, visit: "Visit", endpoint: Endpoint, failure: Failure) -> Retry:
        """A worker did not; says whether the request may be sent again."""
        now_ns = time.monotonic_ns()
        self._load.failed(endpoint, failure, now_ns)
        ready = self._cluster.endpoints(visit.service)
        decision = retry_after(failure, any(self._load.sound(one) for one in ready if one != endpoint))
        if decision.allowed:
            self._telemetry.retried(failure)
            others = any(not self._load.said_full(one, now_ns) and self._load.usable(one, now_ns) for one in ready)
            if failure is Failure.FULL and not others:
                visit.ticket.not_before_ns = now_ns + FULL_NS
        return decision

    def give_up(self, visit: "Visit") -> Refusal:
        """What is said to somebody who has waited for as long as one may."""
        told = self._cluster.outlook(visit.service)
        last = f" {visit.last}" if visit.last else ""
        return Refusal(
            503,
            "waited_too_long",
            f"No worker of {visit.ticket.service} became free within {self._limit_ns / 1e9:g} s.{last}{told.because}",
            retry_after_s=LIMIT_RETRY_S,
        )

    def turned_away(self, why: Refusal) -> None:
        """Somebody goes without having been served."""
        self._telemetry.turned_away(why.code)

    def left_ns(self, visit: "Visit") -> int:
        """How much longer it may wait."""
        return visit.ticket.since_ns + self._limit_ns - time.monotonic_ns()

    # Inside

    def _choose(self, visit: "Visit", now_ns: int) -> Endpoint | None:
        service = visit.service
        return choose(self._cluster.endpoints(service), self._load, service.worker_requests, now_ns, visit.prefix)

    def _give(self, visit: "Visit", endpoint: Endpoint, now_ns: int) -> None:
        name = visit.ticket.service
        self._load.begin(endpoint, now_ns)  # here and not when it wakes: the next choice must know
        self._in_flight[name] = self._in_flight.get(name, 0) + 1
        self._telemetry.in_flight(name, +1)
        visit.take(endpoint)
        self._tell(name)

    def _dispatch(self, name: str) -> None:
        """Fill the free seats of a service in the order of turns."""
        now_ns = time.monotonic_ns()
        while (ticket := self._room.first(name, now_ns)) is not None:
            visit = self._visits[ticket]
            endpoint = self._choose(visit, now_ns)
            if endpoint is None:
                break
            self._room.admit(ticket)
            self._left(ticket, "seated")
            self._give(visit, endpoint, now_ns)
        self._set_timer(name, now_ns)

    def _set_timer(self, name: str, now_ns: int) -> None:
        """Look again when a worker that failed may be tried, or a request that paused may be sent."""
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()
        if not self._room.count(name) or (service := self._cluster.catalogue().by_qualified.get(name)) is None:
            return
        times = (
            self._room.first_pause_ns(name, now_ns),
            self._load.usable_again_ns(self._cluster.endpoints(service), now_ns),
        )
        if (next_ns := min((one for one in times if one is not None), default=None)) is not None:
            wait_s = (next_ns - now_ns) / 1e9 + 0.001
            self._timers[name] = asyncio.get_running_loop().call_later(wait_s, self._dispatch, name)

    def _look_at_all(self) -> None:
        self._look = None
        for name in self._room.services:
            self._look_at(name)

    def _look_at(self, name: str) -> None:
        """Who waits for a service that changed goes on, goes on waiting, or learns that it is in vain."""
        service = self._cluster.catalogue().by_qualified.get(name)
        if service is None:
            self._turn_away(name, _gone(name))
            return
        for ticket in self._room.waiting(name):
            visit = self._visits[ticket]
            if visit.service.uid != service.uid:
                self._drop(visit, _gone(name))
            else:
                visit.service = service
        if (why := self._pointless(service, ready=bool(self._cluster.endpoints(service)))) is not None:
            self._turn_away(name, why)
        else:
            self._dispatch(name)

    def _pointless(self, service: Service, *, ready: bool) -> Refusal | None:
        if self._closed:
            return Refusal(503, "gateway_stopping", "This gateway is stopping; send it again.", retry_after_s=1)
        if ready:
            return None
        told = self._cluster.outlook(service)
        if told.comes:
            return None
        message = f"{service.qualified} has no worker that is ready, and waiting would not change it.{told.because}"
        return Refusal(503, "no_ready_worker", message, retry_after_s=LASTING_RETRY_S)

    def _turn_away(self, name: str, why: Refusal) -> None:
        for ticket in self._room.waiting(name):
            self._drop(self._visits[ticket], why)

    def _drop(self, visit: "Visit", why: Refusal) -> None:
        self._room.leave(visit.ticket)
        self._left(visit.ticket, "refused")
        self._tell(visit.ticket.service)
        visit.refuse(why)

    def _left(self, ticket: Ticket, outcome: str) -> None:
        del self._visits[ticket]
        self._telemetry.waiting(ticket.service, -1)
        self._telemetry.waited((time.monotonic_ns() - ticket.since_ns) / 1e9, outcome)

    def _end(self, visit: "Visit") -> None:
        if visit.ticket in self._visits:
            self._room.leave(visit.ticket)
            self._left(visit.ticket, "expired" if visit.expired else "left")
            self._tell(visit.ticket.service)
            self._set_timer(visit.ticket.service, time.monotonic_ns())
        visit.stand_up()

    def _tell(self, name: str) -> None:
        waiting = self._room.count(name)
        demand = Demand(waiting, self._in_flight.get(name, 0), self._room.since_ns(name) if waiting else None)
        service = self._cluster.catalogue().by_qualified.get(name) if waiting == 1 else None
        urgent = service is not None and not self._cluster.endpoints(service)
        if self._board.put(name, demand, urgent=urgent) and self.on_demand is not None:
            self.on_demand(urgent)


class Visit:
    """One request's way to a worker. It waits, has a seat, or has left."""

    def __init__(self, doorman: Doorman, service: Service, ticket: Ticket, prefix: bytes | None) -> None:
        self.service = service
        self.ticket = ticket
        self.prefix = prefix
        self.has_waited = False
        self.expired = False
        self.last = ""  # how the last attempt ended, in a sentence
        self._doorman = doorman
        self._endpoint: Endpoint | None = None
        self._woken = asyncio.Event()
        self._refusal: Refusal | None = None
        self._seeks = False

    async def seat(self, within_s: float) -> Endpoint | None:
        """A worker to send to, or None when `within_s` have passed and it still waits: call it again then.

        Raises Refusal when the wait is over without one.
        """
        try:
            return await self._seat(within_s)
        except Refusal as why:
            self._doorman.turned_away(why)
            raise

    async def _seat(self, within_s: float) -> Endpoint | None:
        if not self._seeks:
            self._seeks = True
            self._doorman.seek(self)
        if self._endpoint is None and self._refusal is None:
            left_s = self._doorman.left_ns(self) / 1e9
            try:
                async with asyncio.timeout(max(0.0, min(within_s, left_s))):
                    await self._woken.wait()
            except TimeoutError:
                # What came in the last moment counts: a seat was taken for this visit.
                if self._endpoint is None and self._refusal is None:
                    if left_s > within_s:
                        return None
                    self.expired = True
                    raise self._doorman.give_up(self) from None
        if self._refusal is not None:
            raise self._refusal
        return self._endpoint

    def worked(self) -> None:
        """The worker at this seat answered."""
        if self._endpoint is not None:
            self._doorman.worked(self, self._endpoint)

    def failed(self, failure: Failure) -> Retry:
        """The worker at this seat did not; where the decision allows, `seat` seeks another one."""
        endpoint = self._endpoint
        if endpoint is None:
            raise RuntimeError("a visit without a seat cannot fail")
        decision = self._doorman.failed(self, endpoint, failure)
        self.last = decision.reason
        self.stand_up()
        return decision

    # What the doorman calls

    def take(self, endpoint: Endpoint) -> None:
        """Here is the seat."""
        self._endpoint = endpoint
        self._woken.set()

    def refuse(self, why: Refusal) -> None:
        """There will be none."""
        self._refusal = why
        self._woken.set()

    def stand_up(self) -> None:
        """Leave the seat, where there is one."""
        endpoint, self._endpoint = self._endpoint, None
        self._woken.clear()
        self._seeks = False
        if endpoint is not None:
            self._doorman.release(self, endpoint)


def _gone(name: str) -> Refusal:
    message = f"{name} was deleted while the request waited for a worker; send it again if there is a new one."
    return Refusal(503, "service_gone", message, retry_after_s=LIMIT_RETRY_S)
