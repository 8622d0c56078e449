"""The engine process: takes commands from the channel, turns the engine, sends what happened.

Owns the process's own life: start-up in phases, the wait for work, and the end, which never comes later than that of
the API process. Started as `python -m gpumeter_worker.engine.process FD PARENT` by engine.link. Knows no HTTP and no
journal.

At idle it waits in the channel and uses no time. A launched step that is not finished is looked at every half
millisecond, and only while nothing else can be launched.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

from gpumeter_worker.engine.channel import Channel
from gpumeter_worker.engine.faults import fault_of
from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import (
    Cancel,
    Command,
    EngineOptions,
    Event,
    Failed,
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


_PR_SET_PDEATHSIG = 1

EngineChannel = Channel[Sequence[Event], Command | EngineOptions]


def main() -> int:
    """Serve commands from the channel whose file descriptor is the first argument, until it closes."""
    # The API process decides when a container's SIGTERM or a terminal's Ctrl-C ends the engine.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(int(sys.argv[2]))
    configure_logging()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)  # where an engine hangs, whoever holds the interpreter's lock
    channel: EngineChannel = Channel(int(sys.argv[1]))
    try:
        options = channel.receive()
        if not isinstance(options, EngineOptions):
            raise TypeError("the first message on the channel must be the engine's options")
        return _run(channel, options)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the API process is gone; so is everything to do


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the API process ends, even in a step that never returns.

    Elsewhere than on Linux the end of the channel says it, after the step.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(0)


def _run(channel: EngineChannel, options: EngineOptions) -> int:
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
    except Exception as error:
        log.exception("the engine cannot start")
        channel.send([Failed(f"start-up raised {type(error).__name__}")])
        return 1
    ready = runner.ready(time.monotonic_ns())
    engine = Engine(runner, clock, Limits(runner.slots, options.max_batch_tokens), ready.eos_ids, runner.max_model_len)
    channel.send([ready])
    log.info("the engine serves with %d slots of %d tokens", ready.max_batch_size, ready.max_model_len)
    while _take_commands(channel, engine, options):
        try:
            events = engine.turn()
        except Exception as error:
            return _give_up(channel, error)
        if events:
            channel.send(events)
        elif engine.busy and not engine.stepping:
            time.sleep(_POLL_S)  # a step is on the device and nothing else can be launched
    return 0


def _give_up(channel: EngineChannel, error: Exception) -> int:
    """A step failed in a way that leaves nothing to rely on: say why, and end."""
    log.exception("a step failed")
    channel.send([Failed(fault_of(error).sentence)])
    channel.close()  # a device in an unknown state may keep the process from ending by itself; it is ended then
    return 1


def _take_commands(channel: EngineChannel, engine: Engine, options: EngineOptions) -> bool:
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
        command = channel.receive()
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
