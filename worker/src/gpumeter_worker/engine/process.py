"""The engine process: takes commands from the channel, turns the engine, sends what happened.

Owns the process's own life: start-up in phases, the wait for work, and the end, which never comes later than that of
the API process. Started as `python -m gpumeter_worker.engine.process FD PARENT` by engine.link. Knows no HTTP and no
journal.

At idle it waits in the channel and uses no time. A launched step that is not finished is looked at every half
millisecond, and only while nothing else can be launched.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from gpumeter_worker.engine.calibrating import calibrate, room_of
from gpumeter_worker.engine.channel import Channel
from gpumeter_worker.engine.faults import Fault, RankLost, fault_of
from gpumeter_worker.engine.lifeline import die_with
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
from gpumeter_worker.engine.ranks import Ranks
from gpumeter_worker.engine.window import Window
from gpumeter_worker.failure import first_line
from gpumeter_worker.log import configure_logging
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.clock import step_clock

log = logging.getLogger("gpumeter_worker.engine.process")

_POLL_S = 0.0005
"""How soon a launched step is looked at again when there is nothing else to launch."""


_COMMANDS_MAX = 1024
"""A flood of commands holds up those that run for no longer than it takes to read this many."""

_SHEDS_MAX = 3
"""So many steps in a row may lack memory, each with fewer sequences than the one before. Then something holds it."""

_GRACE_S = 0.3
"""How long a process that has lost a rank may take to end by itself, with all that it measured, before it is ended."""

EngineChannel = Channel[Sequence[Event], Command | EngineOptions]


def main() -> int:
    """Serve commands from the channel whose file descriptor is the first argument, until it closes."""
    # The API process decides when a container's SIGTERM or a terminal's Ctrl-C ends the engine.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(int(sys.argv[2]))
    configure_logging()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)  # where an engine hangs, whoever holds the interpreter's lock
    channel: EngineChannel = Channel(int(sys.argv[1]))
    split = False
    try:
        options = channel.receive()
        if not isinstance(options, EngineOptions):
            raise TypeError("the first message on the channel must be the engine's options")
        split = options.ranks > 1
        status = _run_split(channel, options) if split else _run(channel, options)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # the API process is gone; so is everything to do
    except Exception as error:
        log.exception("the engine failed")
        with suppress(OSError):
            channel.send([Failed(fault_of(error).sentence)])
        status = 1
    if split:  # what still waits for a rank keeps the interpreter from ending; clients and drains wait
        logging.shutdown()
        os._exit(status)
    return status


def _run_split(channel: EngineChannel, options: EngineOptions) -> int:
    """As rank 0 of several. One that is lost ends this process, whatever it waits for."""
    shared = _Shared(channel)
    try:
        ranks = Ranks(options, lambda event: _end_after(shared, event))
    except OSError as error:
        shared.send([Failed(f"the {options.ranks} ranks of the model cannot be started ({first_line(error)})")])
        return 1
    try:
        return _run(shared, ranks.options, ranks)
    except Exception as error:
        lost = ranks.loss()
        if lost is None and not isinstance(error, RankLost):
            raise
        log.exception("the engine lost a rank")
        shared.send([lost or Failed(fault_of(error).sentence)])
        return 1
    finally:
        ranks.leave()


class _Shared(Channel[Sequence[Event], Command | EngineOptions]):
    """A channel on which a second thread may send: one message at a time."""

    def __init__(self, channel: EngineChannel) -> None:
        self._channel = channel
        self.sending = threading.Lock()

    def send(self, message: Sequence[Event]) -> None:
        """See Channel."""
        with self.sending:
            self._channel.send(message)

    def receive(self) -> Command | EngineOptions:
        """See Channel."""
        return self._channel.receive()

    def poll(self, timeout_s: float | None) -> bool:
        """See Channel."""
        return self._channel.poll(timeout_s)

    def close(self) -> None:
        """See Channel."""
        with self.sending:
            self._channel.close()


def _end_after(channel: _Shared, event: Event) -> None:
    """In a thread: who is in a step is given a moment to report what was measured, and then nobody waits for it."""
    time.sleep(_GRACE_S)
    with suppress(OSError, ValueError):  # the worker is gone, or was told already
        channel.send([event])
    os._exit(3 if isinstance(event, Fatal) else 1)


def _run(channel: EngineChannel, options: EngineOptions, ranks: Ranks | None = None) -> int:
    # torch and transformers are imported here: seconds that count as `init`, and that nobody else pays.
    from gpumeter_worker.engine.model import LoadFailed, ModelRunner  # noqa: PLC0415

    try:
        channel.send([PhaseEntered(Phase.LOAD, time.monotonic_ns())])
        runner = ModelRunner(options, ranks)
        clock = step_clock(options.device)
        channel.send([PhaseEntered(Phase.WARMUP, time.monotonic_ns())])
        runner.warm_up(clock)
    except LoadFailed as error:
        channel.send([Fatal(error.reason, str(error))])
        return 3
    except Exception as error:
        log.exception("the engine cannot start")
        lost = None if ranks is None else ranks.loss()
        channel.send([lost or Failed(f"start-up raised {type(error).__name__}")])
        return 1
    blocks = runner.blocks()
    room = room_of(blocks, runner.limits.sequences, options.max_batch_tokens, runner.max_model_len, runner.cache_tokens)
    calibration = calibrate(
        runner,
        clock,
        blocks,
        room,
        subject_of=runner.subject,
        budget_ns=options.calibration_ms * 10**6,
        stored_in=options.profiles_dir,
    )
    ready = replace(runner.ready(time.monotonic_ns()), calibration=calibration)
    engine = Engine(runner, clock, runner.limits, ready.eos_ids, runner.max_model_len, runner.blocks())
    window = Window(options.max_wait_ms * 10**6, ready.max_batch_size)
    channel.send([ready])
    log.info("the engine serves up to %d sequences of %d tokens", ready.max_batch_size, ready.max_model_len)
    for remark in ready.remarks:
        log.warning("%s", remark)
    return serve(channel, engine, window)


def serve(channel: EngineChannel, engine: Engine, window: Window) -> int:
    """Turn the engine until it is told to leave, or until a step fails in a way that only a new process survives."""
    sheds = 0
    while _take_commands(channel, engine, window):
        try:
            events = engine.turn()
            sheds = 0 if events else sheds
        except Exception as error:
            fault = fault_of(error)
            log.exception("a step failed")
            sheds += 1
            told = engine.shed(fault.sentence) if fault.memory and sheds <= _SHEDS_MAX else None
            if told is None:
                return _give_up(channel, engine, fault)
            events = told
        if events:
            channel.send(events)
        elif engine.busy and not engine.stepping:
            time.sleep(_POLL_S)  # a step is on the device and nothing else can be launched
    with suppress(Exception):  # whoever told it to leave may be gone
        channel.send(engine.leave())
    return 0


def _give_up(channel: EngineChannel, engine: Engine, fault: Fault) -> int:
    """Nothing here can be relied on any more, except what was measured: report that, say why, and end."""
    with suppress(Exception):  # the device may not even tell which steps it finished
        channel.send(engine.last_report())
    channel.send([Failed(fault.sentence)])
    channel.close()  # a device in an unknown state may keep the process from ending by itself; it is ended then
    return 1


def _take_commands(channel: EngineChannel, engine: Engine, window: Window) -> bool:
    """Apply the commands that have come, and wait for more as long as the window says. False: leave."""
    for _ in range(_COMMANDS_MAX):
        patience_ns = window.patience_ns(time.monotonic_ns(), waiting=engine.waiting, busy=engine.started)
        if not channel.poll(None if patience_ns is None else patience_ns / 1e9):
            break
        command = channel.receive()
        match command:
            case Submit():
                engine.submit(command)
            case Cancel():
                engine.cancel(command)
            case Shutdown():
                return False
    return True


if __name__ == "__main__":
    sys.exit(main())
