"""How a process ended that has closed its channel, for a sentence that names it and for whoever counts kills.

Owns how that is found out while the kernel is not done with it, which /proc tells. Does not know whose process it is.

The kernel closes the files of a dying process from the first on, and only then are those of a device closed, behind
which memory is torn down: seconds, in which it has no status to wait for. Clients wait for the sentence meanwhile.
"""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

END_S = 0.5
"""How long a process that has closed its channel may take to say how it ended, before it is ended."""

_EXITING = 0x4
"""PF_EXITING of the kernel's sched.h."""


class Ending(NamedTuple):
    """`how`: what a sentence says of it. `killed_by`: the signal that ended it, 0 where none did."""

    how: str
    killed_by: int = 0


def ending(process: "subprocess.Popen[bytes]", end_s: float) -> Ending:
    """Waits so long, and then has the kernel end it. Nobody else may have signalled it after its channel was closed."""
    try:
        status = process.wait(end_s)
    except subprocess.TimeoutExpired:
        dying_with = status_of_dying(process.pid)
        process.kill()
        if dying_with is None:
            return Ending("closed its channel and did not end")
        status = dying_with
    return Ending(f"was killed by signal {-status}", -status) if status < 0 else Ending(f"ended with status {status}")


def status_of_dying(pid: int, processes: Path = Path("/proc")) -> int | None:
    """The status of a process that is on its way out or was not waited for, as `Popen.wait` gives it. None where it is
    not on its way out or nobody can tell; also for a status of 0, which is what those are shown who may not know it.

    Fields as in proc_pid_stat(5).
    """
    try:
        fields = (processes / str(pid) / "stat").read_text().rpartition(")")[2].split()
        flags, status = int(fields[6]), int(fields[49])
    except (OSError, ValueError, IndexError):
        return None
    return os.waitstatus_to_exitcode(status) if flags & _EXITING and status else None
