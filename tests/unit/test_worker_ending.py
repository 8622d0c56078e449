"""How a process ended, asked while the kernel is not done with it, as it is not with a zombie."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpumeter_worker.engine.ending import Ending, ending, status_of_dying
from rigs.engines import is_gone
from rigs.worker import until

KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


class Dying:
    """A real process that has ended, in the hands of one who gets no status yet."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.kills = 0

    def wait(self, timeout_s: float) -> int:
        raise subprocess.TimeoutExpired("", timeout_s)

    def kill(self) -> None:
        self.kills += 1


@contextmanager
def ended(by: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", f"import os, signal, sys, ctypes\n{by}"])
    try:
        until(lambda: is_gone(process.pid), "it has ended")
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (KILLED, Ending("was killed by signal 9", 9)),
        ("sys.exit(7)", Ending("ended with status 7")),
        ("sys.exit(0)", Ending("closed its channel and did not end")),
    ],
)
def test_who_is_killed_for_memory_is_told_as_killed_though_the_kernel_takes_long_to_end_it(
    by: str, expected: Ending
) -> None:
    with ended(by) as pid:
        dying = Dying(pid)
        assert ending(dying, 0.0) == expected  # type: ignore[arg-type]
        assert dying.kills == 1, "nobody waits for one that hangs"


def test_a_process_that_runs_is_stopped_or_has_lost_only_its_first_thread_is_not_dying(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        assert status_of_dying(process.pid) is None
        process.send_signal(signal.SIGSTOP)
        until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it stands")
        assert status_of_dying(process.pid) is None, "the kernel shows a status for one that was stopped, too"
    finally:
        process.kill()
        process.wait()
    assert status_of_dying(process.pid) is None
    assert status_of_dying(1, tmp_path) is None, "no /proc"
    thread = "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()"
    with ended(f"{thread}\nctypes.CDLL(None).pthread_exit(None)") as pid:
        assert status_of_dying(pid) is None


def test_a_process_that_ends_in_time_is_told_with_its_status() -> None:
    assert ending(subprocess.Popen([sys.executable, "-c", "import os; os.abort()"]), 60) == Ending(
        "was killed by signal 6", 6
    )
