"""The other side of an engine's pipe: starts it, asks it, and keeps it still while another one is asked.

Owns processes and signals. An engine that waits for its turn is stopped (SIGSTOP), because a thread pool that spins
while it waits would take the processor from the one that is measured.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from devcluster.layout import REPOSITORY

START_S = 600.0
ANSWER_S = 900.0


class EngineLost(Exception):
    """An engine did not start, did not answer in time, or died."""


class Child:
    """An engine in a process of its own, stopped unless it is asked."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        self._answers, theirs = os.pipe()
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [*command, str(theirs)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                start_new_session=True,  # so that a signal reaches whatever it starts as well
            )
        os.close(theirs)
        self._read = b""
        try:
            self.about: dict[str, str] = self._answer(START_S)
        except BaseException:
            self.end()
            raise
        self._signal(signal.SIGSTOP)

    @property
    def pid(self) -> int:
        """Of its process, and of its process group."""
        return self._process.pid

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """One question, one answer. Raises EngineLost."""
        assert self._process.stdin is not None
        question = (json.dumps({"ask": what, **details}) + "\n").encode()
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
            return self._answer(ANSWER_S)
        except BrokenPipeError as error:
            raise EngineLost(f"{self.name} is gone; see {self._log}") from error
        finally:
            self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Kill it and whatever it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._answers)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        while b"\n" not in self._read:
            if not select.select([self._answers], [], [], timeout_s)[0]:
                raise EngineLost(f"{self.name} said nothing for {timeout_s:.0f} s; see {self._log}")
            part = os.read(self._answers, 2**20)
            if not part:
                raise EngineLost(f"{self.name} ended with {self._process.wait()}; see {self._log}")
            self._read += part
        line, self._read = self._read.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, which: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, which)
