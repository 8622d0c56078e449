"""Routing: which ready worker gets a request, and what a failed attempt means for the next one.

Owns the choice (least outstanding requests), the counts and the back-off that it rests on, and the rule for another
attempt. Takes the clock as an argument (monotonic nanoseconds). Does not know HTTP: a failure arrives as one word.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum

from gpumeter_operator.gateway.endpoints import Endpoint

BACKOFF_NS = tuple(ms * 1_000_000 for ms in (50, 250, 500, 1_000, 2_000, 5_000, 10_000))
FULL_NS = 1_000_000_000  # how long a worker that said it is full is only the second choice


class Failure(StrEnum):
    """How an attempt failed before a worker began to compute, or LOST when nobody knows."""

    NOT_CONNECTED = "not_connected"  # the worker never saw the request
    LOST = "lost"  # the connection, new or kept, broke after the request was on it: the worker may have begun
    HOP_REFUSED = "hop_refused"  # the worker does not accept this gateway's tokens
    UNAVAILABLE = "unavailable"  # the worker said that it does not serve now
    FULL = "full"  # the worker said that its queue has no room for this request


@dataclass(frozen=True, slots=True)
class Retry:
    """May the request be sent again, and why (not)."""

    allowed: bool
    reason: str


def retry_after(failure: Failure, others_left: bool) -> Retry:
    """Decide about another attempt; `others_left` says whether a worker is ready that has not failed lately.

    A request that a worker may have begun is never sent twice: both runs would cost GPU time, and the tenant would pay
    for both. What no worker has begun costs nothing: it goes to another one, or waits until one can be reached.
    """
    if failure is Failure.LOST:
        return Retry(False, "The worker may have begun the request, so it is not sent a second time.")
    if failure is Failure.HOP_REFUSED and not others_left:
        return Retry(False, "No worker accepts this gateway, and waiting would not change it.")
    return Retry(True, _AGAIN[failure])


_AGAIN = {
    Failure.NOT_CONNECTED: "The worker could not be reached.",
    Failure.HOP_REFUSED: "The worker does not accept this gateway.",
    Failure.UNAVAILABLE: "The worker does not serve at the moment.",
    Failure.FULL: "The worker's queue is full.",
}


@dataclass(slots=True)
class _Trouble:
    failures: int
    until_ns: int  # nothing is sent there before
    probing: bool = False  # after that, one request tries it


class Load:
    """What this gateway knows of workers: outstanding requests, who failed lately, and who said it is full."""

    def __init__(self) -> None:
        self._counts: dict[Endpoint, int] = {}
        self._troubles: dict[Endpoint, _Trouble] = {}
        self._full_until_ns: dict[Endpoint, int] = {}
        self._turn = 0

    def at(self, endpoint: Endpoint) -> int:
        """Requests in flight at this worker."""
        return self._counts.get(endpoint, 0)

    def begin(self, endpoint: Endpoint, now_ns: int) -> None:
        """Count a request that is about to be sent. Where the worker had failed, this request is the probe."""
        self._counts[endpoint] = self.at(endpoint) + 1
        if (trouble := self._troubles.get(endpoint)) is not None and now_ns >= trouble.until_ns:
            trouble.probing = True

    def end(self, endpoint: Endpoint) -> None:
        """The request has ended, however it did; a worker without requests is forgotten."""
        left = self._counts[endpoint] - 1
        if left:
            self._counts[endpoint] = left
        else:
            del self._counts[endpoint]
        if (trouble := self._troubles.get(endpoint)) is not None:
            trouble.probing = False

    def worked(self, endpoint: Endpoint) -> bool:
        """The worker answered: it counts as sound again. Whether it did not before."""
        return self._troubles.pop(endpoint, None) is not None

    def failed(self, endpoint: Endpoint, failure: Failure, now_ns: int) -> None:
        """Leave the worker alone for a while that grows with every failure; one that is full is only less wanted."""
        if failure is Failure.FULL:
            self._full_until_ns[endpoint] = now_ns + FULL_NS
            self.worked(endpoint)
            return
        trouble = self._troubles.get(endpoint)
        if trouble is not None and now_ns < trouble.until_ns:
            return  # one of several that were under way when the first of them failed
        failures = trouble.failures if trouble is not None else 0
        back_off_ns = BACKOFF_NS[min(failures, len(BACKOFF_NS) - 1)]
        self._troubles[endpoint] = _Trouble(failures + 1, now_ns + back_off_ns)

    @property
    def remembers(self) -> bool:
        """Whether anything is held against any worker."""
        return bool(self._troubles or self._full_until_ns)

    def forget_all_but(self, ready: Collection[Endpoint]) -> None:
        """What left readiness and comes back has started anew, or is another pod under the same address."""
        for known in (self._troubles, self._full_until_ns):
            for endpoint in [one for one in known if one not in ready]:
                del known[endpoint]

    def usable(self, endpoint: Endpoint, now_ns: int) -> bool:
        """Whether a request may be sent there now."""
        trouble = self._troubles.get(endpoint)
        return trouble is None or (now_ns >= trouble.until_ns and not trouble.probing)

    def sound(self, endpoint: Endpoint) -> bool:
        """Whether it has not failed since it last worked."""
        return endpoint not in self._troubles

    def usable_again_ns(self, endpoints: Collection[Endpoint], now_ns: int) -> int | None:
        """When the first of those that are left alone may be tried; None where there is none."""
        times = (self._troubles[one].until_ns for one in endpoints if one in self._troubles)
        return min((time_ns for time_ns in times if time_ns > now_ns), default=None)

    def said_full(self, endpoint: Endpoint, now_ns: int) -> bool:
        """Whether it told lately that it is full: other gateways send there too."""
        return self._full_until_ns.get(endpoint, 0) > now_ns

    def next_turn(self) -> int:
        """A number that moves on, so that workers with equal load take turns."""
        self._turn += 1
        return self._turn


def choose(
    endpoints: Collection[Endpoint], load: Load, limit: int, now_ns: int, prefix: bytes | None = None
) -> Endpoint | None:
    """The endpoint with the fewest outstanding requests below `limit`; None where no worker takes one now.

    Equals take turns, or, with a `prefix`, the same prefix goes to the same one of them: where its cache is warm.
    """
    candidates = [one for one in endpoints if load.at(one) < limit and load.usable(one, now_ns)]
    if not candidates:
        return None

    def weight(endpoint: Endpoint) -> tuple[bool, int]:
        return load.said_full(endpoint, now_ns), load.at(endpoint)

    least = min(map(weight, candidates))
    equals = sorted(endpoint for endpoint in candidates if weight(endpoint) == least)
    if prefix is None:
        return equals[load.next_turn() % len(equals)]
    return max(equals, key=_affinity(prefix))


def _affinity(prefix: bytes) -> Callable[[Endpoint], bytes]:
    """Rendezvous hashing: when a worker comes or goes, only what went there moves."""

    def score(endpoint: Endpoint) -> bytes:
        return hashlib.blake2b(prefix, digest_size=8, key=f"{endpoint.address}:{endpoint.port}".encode()[:64]).digest()

    return score
