"""The API process's end of the channel: starts the engine process and carries messages both ways.

Owns the process, its group, its output, and two threads, so that neither direction ever blocks the event loop. Does
not know what a message means; says `lost` once when the engine has closed the channel and everything it sent has been
handed over, and is `gone` when nothing of it is left.

Both directions are bounded. Events that the event loop has not handled make the reading thread wait, then the socket
fills (some 200 KiB, the kernel's default), then the engine waits before its next step. Commands are bounded by
admission; an engine that takes none of them is killed before they pile up.
"""

import asyncio
import errno
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from gpumeter_worker.engine.channel import Channel
from gpumeter_worker.engine.ending import END_S, ending
from gpumeter_worker.engine.group import alive
from gpumeter_worker.engine.messages import Command, EngineOptions, Event, Shutdown
from gpumeter_worker.engine.output import EngineOutput

T = TypeVar("T")
log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "gpumeter_worker.engine.process")
"""Gets the number of its end of the channel and the id of this process as arguments."""

# Threads that spin while they wait starve each other where cores are shared: measured on two busy cores, one request
# got 1.2 to 2.8 tokens/s with OpenMP's default. Threads that never spin are slow where cores are free: 17 tokens/s
# instead of 28. So they spin for a moment. Memory that a step gave back is kept for the next one, which would else take
# it from the kernel page by page: 5 %. Whoever sets any of it otherwise is obeyed.
_ENGINE_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "30000",
    "KMP_BLOCKTIME": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}

EVENTS_MAX = 64
"""Messages that were read and not handled. 64 steps are half a second of a fast decode, longer than any pause of an
event loop that is well, so that the device does not wait for it; at 64 sequences they are 0.3 MB, with log
probabilities of the 20 likeliest tokens 1.5 MB."""

_COMMANDS_PER_SEQUENCE = 4
"""A sequence is submitted and perhaps cancelled; the rest is for those that ended while the commands still waited."""

_LOOK_S = 0.01
_LOOK_S_MAX = 0.5
"""How soon it is looked again who is left of an engine that was killed; twice as late each time."""


class EngineLink:
    """One engine process from start to end. A link is not used again; a restart makes a new one."""

    def __init__(
        self,
        options: EngineOptions,
        sequences_max: int,
        on_events: Callable[["EngineLink", Sequence[Event]], None],
        on_lost: Callable[["EngineLink", str], None],
        program: Sequence[str] = PROGRAM,
        *,
        alive_of: Callable[[int], Sequence[int]] = alive,
        end_s: float = END_S,
    ) -> None:
        """Start the process. Both callbacks run in the event loop; `on_lost` is the last one. `alive_of` tells which
        processes of a group still hold something; `end_s` is what it may take to end once it has closed its channel.
        Raises OSError.
        """
        self._loop = asyncio.get_running_loop()
        self._on_events = on_events
        self._on_lost = on_lost
        self._commands: queue.Queue[Command | EngineOptions | None] = queue.Queue(
            _COMMANDS_PER_SEQUENCE * sequences_max + 16
        )
        self._room = threading.Semaphore(EVENTS_MAX)
        self._full = False
        self._killed_by = 0
        self._alive_of = alive_of
        self._end_s = end_s
        self._left: Sequence[int] = ()
        self._received = 0
        self._handled = 0
        self._gone = asyncio.Event()
        self._output = EngineOutput()
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [*program, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._output.target,
                stderr=self._output.target,
                env=_ENGINE_ENVIRONMENT | os.environ | {"OMP_NUM_THREADS": str(options.threads)},
                start_new_session=True,  # a group of its own, so that nothing it started outlives it
            )
        except BaseException:  # no process, no memory for one: nobody else closes what was opened for it
            ours.close()
            self._output.started()
            self._output.close()
            raise
        finally:
            theirs.close()
        self._output.started()
        self._channel: Channel[Command | EngineOptions, Sequence[Event]] = Channel(ours.detach())
        self._commands.put(options)
        self._sender = threading.Thread(target=self._send, name="engine-send", daemon=True)
        try:
            self._sender.start()
            threading.Thread(target=self._receive, name="engine-receive", daemon=True).start()
        except RuntimeError as error:  # a container that is at its limit of processes gives no thread either
            self.kill()
            self._process.wait()
            self._commands.put(None)
            self._channel.close()
            self._output.close()
            raise OSError(errno.EAGAIN, str(error)) from None

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    @property
    def killed_by(self) -> int:
        """The signal that ended it, told with its loss; 0 where it ended otherwise."""
        return self._killed_by

    @property
    def left(self) -> Sequence[int]:
        """Who of its group was killed with it and did not end yet, when it was last looked: its ranks, for one."""
        return self._left

    @property
    def received(self) -> int:
        """How many messages the engine has sent so far."""
        return self._received

    @property
    def unhandled(self) -> int:
        """How many of them wait for the event loop."""
        return self._received - self._handled

    @property
    def unsent(self) -> int:
        """How many commands wait for the engine."""
        return self._commands.qsize()

    def send(self, command: Command) -> None:
        """Queue a command. Never waits."""
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            if not self._full:
                log.error("the engine has taken none of %d commands; it is killed", self._commands.maxsize)
            self._full = True
            self.kill()

    async def stop(self, timeout_s: float) -> None:
        """Ask the engine to leave after its step; kill it if it does not in time."""
        self.send(Shutdown())
        try:
            async with asyncio.timeout(timeout_s):
                await self._gone.wait()
        except TimeoutError:
            self.kill()

    async def gone(self) -> None:
        """Wait until the process and all that it started are no more, and with them what they held of the device."""
        await self._gone.wait()

    def tell_stacks(self) -> None:
        """Have the engine and its ranks print where each of their threads is, as far as they still can."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGUSR2)

    def kill(self) -> None:
        """End the engine at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # Popen signals nobody once the process was waited for
            self._process.send_signal(number)

    def _send(self) -> None:
        while (message := self._commands.get()) is not None:
            try:
                self._channel.send(message)
            except OSError:
                return  # the receiving thread tells why

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                events = self._channel.receive()
                self._room.acquire()
                self._received += 1
                self._call(self._handle, events)
        self._call(self._lose, self._how_it_ended())
        with suppress(queue.Full):  # then the sender is not waiting for commands, and finds the socket closed
            self._commands.put_nowait(None)
        self._sender.join()
        self._channel.close()
        self._process.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the other ranks, and compilers
        self._wait_for_group()
        self._call(self._leave, None)
        with suppress(ChildProcessError):  # where this process is its container's first, they are its children now
            while True:
                os.waitid(os.P_PGID, self._process.pid, os.WEXITED)

    def _wait_for_group(self) -> None:
        """Without end: who waits for `gone` has the patience, and says what is to be done when it is over."""
        look_s = _LOOK_S
        while left := self._alive_of(self._process.pid):
            self._left = left
            time.sleep(look_s)
            look_s = min(2 * look_s, _LOOK_S_MAX)
        self._left = ()

    def _how_it_ended(self) -> str:
        """What a sentence says of the engine process. Clients wait for it, so what takes long to end is ended."""
        how, self._killed_by = ending(self._process, self._end_s)
        return how

    def _handle(self, events: Sequence[Event]) -> None:
        try:
            self._on_events(self, events)
        finally:
            self._handled += 1
            self._room.release()

    def _lose(self, how: str) -> None:
        self._on_lost(self, how)

    def _leave(self, _: None) -> None:
        self._gone.set()
        self._output.close()

    def _call(self, callback: Callable[[T], None], argument: T) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            log.debug("the event loop is closed; a message of the engine is dropped")
