"""Processes that outlive the command that started them, recognised again by pid and start time.

Owns starting, recognising and ending. Knows no component by name.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ENTER_CGROUPS = 'n=$1; shift; while [ $n -gt 0 ]; do echo $$ > "$1" || exit 70; shift; n=$((n-1)); done; exec "$@"'


@dataclass(frozen=True)
class Process:
    """A pid with the time of its start in clock ticks since boot: together they are never used twice."""

    pid: int
    start_ticks: int


def start(
    argv: Sequence[str],
    log: Path,
    *,
    dies_with_parent: bool = False,
    cgroups: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> Process:
    """Start a program in a session of its own, its output in `log`; it enters `cgroups` before it begins."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            wrapped(argv, dies_with_parent=dies_with_parent, cgroups=cgroups),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=None if environment is None else {**os.environ, **environment},
        )
    child.returncode = 0  # it outlives us on purpose; ending is this module's business, not the destructor's
    return identify(child.pid) or Process(child.pid, 0)


def wrapped(argv: Sequence[str], *, dies_with_parent: bool, cgroups: Sequence[Path]) -> list[str]:
    """Put the programs before a command that bind its life to ours and bring it into its cgroups."""
    command = list(argv)
    if dies_with_parent and shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    if cgroups:
        files = [str(cgroup / "cgroup.procs") for cgroup in cgroups]
        command = ["/bin/sh", "-c", ENTER_CGROUPS, "enter-cgroups", str(len(files)), *files, *command]
    return command


def identify(pid: int) -> Process | None:
    """Return the running process with this pid; None when there is none or it is a zombie.

    A process whose first thread is a zombie still holds its ports until its last thread has ended.
    """
    try:
        state, start_ticks = parse_stat(Path(f"/proc/{pid}/stat").read_text())
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    except OSError:
        return None
    return None if state in "ZX" and threads <= 1 else Process(pid, start_ticks)


def parse_stat(text: str) -> tuple[str, int]:
    """Take state and start time from /proc/PID/stat; the program's name may hold blanks and parentheses."""
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def is_alive(process: Process) -> bool:
    return identify(process.pid) == process


def children(process: Process) -> list[Process]:
    try:
        pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        return []
    return [child for child in (identify(int(pid)) for pid in pids) if child]


def kill(processes: Sequence[Process], timeout_s: float = 20.0) -> list[Process]:
    """Kill the processes and wait until they are gone; returns those that are not."""
    for process in processes:
        if is_alive(process):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, processes)), timeout_s)
    for process in processes:
        with suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
    return [process for process in processes if is_alive(process)]


def wait_until(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.05) -> bool:
    """Ask until the condition holds; False when the time is over."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every_s)
    return True


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def choose_port(remembered: int | None, preferred: int, is_free: Callable[[int], bool] = port_is_free) -> int:
    """Choose a port of 127.0.0.1: the remembered one, else the first free one from `preferred` on.

    Ports from 32768 on are left alone: the kernel hands them out to outgoing connections.
    """
    if remembered is not None and is_free(remembered):
        return remembered
    for port in range(preferred, min(preferred + 200, 32768)):
        if port != remembered and is_free(port):
            return port
    raise OSError(f"no free port from {preferred} on")
