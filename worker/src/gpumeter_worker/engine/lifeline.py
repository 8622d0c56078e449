"""Ties a process to the one that started it: with the parent it ends, whatever it does.

Owns nothing else. Does not know what the process is for.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, even in a step that never returns.

    Elsewhere than on Linux the end of the channel says it, after the step.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(0)
