"""The two processes that bench-kill kills: a worker's meter over its real journal and usage API, and a collector.

Owns what each does from its fork to its end, and where it may kill itself: mid-commit, between a commit and its answer,
in a trim, in the ledger's statements, around an acknowledgement. Engine and time are made up (a step takes no real
time), everything between a step and the ledger is the product's. Does not know when it is killed nor what must hold.

What both tell of themselves outlives them: numbers in shared memory, and lines in a file that is only appended to.
"""

import asyncio
import ctypes
import gc
import json
import mmap
import os
import random
import signal
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy import event
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target, Workers
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.flow.collect import Collector
from gpumeter_usage.page import Acknowledgement, JournalStatus
from gpumeter_usage.period import SECOND_NS
from gpumeter_usage.record import Status
from gpumeter_worker.api.usage import usage_app
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.meter import Identity, Meter
from gpumeter_worker.metering.parts import Part
from gpumeter_worker.metering.profiles import Profiles
from gpumeter_worker.metering.writer import JournalWriter
from gpumeter_worker.settings import Settings
from gpumeter_worker.telemetry.watch import GpuWatch, Metered
from rigs.ledger import TENANTS, TOKEN, inline

CHECKPOINT_NS = 5 * SECOND_NS
"""The worker's default; the driver flushes when this much of its own time has passed, or when a session ended."""
STEP_NS_MAX = 40_000_000
GAP_NS_MAX = 3_000_000
PULL_S = 0.01

_PR_SET_PDEATHSIG = 1

WORKER_POINTS = ("insert", "commit", "committed", "answer", "trim")
COLLECTOR_POINTS = ("statement", "commit", "taken", "acknowledged")


@dataclass(frozen=True)
class Kill:
    """When a process dies: at the `at`-th passage of a point, or, where there is none, when somebody else kills it."""

    point: str = ""
    at: int = 0


class Shared:
    """A few numbers in memory that parent and children share and no kill takes away."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 40)

    def _get(self, index: int) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * index)[0])

    def _set(self, index: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * index, value)

    now_ns = property(lambda self: self._get(0), lambda self, value: self._set(0, value))
    """The worker's time, as far as it has lived."""
    leaving = property(lambda self: self._get(1), lambda self, value: self._set(1, value))
    """1: the worker is to drain and seal."""
    floor_ns = property(lambda self: self._get(2), lambda self, value: self._set(2, value))
    """How far the last flush reaches whose commit was confirmed."""
    flushes = property(lambda self: self._get(3), lambda self, value: self._set(3, value))
    """How many this life of the worker has committed."""
    pulls = property(lambda self: self._get(4), lambda self, value: self._set(4, value))
    """How many this life of the collector has made."""


class Suicide:
    """Kills its process at the right passage of the right point."""

    def __init__(self, kill: Kill) -> None:
        self._kill = kill
        self._passed = 0

    def __call__(self, point: str) -> None:
        if point == self._kill.point:
            self._passed += 1
            if self._passed == self._kill.at:
                os.kill(os.getpid(), signal.SIGKILL)


class Diary:
    """What a process did, a line at a time. What was written is in the kernel, and stays when the process goes."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, **what: object) -> None:
        """One line."""
        os.write(self._file, json.dumps(what).encode() + b"\n")


@dataclass
class Served:
    """As much of a worker as the usage API looks at."""

    journal: JournalWriter
    settings: Settings
    profiles: Profiles
    gpu: GpuWatch


def _nothing_metered() -> Metered:
    return Metered(0, 0, serving=False, busy=False)


# ---- the worker ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerRun:
    """One boot."""

    folder: Path
    of: Worker
    settings: Settings
    boot_id: str
    started_ns: int
    seed: int
    kill: Kill
    listening: socket.socket
    shared: Shared


def run_worker(run: WorkerRun) -> None:
    """Serve usage and meter made-up steps until told to leave; then drain, seal, and serve until killed."""
    asyncio.run(_worker(run))


async def _worker(run: WorkerRun) -> None:
    die, diary, shared = Suicide(run.kill), Diary(run.folder / "diary"), run.shared
    shared.now_ns = run.started_ns
    identity = Identity(
        run.of.worker_uid, run.boot_id, run.of.service_key, run.of.model, run.of.gpu_class, "cuda", "GPU-1"
    )
    writer = JournalWriter(run.folder / "journal", run.of.worker_uid, run.of.service_key, 2**30)
    await writer.open(identity, run.started_ns)
    if writer.problem:
        raise SystemExit(writer.problem)
    _watch_statements(writer, die)
    profiles, no_gpu = Profiles(run.folder), GpuWatch(0, _nothing_metered, lambda _: None)
    app = _Answers(usage_app(Served(writer, run.settings, profiles, no_gpu)), die, diary)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve([run.listening]))
    meter = Meter(identity, uncalibrated(Rule.KNEE, "cuda"), run.started_ns)
    engine = _Engine(meter, random.Random(run.seed), shared, run.boot_id)
    while not shared.leaving:
        ended = engine.live(until_ns=shared.floor_ns + CHECKPOINT_NS)
        if (ended and engine.is_soon()) or shared.now_ns >= shared.floor_ns + CHECKPOINT_NS:
            await _flush(writer, engine, die, diary, run)
    engine.drain()
    await _flush(writer, engine, die, diary, run, seal=True)
    await serving


async def _flush(
    writer: JournalWriter, engine: "_Engine", die: Suicide, diary: Diary, run: WorkerRun, *, seal: bool = False
) -> None:
    meter = engine.meter
    flush = meter.cut(run.shared.now_ns) or meter.nothing()
    diary.write(
        cut=run.boot_id,
        frontier=flush.frontier_ns,
        sessions=engine.used_ns,
        unmeasured=meter.accounts.unmeasured_ns,
    )
    closing = meter.seal(Status.DRAINED) if seal else None
    if not await writer.append(flush, closing) or writer.head is None:
        raise SystemExit(writer.problem)
    die("committed")
    run.shared.floor_ns = flush.frontier_ns
    run.shared.flushes += 1
    diary.write(committed=run.boot_id, seq=writer.head.seq, hash=writer.head.hash, frontier=flush.frontier_ns)


def _watch_statements(writer: JournalWriter, die: Suicide) -> None:
    """SQLite tells of a statement before it runs: at COMMIT all is in the log but for its last, decisive frame."""
    trimming = False

    def about_to(statement: str) -> None:
        nonlocal trimming
        word = statement.split(maxsplit=1)[0]
        if word == "BEGIN":
            trimming = False
        elif word == "DELETE":
            trimming = True
        elif word == "INSERT":
            die("insert")
        elif word == "COMMIT":
            die("trim" if trimming else "commit")

    journal = writer._journal
    assert journal is not None
    journal._database.set_trace_callback(about_to)


class _Answers:
    """Notes what is acknowledged before the collector can know, and may die between a commit and its answer."""

    def __init__(self, app: ASGIApp, die: Suicide, diary: Diary) -> None:
        self._app, self._die, self._diary = app, die, diary

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""

        async def received() -> Message:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                if scope["path"].endswith("/acknowledge") and message["status"] == 204:
                    self._diary.write(trimmed=json.loads(body)["boot_id"], seq=json.loads(body)["seq"])
                self._die("answer")
            await send(message)

        await self._app(scope, received, sent)


class _Engine:
    """Steps of a made-up engine in the worker's own time: batches, cancels, failures, crashes, phases."""

    def __init__(self, meter: Meter, dice: random.Random, shared: Shared, boot_id: str) -> None:
        self.meter = meter
        self.used_ns = 0
        """What all steps of this boot have given sessions so far."""
        self._dice, self._shared, self._boot_id = dice, shared, boot_id
        self._running: dict[str, int] = {}
        self._named = 0
        for phase in (Phase.LOAD, Phase.WARMUP, Phase.SERVING):
            self._pass(dice.randrange(1, 2 * SECOND_NS))
            meter.enter(phase, shared.now_ns)

    def live(self, until_ns: int) -> bool:
        """A few steps; whether a session ended. Never beyond `until_ns` by more than a step."""
        meter, dice = self.meter, self._dice
        for _ in range(dice.randrange(1, 30)):
            if self._shared.now_ns >= until_ns:
                return False
            while len(self._running) < dice.randrange(1, 9):
                self._named += 1
                session = f"s-{self._boot_id}-{self._named}"
                meter.begin(session, dice.choice(TENANTS), self._shared.now_ns)
                self._running[session] = dice.randrange(1, 60)
            if dice.random() < 0.003:
                self._crash()
                return True
            self._step()
            if any(left <= 0 for left in self._running.values()) or dice.random() < 0.02:
                self._end()
                return True
        return False

    def is_soon(self) -> bool:
        """Whether the end of a session is flushed before more happens; several share a transaction."""
        return self._dice.random() < 0.3

    def drain(self) -> None:
        """SIGTERM: what runs is cut off after a last step."""
        self.meter.enter(Phase.DRAIN, self._shared.now_ns)
        if self._running:
            self._step()
        self._end_all(Status.CANCELLED)
        self._pass(self._dice.randrange(SECOND_NS))

    def _step(self) -> None:
        self._pass(self._dice.randrange(GAP_NS_MAX))
        started_ns = self._shared.now_ns
        took_ns = self._dice.randrange(1, STEP_NS_MAX)
        parts = [
            Part(name, self._dice.randrange(1, 64), left, left > 50, 1, prompt_tokens=1)
            for name, left in self._running.items()
        ]
        self._pass(took_ns)
        self.used_ns += sum(self.meter.step(started_ns, self._shared.now_ns, took_ns, parts))
        for name in self._running:
            self._running[name] -= 1

    def _end(self) -> None:
        over = [name for name, left in self._running.items() if left <= 0]
        if not over:
            over, status = [self._dice.choice(list(self._running))], Status.CANCELLED
        else:
            status = Status.FINISHED
        for name in over:
            self.meter.end(name, status, self._shared.now_ns)
            del self._running[name]

    def _crash(self) -> None:
        """The engine process dies in a step, and the next one loads."""
        self._pass(self._dice.randrange(STEP_NS_MAX))
        self.meter.lose(self._shared.now_ns)
        self._end_all(Status.FAILED)
        for phase in (Phase.INIT, Phase.LOAD, Phase.SERVING):
            self.meter.enter(phase, self._shared.now_ns)
            self._pass(self._dice.randrange(SECOND_NS // 4))

    def _end_all(self, status: Status) -> None:
        for name in self._running:
            self.meter.end(name, status, self._shared.now_ns)
        self._running = {}

    def _pass(self, duration_ns: int) -> None:
        self._shared.now_ns += duration_ns


# ---- the collector ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollectorRun:
    """One life of the collector."""

    ledger: Path
    of: Worker
    port: int
    kill: Kill
    now_ns: int
    shared: Shared


def run_collector(run: CollectorRun) -> None:
    """Pull until the worker has sealed its last boot and everything is acknowledged."""
    asyncio.run(_collector(run))


async def _collector(run: CollectorRun) -> None:
    die = Suicide(run.kill)
    ledger = Ledger(f"sqlite:///{run.ledger}")
    event.listen(ledger.engine, "before_cursor_execute", lambda *_: die("statement"))
    event.listen(ledger.engine, "commit", lambda *_: die("commit"))
    workers = _MortalWorkers(die)
    target = Target("127.0.0.1", TOKEN, run.port)
    collector = Collector(ledger, workers, inline, lambda: run.now_ns)
    while True:
        try:
            if await collector.pull(run.of, target) and workers.all_is_acknowledged:
                break
            run.shared.pulls += 1
        except LedgerUnavailable:  # a former collector's lock; it is gone in a moment
            pass
        await asyncio.sleep(PULL_S)
    await workers.close()


class _MortalWorkers(Workers):
    """May die between the ledger's commit and the acknowledgement, or right after that."""

    def __init__(self, die: Suicide) -> None:
        super().__init__()
        self._die = die
        self.all_is_acknowledged = False

    async def status(self, target: Target) -> JournalStatus:
        status = await super().status(target)
        self.all_is_acknowledged = all(boot.sealed and boot.acknowledged_seq == boot.head_seq for boot in status.boots)
        return status

    async def acknowledge(self, target: Target, acknowledgement: Acknowledgement) -> None:
        self._die("taken")
        await super().acknowledge(target, acknowledgement)
        self._die("acknowledged")


def preload() -> None:
    """What a first child would import is imported by the parent: a child's life is for its work."""
    import uvicorn.loops.auto
    import uvicorn.protocols.http.auto
    import uvicorn.protocols.websockets.auto

    uvicorn.Config(FastAPI(), lifespan="off", log_config=None).load()
    gc.collect()
    gc.freeze()  # what is here now is never looked at again, so that children need no copies of it


def fork(work: Any, run: Any) -> int:
    """A child that does this and nothing else; its id."""
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives a bench that is cut off
    try:
        work(run)
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
