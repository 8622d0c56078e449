"""Rank 0's hold on the other ranks of a split model: starts them, tells them each step, and knows when one is lost.

Owns their processes, which end with this one, and the sentence that names the rank which failed. Does not know what a
step holds, and no torch. A model that is not split has no ranks, and nothing of this is in its way.

No step is right without all ranks, so with one of them the engine ends, and the worker starts the next. Where a step
waits for a rank that is gone, nothing in this process may ever return; who waits on the device cannot even be told. So
the loss is seen by threads, which end the process if it has not ended by itself a moment later.
"""

import logging
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from socket import socketpair

from gpumeter_worker.engine.channel import Channel
from gpumeter_worker.engine.ending import END_S, ending
from gpumeter_worker.engine.faults import RankLost
from gpumeter_worker.engine.messages import EngineOptions, Event, Failed, Fatal
from gpumeter_worker.engine.mirror import Clean, Copies, Row, Step, Told

log = logging.getLogger("gpumeter_worker.engine.ranks")

PROGRAM = (sys.executable, "-m", "gpumeter_worker.engine.rank")
"""Gets as arguments: its number, the numbers of its files (channel, store, progress), and the id of this process."""

_PATIENCE_LOOKS = 30
_LOOK_S = 1.0
"""A rank that has not taken a step for so many looks hangs. It has nothing else to do than to take it, and what it
computed before was computed here, too. Looks are counted and not time: where the whole machine was stopped, nobody had
a chance."""

_FIRST_S = 0.2
"""A step also breaks off in those ranks that waited for the one that died. Who died is told first, and nobody else."""

_LEAVE_S = 0.5
"""How long one that was killed is waited for."""

_WHY_S = 0.5
"""How long a step that broke off waits to be told which rank it was; the threads see that at once."""

_NUMBER = struct.Struct("q")


def unrecorded(options: EngineOptions) -> tuple[EngineOptions, list[str]]:
    """The options of a split model, and sentences about what was asked for and is not done.

    A graph or a compiled model holds the exchange between the ranks. It is right only where all of them record and
    replay the same in the same order, and nothing here shows that they do.
    """
    off = []
    if options.cuda_graphs and options.device != "cpu":
        off.append("CUDA graphs are not captured")
    if options.compile:
        off.append("it is not compiled")
    split, why = f"the model is split over {options.ranks} GPUs", "their exchange would be recorded with it"
    return replace(options, cuda_graphs=False, compile=False), [f"{split}, so {what}: {why}" for what in off]


class Ranks:
    """Ranks 1 and up. `on_lost` is called once, from a thread, with what the worker is to be told."""

    def __init__(
        self,
        options: EngineOptions,
        on_lost: Callable[[Event], None],
        *,
        program: Sequence[str] = PROGRAM,
        look_s: float = _LOOK_S,
        patience_looks: int = _PATIENCE_LOOKS,
        end_s: float = END_S,
    ) -> None:
        """Start them. Raises OSError. Nobody waits until they are there: who meets them does."""
        self.options, self.remarks = unrecorded(options)
        self.size = options.ranks
        self.store = os.memfd_create("gpumeter-store")
        self._on_lost = on_lost
        self._look_s, self._patience_looks, self._end_s = look_s, patience_looks, end_s
        self._number = 0
        self._told = threading.Event()
        self._lost: Event | None = None
        self._ending = False
        self._lock = threading.Lock()
        progress = os.memfd_create("gpumeter-progress")
        os.ftruncate(progress, mmap.PAGESIZE)
        self._progress = mmap.mmap(progress, mmap.PAGESIZE)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel[EngineOptions | Told, Event]] = []
        for rank in range(1, self.size):
            self._start(rank, self.options, program, progress)
        os.close(progress)
        threading.Thread(target=self._look, name="ranks-look", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in self._processes]

    def step(self, rows: list[Row]) -> None:
        """Have every rank lay out this step and run it. Raises RankLost."""
        if self._lost is not None:
            raise RankLost(self.why())
        self._number += 1
        self._send(Step(self._number, rows))

    def also(self, told: Copies | Clean) -> None:
        """Something beside steps, in its place between them. Raises RankLost."""
        self._send(told)

    def why(self) -> str:
        """Which rank was lost, and how; empty where none was."""
        lost = self.loss()
        return lost.message if isinstance(lost, Fatal) else lost.cause if isinstance(lost, Failed) else ""

    def loss(self) -> Event | None:
        """What the worker is to be told of it. Waits a moment, for whoever fails because of a rank may be first."""
        self._told.wait(_WHY_S)
        return self._lost

    def leave(self) -> None:
        """No step follows: they have nothing left to do, and nothing to say."""
        with self._lock:
            self._ending = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):  # a driver that hangs; the kernel ends it when that lets go
                process.wait(_LEAVE_S)

    def _start(self, rank: int, options: EngineOptions, program: Sequence[str], progress: int) -> None:
        ours, theirs = socketpair()
        files = (theirs.fileno(), self.store, progress)
        try:
            process = subprocess.Popen(
                [*program, str(rank), *map(str, files), str(os.getpid())], pass_fds=files, stdin=subprocess.DEVNULL
            )
        finally:
            theirs.close()
        channel: Channel[EngineOptions | Told, Event] = Channel(ours.detach())
        self._processes.append(process)
        self._channels.append(channel)
        with suppress(OSError):  # its thread says why
            channel.send(options)
        listening = threading.Thread(
            target=self._listen, args=(rank, process, channel), name=f"rank-{rank}", daemon=True
        )
        listening.start()

    def _send(self, told: Told) -> None:
        for channel in self._channels:
            try:
                channel.send(told)
            except OSError as error:
                raise RankLost(self.why() or "a rank is gone") from error

    def _listen(
        self, rank: int, process: "subprocess.Popen[bytes]", channel: Channel[EngineOptions | Told, Event]
    ) -> None:
        """A rank says nothing but why it ends."""
        said: Event | None = None
        with suppress(EOFError, OSError):
            said = channel.receive()
        named = f"rank {rank} of {self.size}"
        match said:
            case Fatal():
                self._lose(Fatal(said.reason, f"{named}: {said.message}"))
            case Failed():
                time.sleep(_FIRST_S)
                self._lose(Failed(f"{named} ended itself: {said.cause}"))
            case _:
                how, killed_by = ending(process, self._end_s)
                self._lose(Failed(f"{named} {how}", killed_by))

    def _look(self) -> None:
        """Whether every rank has taken the step that was told last."""
        still, seen = 0, 0
        while not self._ending:
            time.sleep(self._look_s)
            number = self._number
            behind = [rank for rank in range(1, self.size) if self._taken(rank) < number]
            still = still + 1 if behind and number == seen else 0
            seen = number
            if still >= self._patience_looks:
                passed_s = still * self._look_s
                self._lose(Failed(f"rank {behind[0]} of {self.size} took no step for {passed_s:.0f} s and hangs"))
                return

    def _taken(self, rank: int) -> int:
        number: int = _NUMBER.unpack_from(self._progress, rank * _NUMBER.size)[0]
        return number

    def _lose(self, event: Event) -> None:
        with self._lock:
            if self._ending or self._lost is not None:
                return
            self._lost = event
        self._told.set()
        log.error("%s", self.why())
        self._on_lost(event)
