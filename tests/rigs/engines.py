"""Programs that speak the engine's side of the channel and load no model, so that an engine's life is tried in moments.

Owns how such a program is written and started; what it does is the test's. Each is a real process at a real socket.
"""

import sys
from pathlib import Path
from textwrap import dedent

from gpumeter_worker.engine.messages import EngineOptions

_FRAME = """
import os, signal, subprocess, sys, time
from gpumeter_worker.engine.channel import Channel
from gpumeter_worker.engine.messages import *
from gpumeter_worker.engine.sequence import Finish
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.parts import Part

channel = Channel(int(sys.argv[1]))
options = channel.receive()

def ready():
    channel.send([PhaseEntered(Phase.LOAD, time.monotonic_ns())])
    channel.send([PhaseEntered(Phase.WARMUP, time.monotonic_ns())])
    channel.send([Ready(time.monotonic_ns(), 1024, 8, 100, frozenset(), "none", "", "float32", 8192)])

def step(*tokens):
    now_ns = time.monotonic_ns()
    parts = tuple(Part(token.session_id, 1, 1, False, 1) for token in tokens)
    channel.send([StepReport(now_ns - 1000, now_ns, 1000, parts, tokens, 1, 1)])

"""

_STEPPING = """
from gpumeter_worker.engine.blocks import PagedBlocks
from gpumeter_worker.engine.loop import Engine, Sampled
from gpumeter_worker.engine.process import serve
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.window import Window
from gpumeter_worker.metering.clock import HostClock

class OutOfMemoryError(RuntimeError):
    pass

class Runner:
    steps = 0

    def run(self, plan, clock):
        self.steps += 1
        clock.begin()
        self.check(plan)
        clock.end()
        return [Sampled(self.steps) for work in plan if work.samples]

    def copy(self, copies):
        pass

def serve_with(check):
    runner = Runner()
    runner.check = lambda plan: check(runner, plan)
    ready()
    blocks = PagedBlocks(128, 16, prefix=False)
    engine = Engine(runner, HostClock(), Limits(8, 256), frozenset(), 512, blocks)
    sys.exit(serve(channel, engine, Window(0, 8)))

"""


def stepping(folder: Path, check: str) -> tuple[str, ...]:
    """The command of the real engine on a runner that gives numbers; `check`, of (runner, plan), may fail a step."""
    return program(folder, _STEPPING + dedent(check) + "\nserve_with(check)\n")


def program(folder: Path, body: str) -> tuple[str, ...]:
    """The command of an engine that does what `body` says, with `channel`, `options`, `ready` and `step` at hand."""
    file = folder / f"engine-{len(list(folder.iterdir()))}.py"
    file.write_text(_FRAME + dedent(body))
    return (sys.executable, str(file))


def options(**changes: object) -> EngineOptions:
    """What a small engine is started with."""
    values: dict[str, object] = {
        "model_path": Path("/nowhere"),
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 1024,
        "max_batch_size": 8,
        "max_batch_tokens": 64,
        "max_wait_ms": 0,
        "threads": 1,
        "memory_bytes": 0,
    }
    return EngineOptions(**(values | changes))  # type: ignore[arg-type]


def is_gone(pid: int) -> bool:
    """Whether a process does nothing more: it is not there, or it is a zombie that somebody else has to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def children(pid: int) -> list[int]:
    """Of all threads of a process that runs, those included that ended and that nobody waited for."""
    for _ in range(100):
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            return sorted({int(child) for task in tasks for child in (task / "children").read_text().split()})
        except FileNotFoundError:  # a thread ended meanwhile, and another one has its children now
            continue
    raise ProcessLookupError(f"process {pid} is not there")
