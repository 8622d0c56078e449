"""When services are looked at without an event of their own: all of them, every few seconds, by one loop.

Owns the rounds and that a service has one such look at a time. One loop over the mirror, and not a timer of kopf for
each service: a thousand of those take a tenth of a core only to find that nothing is to be done. What kopf tells of
(created, edited, deleted) is looked at by its handlers, at once. Does not know what a look does.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from gpumeter_operator.adapters.kubernetes import Manifest
from gpumeter_operator.decide.names import FINALIZER

AT_ONCE = 100  # services without a pause for others in the event loop, a few milliseconds

log = logging.getLogger(__name__)


class Looks:
    """Looks at every service again and again. `services` is the live copy of all of them."""

    def __init__(
        self,
        services: Callable[[], Mapping[tuple[str, str], Manifest]],
        due: Callable[[Manifest], bool],
        look: Callable[[Manifest], Awaitable[None]],
        *,
        interval_s: float,
    ) -> None:
        """`due` says, cheaply, whether a look could find anything; `look` tells its own failures."""
        self._services = services
        self._due = due
        self._look = look
        self._interval_s = interval_s
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """One round after the other until cancelled, which ends the looks under way too."""
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                await self.round()
        finally:
            for task in self._running.values():
                task.cancel()

    async def round(self) -> None:
        """Begin a look at every service that is due; those that take longer than a round are not begun twice."""
        for number, service in enumerate(list(self._services().values()), start=1):
            uid = service["metadata"]["uid"]
            if uid not in self._running and is_ours(service) and self._due(service):
                task = self._running[uid] = asyncio.create_task(self._one(service))
                task.add_done_callback(lambda _, uid=uid: self._running.pop(uid, None))  # type: ignore[misc]
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)

    async def _one(self, service: Manifest) -> None:
        try:
            await self._look(service)
        except Exception:  # one service that nobody thought of must not end the looks at all the others
            metadata = service["metadata"]
            log.exception("A look at %s/%s failed; it is looked at again.", metadata["namespace"], metadata["name"])


def is_ours(service: Manifest) -> bool:
    """Whether its handler has begun and its deletion has not: before, nothing would wait for its last records."""
    metadata = service["metadata"]
    return FINALIZER in (metadata.get("finalizers") or ()) and "deletionTimestamp" not in metadata
