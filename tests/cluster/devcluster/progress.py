"""Timed progress lines on stderr.

Owns how a long step shows that it is alive. Does not know what the steps do.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

FIRST_SIGN_S = 4.0
NEXT_SIGN_S = 15.0


@dataclass
class Progress:
    """Writes one line for each step with the seconds since the start; a slow step says in between that it lives."""

    out: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.monotonic
    first_sign_s: float = FIRST_SIGN_S
    next_sign_s: float = NEXT_SIGN_S
    quiet: bool = False
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.started

    def say(self, text: str) -> None:
        if not self.quiet:
            print(f"[{self.elapsed_s:6.1f} s] {text}", file=self.out, flush=True)

    @contextmanager
    def step(self, text: str, detail: Callable[[], str] = lambda: "") -> Iterator[None]:
        """Run a step: `text` is a noun phrase, `detail` is asked for each sign of life."""
        begun = self.clock()
        ended = threading.Event()

        def signs() -> None:
            wait_s = self.first_sign_s
            while not ended.wait(wait_s):
                more = detail()
                self.say(f"{text} ... {self.clock() - begun:.0f} s so far{', ' + more if more else ''}")
                wait_s = self.next_sign_s

        thread = threading.Thread(target=signs, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            ended.set()
            thread.join()
            self.say(f"{text}: FAILED after {self.clock() - begun:.1f} s")
            raise
        ended.set()
        thread.join()
        self.say(f"{text} ({self.clock() - begun:.1f} s)")
