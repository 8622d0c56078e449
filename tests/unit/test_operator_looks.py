"""When services are looked at again, and that a service of which nothing has changed costs nothing."""

import asyncio
from typing import Any

from gpumeter_operator.decide.names import FINALIZER
from gpumeter_operator.flow.looks import Looks

Manifest = dict[str, Any]


def of(name: str, **metadata: Any) -> Manifest:
    return {"metadata": {"namespace": "team-a", "name": name, "uid": name, "finalizers": [FINALIZER], **metadata}}


class Watcher:
    """Services, and which of them were looked at; a look at `slow` waits until it may end."""

    def __init__(self, *services: Manifest) -> None:
        self.services = {("team-a", one["metadata"]["name"]): one for one in services}
        self.seen: list[str] = []
        self.calm: set[str] = set()
        self.may_end = asyncio.Event()
        self.looks = Looks(lambda: self.services, self.due, self.look, interval_s=0.01)

    def due(self, service: Manifest) -> bool:
        return service["metadata"]["name"] not in self.calm

    async def look(self, service: Manifest) -> None:
        name = service["metadata"]["name"]
        self.seen.append(name)
        if name == "slow":
            await self.may_end.wait()
        if name == "bad":
            raise ZeroDivisionError

    async def rounds(self, number: int) -> list[str]:
        for _ in range(number):
            await self.looks.round()
            for _ in range(5):
                await asyncio.sleep(0)
        seen, self.seen = self.seen, []
        return seen


async def test_every_service_is_looked_at_in_every_round_and_a_calm_one_is_not() -> None:
    watcher = Watcher(of("a"), of("b"))
    assert await watcher.rounds(2) == ["a", "b", "a", "b"]
    watcher.calm.add("a")
    assert await watcher.rounds(2) == ["b", "b"]


async def test_a_service_whose_handler_has_not_begun_or_that_goes_is_left_to_its_handler() -> None:
    new, leaving = of("new", finalizers=[]), of("leaving", deletionTimestamp="2026-11-21T10:00:00Z")
    assert await Watcher(new, leaving, of("a")).rounds(1) == ["a"]


async def test_a_look_that_takes_long_is_not_begun_twice_and_holds_up_nobody() -> None:
    watcher = Watcher(of("slow"), of("a"))
    assert await watcher.rounds(3) == ["slow", "a", "a", "a"]
    watcher.may_end.set()
    await watcher.rounds(1)
    assert "slow" in await watcher.rounds(1)


async def test_a_look_that_fails_is_told_and_done_again() -> None:
    watcher = Watcher(of("bad"), of("a"))
    assert await watcher.rounds(2) == ["bad", "a", "bad", "a"]


async def test_the_loop_goes_round_until_it_is_ended_and_ends_the_looks_under_way() -> None:
    watcher = Watcher(of("slow"), of("a"))
    task = asyncio.create_task(watcher.looks.run())
    async with asyncio.timeout(10):
        while watcher.seen.count("a") < 3:  # noqa: ASYNC110 - what is waited for is that time passes
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert not [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]
