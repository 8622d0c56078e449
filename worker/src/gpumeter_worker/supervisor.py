"""Keeps one engine process serving: starts it, hands on what it says, tells how it was lost, starts the next.

Owns the engine's life between the worker's start and its end: when the next one starts, and the reason that readiness
tells meanwhile. Does not know sessions, accounts or HTTP; an engine's events arrive in order, and its loss after them.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from gpumeter_worker import diagnosis
from gpumeter_worker.engine.link import EngineLink
from gpumeter_worker.engine.messages import Command, EngineOptions, Event, Fatal, Ready

log = logging.getLogger(__name__)

_BACK_OFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_HEALTHY_S = 60.0
"""An engine that served this long starts anew without the back-off of its predecessors."""

_KILLED_STARTS_MAX = 3


class Supervisor:
    """The state of one worker's engines, one after the other. `ready` is None while none serves."""

    def __init__(self, on_event: Callable[[Event], None], on_lost: Callable[[str], None]) -> None:
        """Both callbacks run in the event loop; `on_lost` gets how the engine ended, as the start of a sentence."""
        self.ready: Ready | None = None
        self.problem = ""
        self._on_event = on_event
        self._on_lost = on_lost
        self._link: EngineLink | None = None
        self._leaving = False
        self._starts = 0
        self._killed_starts = 0
        self._ready_ns = 0
        self.lost = asyncio.Event()
        self._failed: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()

    async def run(self, options: EngineOptions) -> None:
        """Keep an engine running until `leave`. Raises StartupFailed when none can serve here."""
        try:
            while not self._leaving:
                self.lost.clear()
                self._link = EngineLink(options, self._handle, self._lose)
                lost = asyncio.create_task(self.lost.wait())
                await asyncio.wait((lost, self._failed), return_when=asyncio.FIRST_COMPLETED)
                lost.cancel()
                if self._failed.done():
                    self._failed.result()
                await asyncio.sleep(self._back_off_s())
            await asyncio.Event().wait()
        finally:
            self.kill()

    def send(self, command: Command) -> None:
        """Tell the engine, if there is one."""
        if self._link is not None:
            self._link.send(command)

    def leave(self) -> None:
        """The worker is on its way out: an engine that is lost from now on is not replaced."""
        self._leaving = True

    async def stop(self, timeout_s: float) -> None:
        """End the engine after its step; one that does not serve yet, or does not end in time, is killed."""
        self.leave()
        if self._link is not None:
            self._link.kill() if self.ready is None else await self._link.stop(timeout_s)

    def kill(self) -> None:
        """End the engine at once."""
        self.leave()
        if self._link is not None:
            self._link.kill()

    def _handle(self, link: EngineLink, events: Sequence[Event]) -> None:
        if link is not self._link:
            return
        for event in events:
            match event:
                case Fatal() if not self._failed.done():
                    self._failed.set_exception(diagnosis.StartupFailed(event.reason, event.message))
                case Ready():
                    self.ready, self.problem = event, ""
                    self._ready_ns, self._killed_starts = time.monotonic_ns(), 0
            self._on_event(event)

    def _lose(self, link: EngineLink, how: str) -> None:
        if link is not self._link:
            return
        if not self._leaving:
            self.problem = f"{how}; it is being started again"
            if self.ready is None and f"signal {signal.SIGKILL.value}" in how:
                self._killed_starts += 1
        self.ready = None
        self._on_lost(how)
        if self._killed_starts >= _KILLED_STARTS_MAX and not self._failed.done():
            self._failed.set_exception(
                diagnosis.StartupFailed(
                    diagnosis.OUT_OF_MEMORY,
                    "the engine was killed three times while it loaded the model, most likely for memory; raise "
                    "resources.memory or use a smaller model",
                )
            )
        self.lost.set()

    def _back_off_s(self) -> float:
        if self._ready_ns and time.monotonic_ns() - self._ready_ns > _HEALTHY_S * 1e9:
            self._starts = 0
        wait_s = _BACK_OFF_S[min(self._starts, len(_BACK_OFF_S) - 1)]
        self._starts += 1
        return wait_s
