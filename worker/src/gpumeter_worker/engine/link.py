"""The API process's end of the channel: starts the engine process and carries messages both ways.

Owns the process and two threads, so that neither direction ever blocks the event loop. Does not know what a message
means; says `lost` once when the process is gone and everything it sent has been handed over.
"""

import asyncio
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from gpumeter_worker.engine.messages import Command, EngineOptions, Event, Shutdown

T = TypeVar("T")
log = logging.getLogger(__name__)

# Threads that spin while they wait starve each other where cores are shared: measured on two busy cores, one request
# got 1.2 to 2.8 tokens/s with OpenMP's default and 9 to 12.6 with this. Whoever sets it otherwise is obeyed.
_ENGINE_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


class EngineLink:
    """One engine process from start to end. A link is not used again; a restart makes a new one."""

    def __init__(
        self,
        options: EngineOptions,
        on_events: Callable[["EngineLink", Sequence[Event]], None],
        on_lost: Callable[["EngineLink", str], None],
    ) -> None:
        """Start the process. Both callbacks run in the event loop; `on_lost` is the last one."""
        self._loop = asyncio.get_running_loop()
        self._on_events = on_events
        self._on_lost = on_lost
        self._outgoing: queue.SimpleQueue[Command | EngineOptions | None] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpumeter_worker.engine.process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=_ENGINE_ENVIRONMENT | os.environ | {"OMP_NUM_THREADS": str(options.threads)},
            )
        self._channel: Connection[Command | EngineOptions, Sequence[Event]] = Connection(ours.detach())
        self._outgoing.put(options)
        threading.Thread(target=self._send, name="engine-send", daemon=True).start()
        threading.Thread(target=self._receive, name="engine-receive", daemon=True).start()

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Queue a command; admission bounds how many there can be."""
        self._outgoing.put(command)

    async def stop(self, timeout_s: float) -> None:
        """Ask the engine to leave after its step; kill it if it does not in time."""
        self._outgoing.put(Shutdown())
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.to_thread(self._process.wait)
        except TimeoutError:
            self.kill()

    def kill(self) -> None:
        """End the engine at once."""
        self._process.kill()

    def _send(self) -> None:
        while (message := self._outgoing.get()) is not None:
            try:
                self._channel.send(message)
            except OSError:
                return  # the receiving thread tells why

    def _receive(self) -> None:
        try:
            while True:
                self._call(self._on_events, self._channel.recv())
        except (EOFError, OSError):
            pass
        status = self._process.wait()
        self._outgoing.put(None)
        self._channel.close()
        ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self._call(self._on_lost, f"the engine process {ended}")

    def _call(self, callback: Callable[["EngineLink", T], None], argument: T) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, self, argument)
        except RuntimeError:
            log.debug("the event loop is closed; a message of the engine is dropped")
