"""The operator killed before and after every request of what it does: after a restart the same objects, none doubled.

kopf's part is played by the rig; tests/cluster/test_operator_takeover.py kills the real process, kopf included.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES
from rigs.operated import NAME, NAMESPACE, Killed, Operator, World, picture, settled
from rigs.virtualtime import run_virtually

AT_ONCE = {"scaleDown": {"stabilizationWindowSeconds": 0}}
Act = Callable[[World], Awaitable[None]]


async def create(world: World) -> None:
    await world.create(replicas=2)


async def create_scaling(world: World) -> None:
    await world.create(scaling={"minReplicas": 1, "maxReplicas": 4, "targetQueueLength": 4, "behavior": AT_ONCE})


async def edit(world: World) -> None:
    await world.edit(replicas=3, engine={"maxBatchSize": 8})


async def spike(world: World) -> None:
    world.waiting = 12


async def calm(world: World) -> None:
    world.waiting = 0


async def delete(world: World) -> None:
    await world.api.delete(INFERENCE_SERVICES, NAME, NAMESPACE)


STORIES: dict[str, tuple[Act, ...]] = {
    "a service is created": (create,),
    "a service is edited": (create, edit),
    "workers are added for a queue": (create_scaling, spike),
    "workers are drained and leave": (create_scaling, spike, calm),
    "a service is deleted while workers run": (create, delete),
}


@asynccontextmanager
async def world_after(acts: tuple[Act, ...]) -> AsyncIterator[World]:
    """A cluster in which all but the last act have settled, without an operator."""
    world = World()
    control = asyncio.create_task(world.control())
    for act in acts[:-1]:
        await act(world)
        await finish(world)
    await acts[-1](world)
    yield world
    control.cancel()
    await asyncio.gather(control, return_exceptions=True)


async def finish(world: World, point: int | None = None) -> list[str]:
    """Run an operator until all is settled, or until it is killed at its point; the requests that it made."""
    operator = Operator(world, point)
    try:
        await operator.start()
        await settled(world, operator)
    except Killed:
        pass
    finally:
        await operator.end()
    return operator.api.calls


def nothing_doubled(world: World) -> list[str]:
    doubled = [f"{key} was created {times} times" for key, times in world.api.created.items() if times > 1]
    return [*world.wrongs, *doubled]


async def _every_point(acts: tuple[Act, ...]) -> None:
    async with world_after(acts) as world:
        calls = await finish(world)
        expected, pods_max = picture(world), world.pods_max
        assert not nothing_doubled(world)
    # Only the points up to the last write: afterwards nothing is done any more.
    last = max(number for number, name in enumerate(calls) if not name.startswith(("get", "list")))
    assert last > 2, calls
    for point in range(2 * last + 2):
        where = f"killed {'after' if point % 2 else 'before'} request {point // 2} ({calls[point // 2]}) of {calls}"
        async with world_after(acts) as world:
            made = await finish(world, point)
            assert len(made) == point // 2 + 1, f"the run was another one: {made}; {where}"
            await finish(world)
            assert picture(world) == expected, where
            assert not nothing_doubled(world), where
            assert world.pods_max <= pods_max, where


@pytest.mark.parametrize("story", STORIES)
def test_killed_at_any_request_it_converges_to_the_same_objects(story: str) -> None:
    run_virtually(_every_point(STORIES[story]))


@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again_through_a_whole_life_it_converges(seed: int) -> None:
    run_virtually(_whole_life(seed))


async def _whole_life(seed: int) -> None:
    chance = random.Random(seed)
    world = World()
    control = asyncio.create_task(world.control())
    kills = 0
    for act in (create_scaling, spike, calm, spike, delete):
        await act(world)
        for _ in range(chance.randrange(1, 6)):
            point = chance.randrange(16)
            made = await finish(world, point)
            kills += len(made) > point // 2
        await finish(world)
    control.cancel()
    await asyncio.gather(control, return_exceptions=True)
    left: dict[Any, Any] = picture(world)
    assert kills >= 3, "a life without deaths proves nothing"
    assert left == {}, "the service is gone with all that it owned"
    assert not nothing_doubled(world)
    assert world.pods_max <= 4 + 3, "at most the maximum, and those that still drain"
