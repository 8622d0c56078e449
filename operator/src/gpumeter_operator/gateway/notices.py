"""What is said of the API keys' Secrets that are left out: a line of the log, and an event at each of them.

Owns what was said already, so that nothing is said again while it stays as it is. All gateways say the same: an event's
name is made from what it says, so the first one writes it and the others find it there. Does not know what makes a
Secret unfit (keys).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any

from gpumeter_operator.adapters.kubernetes import Refused, Unreachable
from gpumeter_operator.decide.events import GATEWAY, SECRET, event
from gpumeter_operator.gateway.keys import Ignored

logger = logging.getLogger(__name__)

RETRY_S = 10.0  # the mirrors' longest pause: what they can reach again, an event can

Create = Callable[[dict[str, Any]], Awaitable[object]]
"""Creates an object; Refused 409 where it is there, and Unreachable."""


class Notices:
    """Secrets that are left out, told once each."""

    def __init__(self, create: Create, clock: Callable[[], datetime], retry_s: float = RETRY_S) -> None:
        self._create = create
        self._clock = clock
        self._retry_s = retry_s
        self._shown: frozenset[Ignored] = frozenset()
        self._untold: frozenset[Ignored] = frozenset()  # those without an event
        self._more = asyncio.Event()

    def show(self, ignored: Iterable[Ignored]) -> None:
        """Take all that are left out now. A sentence that is new goes to the log at once, to its Secrets by `run`."""
        now = frozenset(ignored)
        new = now - self._shown
        for reason, message in sorted({(one.reason, one.message) for one in new}):
            logger.warning("%s: %s", reason, message)
        self._untold = (self._untold | new) & now
        self._shown = now
        if self._untold:
            self._more.set()

    async def run(self) -> None:
        """Write the events, one at a time. Never ends by itself: one that is refused is told in the log, and left."""
        while True:
            await self._more.wait()
            self._more.clear()
            while self._untold:
                one = min(self._untold)
                try:
                    await self._create(_event(one, self._clock()))
                except Unreachable as problem:
                    logger.warning("No event yet at the Secret %s/%s: %s", one.namespace, one.name, problem)
                    await asyncio.sleep(self._retry_s)
                    continue
                except Refused as refusal:
                    if refusal.status != 409:  # 409: another gateway has written it, or this one before it restarted
                        logger.warning("No event at the Secret %s/%s: %s", one.namespace, one.name, refusal)
                self._untold -= {one}


def _event(one: Ignored, now: datetime) -> dict[str, Any]:
    about = {"metadata": {"namespace": one.namespace, "name": one.name, "uid": one.uid}}
    return event(about, "Warning", one.reason, one.message, now, of=SECRET, source=GATEWAY)
