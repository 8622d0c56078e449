"""Routing: which ready worker gets a request, and whether a failed attempt may be made again.

Owns the choice (least outstanding requests), the count that it rests on, and the rule for a second attempt. Does not
know HTTP: a failure arrives here as one of two words.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from gpumeter_operator.gateway.endpoints import Endpoint

MAX_ATTEMPTS = 3


class Failure(StrEnum):
    """How an attempt failed before the worker's first byte."""

    NOT_CONNECTED = "not_connected"  # the worker never saw the request
    LOST = "lost"  # the connection, new or kept, broke after the request was on it: the worker may have begun


@dataclass(frozen=True, slots=True)
class Retry:
    """May another attempt be made, and to which endpoints no more."""

    allowed: bool
    reason: str
    excluded: frozenset[Endpoint]


class Outstanding:
    """How many requests each worker has from this gateway. The only state of routing."""

    def __init__(self) -> None:
        self._counts: dict[Endpoint, int] = {}
        self._turn = 0

    def at(self, endpoint: Endpoint) -> int:
        """Requests in flight at this worker."""
        return self._counts.get(endpoint, 0)

    def next_turn(self) -> int:
        """A number that moves on, so that workers with equal load take turns."""
        self._turn += 1
        return self._turn

    @contextmanager
    def one_more(self, endpoint: Endpoint) -> Iterator[None]:
        """Count one request for as long as it runs; a worker without requests is forgotten."""
        self._counts[endpoint] = self.at(endpoint) + 1
        try:
            yield
        finally:
            left = self._counts[endpoint] - 1
            if left:
                self._counts[endpoint] = left
            else:
                del self._counts[endpoint]


def choose(endpoints: Collection[Endpoint], outstanding: Outstanding, excluded: frozenset[Endpoint]) -> Endpoint | None:
    """The endpoint with the fewest outstanding requests, equals in turn; None when there is none left."""
    candidates = [endpoint for endpoint in endpoints if endpoint not in excluded]
    if not candidates:
        return None
    least = min(outstanding.at(endpoint) for endpoint in candidates)
    equals = sorted(endpoint for endpoint in candidates if outstanding.at(endpoint) == least)
    return equals[outstanding.next_turn() % len(equals)]


def retry_after(failure: Failure, endpoint: Endpoint, attempts: int, excluded: frozenset[Endpoint]) -> Retry:
    """Decide about another attempt after `attempts` have failed, the last at `endpoint`.

    A request that a worker may have begun is never sent twice: both runs would cost GPU time, and the tenant would pay
    for both. What never reached a worker costs nothing and goes to another one.
    """
    if failure is Failure.LOST:
        return Retry(False, "The worker may have begun the request, so it is not sent a second time.", excluded)
    if attempts >= MAX_ATTEMPTS:
        return Retry(False, f"No worker could be reached in {attempts} attempts.", excluded)
    return Retry(True, "The worker could not be reached.", excluded | {endpoint})
