"""Bounds on what is held and done at once: room in memory for pages, and many small writes as one transaction.

Owns the waiting. Does not know what a page is, nor what is written.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Room:
    """So many bytes, lent in the order in which they were asked for."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._free = most_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def of(self, size_bytes: int) -> AsyncIterator[None]:
        """Hold so many bytes, or all that there are where more is asked for."""
        size = min(size_bytes, self._most)
        if self._waiting or size > self._free:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((size, turn))
            try:
                await turn
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._give(size)
                raise
        else:
            self._free -= size
        try:
            yield
        finally:
            self._give(size)

    def _give(self, size: int) -> None:
        self._free += size
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._free):
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= wanted
                turn.set_result(None)


class Batch(Generic[T, R]):
    """Writes what comes in while writes are under way together with the next one; `at_once` of them at the same time.

    `write` takes some items and gives for each its result, or the exception that is to be raised for it alone; what it
    raises is raised for all of them.
    """

    def __init__(
        self, write: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]], most: int, at_once: int = 1
    ) -> None:
        self._write = write
        self._most = most
        self._at_once = at_once
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._writers: set[asyncio.Task[Any] | None] = set()

    async def put(self, item: T) -> R:
        """The item's result, when it is written."""
        result: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, result))
        if len(self._writers) < self._at_once:
            self._writers.add(asyncio.create_task(self._run()))
        return await result

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
                try:
                    results = await self._write([item for item, _ in batch])
                except BaseException as failure:
                    for _, result in batch:
                        if not result.done():
                            result.set_exception(failure)
                    if isinstance(failure, asyncio.CancelledError):
                        raise
                    continue
                for (_, result), of_item in zip(batch, results, strict=True):
                    if result.done():
                        continue
                    if isinstance(of_item, Exception):
                        result.set_exception(of_item)
                    else:
                        result.set_result(of_item)
        finally:
            self._writers.discard(asyncio.current_task())
