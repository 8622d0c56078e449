"""The autoscaler's loop: what it tells the reconciler and the status, who else may write, and when it lets go."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.replicas import decide_replicas
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.status import Seen, decide_status
from gpumeter_operator.decide.workload import Installation, build
from rigs.scaling import BEGUN, REFERENCE, ScalingWorld


def status(world: ScalingWorld) -> dict[str, object]:
    spec, _ = read(world.service)
    replicas = decide_replicas(spec, world.scaler.replicas(world.service, spec))
    seen = Seen(spec, replicas, (), "", None, (), world.scaler.figures(world.service))
    return decide_status(seen, {}, BEGUN)


def words(world: ScalingWorld) -> tuple[str, str]:
    [one] = [one for one in status(world)["conditions"] if one["type"] == "ScalingReady"]  # type: ignore[attr-defined]
    return one["reason"], one["message"]


async def test_a_reason_is_the_same_in_event_condition_and_history() -> None:
    world = ScalingWorld()
    await world.run(40)
    world.arrive([60.0] * 40)
    await world.step()
    [entry] = status(world)["scalingHistory"]  # type: ignore[misc]
    assert world.events == [(entry["reason"], entry["message"])] == [words(world)]
    assert (entry["from"], entry["to"]) == (1, 5)
    assert world.counted == [entry["reason"]]


async def test_the_history_keeps_the_last_five_decisions_newest_first() -> None:
    world = ScalingWorld(start_s=2, behavior={"scaleDown": {"stabilizationWindowSeconds": 0}})
    for _ in range(6):
        await world.run(20)
        world.arrive([10.0] * 20)
        await world.run(60)
    history = status(world)["scalingHistory"]
    assert len(history) == 5  # type: ignore[arg-type]
    times = [one["time"] for one in history]  # type: ignore[attr-defined]
    assert times == sorted(times, reverse=True)


async def test_with_fixed_replicas_the_autoscaler_stands_aside_says_so_and_still_measures() -> None:
    """Two autoscalers fight: an HPA or KEDA on the scale subresource writes spec.replicas, and nobody else does."""
    world = ScalingWorld()
    world.service["spec"] = {"model": {"uri": "hf://o/n"}, "replicas": 3}
    world.replicas = 3
    await world.run(60)
    world.arrive([60.0] * 60)
    await world.run(60)
    assert (world.replicas, world.events) == (3, [])
    assert words(world)[0] == "FixedReplicas" and "an HPA or KEDA may change it" in words(world)[1]
    assert status(world)["queueLength"] == 48


async def test_figures_change_at_most_every_ten_seconds_and_are_absent_where_nobody_tells() -> None:
    world = ScalingWorld()
    await world.step()
    assert status(world)["queueLength"] is None, "no worker is ready yet"
    await world.run(40)
    seen = []
    for number in range(15):
        world.arrive([5.0] * (number % 5))
        await world.step()
        seen.append(status(world)["queueLength"])
    assert sum(one != other for one, other in pairwise(seen)) <= 3


async def test_a_service_at_zero_shows_an_empty_queue() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    await world.run(160)
    assert (world.replicas, status(world)["queueLength"]) == (0, 0)
    [ready] = [one for one in status(world)["conditions"] if one["type"] == "Ready"]  # type: ignore[attr-defined]
    assert ready["message"] == "Nothing was asked for 30s, so no worker runs; the next request starts one."


async def test_a_stopped_service_is_not_scaled_and_scales_again_when_it_is_no_longer() -> None:
    world = ScalingWorld(start_s=2)
    await world.run(20)
    world.service["metadata"]["annotations"] = {"gpumeter.io/stop": "true"}
    world.arrive([60.0] * 60)
    await world.run(20)
    assert world.events == [] and words(world)[0] == "Stopped"
    world.service["metadata"]["annotations"] = {}
    await world.step()
    assert world.events[0][0] == "QueueAboveTarget"


async def test_a_service_that_is_being_deleted_is_never_touched_again() -> None:
    world = ScalingWorld(start_s=2)
    await world.run(20)
    await world.scaler.release(world.service)
    world.arrive([60.0] * 60)
    await world.run(20)
    assert (world.replicas, world.events) == (1, [])


@asynccontextmanager
async def running(world: ScalingWorld) -> AsyncIterator[None]:
    """The loop as the operator runs it, after its first round; the next is two seconds away."""
    loop = asyncio.create_task(world.scaler.run())
    await asyncio.sleep(0.02)
    yield
    assert not loop.done()
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


async def comes(look: Callable[[], bool]) -> bool:
    """Whether it is so within a second."""
    for _ in range(200):
        if look():
            return True
        await asyncio.sleep(0.005)
    return look()


async def test_a_gateway_that_tells_of_a_waiting_request_is_not_left_waiting_for_the_next_round() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    await world.run(120)
    async with running(world):
        assert world.replicas == 0
        world.arrive([1.0])
        assert await comes(lambda: world.replicas == 1)
    assert world.events[-1][0] == "FirstRequest"


async def test_one_round_that_fails_is_not_the_last() -> None:
    world = ScalingWorld()
    whole, world.service = world.service, {"metadata": {}}
    async with running(world):
        world.service = whole
        world.scaler.wake([REFERENCE])
        assert await comes(lambda: world.scaler.figures(whole) is not None)


def test_the_service_leaves_out_draining_workers_only_when_every_pod_says_whether_it_drains() -> None:
    spec, _ = read(copy.deepcopy(ScalingWorld().service))
    installation, credentials = Installation("i", "IfNotPresent", ""), credentials_of(b"k" * 32, spec.uid)

    def selector(marked: bool) -> dict[str, str]:
        made = build(spec, 1, installation, credentials, marked=marked)
        [one] = [one for one in made.others if one["kind"] == "Service" and one["metadata"]["name"] == spec.name]
        found: dict[str, str] = one["spec"]["selector"]
        return found

    assert selector(True) == {"gpumeter.io/inferenceservice": "m", "gpumeter.io/draining": "false"}
    assert selector(False) == {"gpumeter.io/inferenceservice": "m"}
