"""`python -m gpumeter_worker.telemetry.process INTERVAL_MS`: looks at the GPU again and again, one JSON line a look.

Owns the life of the process that talks to NVML. A process of its own, because a broken driver may hang or crash whoever
asks it, and neither the event loop nor the journal may wait for that. It ends when its input closes, so it never
outlives the worker; and when the GPU is gone, after it said so. Judges nothing.
"""

import os
import signal
import sys
import threading
import time

from gpumeter_worker import gpuprobe
from gpumeter_worker.telemetry.nvml import NvmlAbsent, look, open_device
from gpumeter_worker.telemetry.sample import Absence, Sample, encode


def main() -> int:
    """Look until nobody listens or there is nothing to see."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides when a terminal's Ctrl-C ends it
    threading.Thread(target=_leave_with_parent, name="leave", daemon=True).start()
    interval_s = int(sys.argv[1]) / 1000
    try:
        device = open_device(gpuprobe.first_uuids)
        due_s = time.monotonic()
        while True:
            _say(look(device))
            due_s = max(due_s + interval_s, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))
    except NvmlAbsent as absent:
        _say(absent.absence)
        return 1
    except BrokenPipeError:
        os._exit(0)  # nobody listens, and Python would complain that it cannot flush


def _say(told: Sample | Absence) -> None:
    print(encode(told), flush=True)


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
