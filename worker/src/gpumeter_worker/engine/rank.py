"""A rank other than 0 of a split model: loads its part, runs the steps that rank 0 tells it, and ends with it.

Owns the process's own life. Started as `python -m gpumeter_worker.engine.rank RANK CHANNEL STORE PROGRESS PARENT` by
engine.ranks. Samples nothing, measures nothing and knows no session: what it computes goes into rank 0's result.
"""

import faulthandler
import logging
import mmap
import signal
import struct
import sys
from contextlib import suppress

from gpumeter_worker.engine.channel import Channel
from gpumeter_worker.engine.faults import fault_of
from gpumeter_worker.engine.lifeline import die_with
from gpumeter_worker.engine.messages import EngineOptions, Event, Failed, Fatal
from gpumeter_worker.engine.mirror import Clean, Copies, Mirror, Step, Told
from gpumeter_worker.engine.sequence import Sampling, Sequence
from gpumeter_worker.failure import LoadFailed
from gpumeter_worker.log import configure_logging

log = logging.getLogger("gpumeter_worker.engine.rank")

RankChannel = Channel[Event, EngineOptions | Told]


def main() -> int:
    """Serve rank 0 until it closes the channel."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank, channel_file, store, progress, parent = map(int, sys.argv[1:])
    die_with(parent)
    configure_logging()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    channel: RankChannel = Channel(channel_file)
    try:
        options = channel.receive()
        if not isinstance(options, EngineOptions):
            raise TypeError("the first message on the channel must be the engine's options")
        with mmap.mmap(progress, mmap.PAGESIZE) as taken:
            _run(channel, options, rank, store, taken)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # rank 0 is gone; so is everything to do
    except LoadFailed as error:
        return _tell(channel, Fatal(error.reason, str(error)), 3)
    except Exception as error:
        log.exception("rank %d failed", rank)
        return _tell(channel, Failed(fault_of(error).sentence), 1)
    return 0


def _run(channel: RankChannel, options: EngineOptions, rank: int, store: int, taken: mmap.mmap) -> None:
    # Here as in engine.process: seconds that count as `init`.
    import torch  # noqa: PLC0415

    from gpumeter_worker.engine.model import on_device, warm_up  # noqa: PLC0415
    from gpumeter_worker.engine.sharding import Seat  # noqa: PLC0415

    _, device = on_device(options, Seat(rank, options.ranks, store))
    warm_up(device, options)
    mirror, number = Mirror(), struct.Struct("q")
    with torch.inference_mode():
        while True:
            told = channel.receive()
            match told:
                case Step():
                    number.pack_into(taken, rank * number.size, told.number)
                    _, staged = device.stage(mirror.works(told.rows))
                    device.logits(staged)
                case Copies():
                    device.copy(told.copies)
                case Clean():
                    device.clean(Sequence("", 0, "", [], 0, Sampling(1), blocks=told.blocks))


def _tell(channel: RankChannel, event: Event, status: int) -> int:
    with suppress(OSError):
        channel.send(event)
    return status


if __name__ == "__main__":
    sys.exit(main())
