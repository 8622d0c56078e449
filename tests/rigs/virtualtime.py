"""An event loop on made-up time: where every task waits for a timer, the clock jumps to it.

Owns the loop. asyncio's own sleep and timeout work on it unchanged, so an hour passes in milliseconds and the same run
happens each time. Only for code without real sockets and threads.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("every task waits for something that will never happen")
        self.loop.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` is seconds since the beginning of the run."""

    def __init__(self) -> None:
        selector = _Jumping()
        selector.loop = self
        self.now_s = 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on made-up time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def now_s() -> float:
    return asyncio.get_running_loop().time()
