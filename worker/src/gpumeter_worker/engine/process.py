"""The engine process: takes commands from the channel, turns the engine, sends what happened.

Owns the process's own life: start-up in phases, the wait for work, and the end. Started as
`python -m gpumeter_worker.engine.process FD` by engine.link. Knows no HTTP and no journal.
"""

import logging
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import (
    Cancel,
    Command,
    EngineOptions,
    Event,
    Fatal,
    PhaseEntered,
    Shutdown,
    Submit,
)
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.log import configure_logging
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.clock import step_clock

log = logging.getLogger("gpumeter_worker.engine.process")

_POLL_S = 0.0005
"""How soon a launched step is looked at again when there is nothing else to launch."""


def main() -> int:
    """Serve commands from the channel whose file descriptor is the first argument, until it closes."""
    # The API process decides when a container's SIGTERM or a terminal's Ctrl-C ends the engine.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging()
    channel: Connection[Sequence[Event], Command | EngineOptions] = Connection(int(sys.argv[1]))
    try:
        options = channel.recv()
        if not isinstance(options, EngineOptions):
            raise TypeError("the first message on the channel must be the engine's options")
        return _run(channel, options)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the API process is gone; so is everything to do


def _run(channel: "Connection[Sequence[Event], Command | EngineOptions]", options: EngineOptions) -> int:
    # torch and transformers are imported here: seconds that count as `init`, and that nobody else pays.
    from gpumeter_worker.engine.model import LoadFailed, ModelRunner  # noqa: PLC0415

    try:
        channel.send([PhaseEntered(Phase.LOAD, time.monotonic_ns())])
        runner = ModelRunner(options)
        clock = step_clock(options.device)
        channel.send([PhaseEntered(Phase.WARMUP, time.monotonic_ns())])
        runner.warm_up(clock, options.max_batch_tokens)
    except LoadFailed as error:
        channel.send([Fatal(error.reason, str(error))])
        return 3
    ready = runner.ready(time.monotonic_ns())
    engine = Engine(runner, clock, Limits(runner.slots, options.max_batch_tokens), ready.eos_ids, runner.max_model_len)
    channel.send([ready])
    log.info("the engine serves with %d slots of %d tokens", ready.max_batch_size, ready.max_model_len)
    while _take_commands(channel, engine, options):
        events = engine.turn()
        if events:
            channel.send(events)
        elif not engine.stepping:
            time.sleep(_POLL_S)  # a step is on the device and nothing else can be launched
    return 0


def _take_commands(
    channel: "Connection[Sequence[Event], Command | EngineOptions]", engine: Engine, options: EngineOptions
) -> bool:
    """Apply every command that has come; from idle, wait for one, then up to maxWaitMs for company. False: leave."""
    idle = not engine.busy
    deadline = 0.0
    while True:
        if idle and not engine.busy:
            wait_s: float | None = None
        else:
            wait_s = (
                max(0.0, deadline - time.monotonic()) if deadline and engine.waiting < options.max_batch_size else 0
            )
        if not channel.poll(wait_s):
            return True
        command = channel.recv()
        match command:
            case Submit():
                engine.submit(command)
                if idle and not deadline:
                    deadline = time.monotonic() + options.max_wait_ms / 1000
            case Cancel():
                engine.cancel(command)
            case Shutdown():
                return False


if __name__ == "__main__":
    sys.exit(main())
