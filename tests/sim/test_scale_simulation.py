"""The autoscaler's loop over a made-up cluster, in orders that a real node cannot produce. A seed repeats its run."""

import pytest

from gpumeter_operator.decide.spec import Problem
from rigs.scaling import ScalingWorld


async def burst(world: ScalingWorld, requests: int, duration_s: float) -> None:
    world.arrive([duration_s] * requests)
    await world.step()


async def test_a_spike_grows_the_service_and_its_end_shrinks_it_one_drained_worker_at_a_time() -> None:
    world = ScalingWorld()
    await world.run(60)
    await burst(world, 60, 60)
    await world.run(60)
    assert len(world.ready()) == 8
    await world.run(1_200)
    assert (len(world.ready()), world.cut) == (1, [])
    reasons = [reason for reason, _ in world.events]
    assert reasons[0] == "QueueAboveTarget" and reasons[-1] == "QueueBelowTarget"


async def test_a_worker_is_deleted_only_after_its_last_request_and_gets_none_after_its_mark() -> None:
    world = ScalingWorld(start_s=2, behavior={"scaleDown": {"stabilizationWindowSeconds": 0}})
    await world.run(10)
    await burst(world, 40, 30)
    for round_ in range(120):
        world.arrive([world.random.uniform(1, 50)] if round_ % 3 == 0 else [])
        await world.step()
    assert len(world.ready()) < 8
    assert (world.cut, world.routed_to_marked) == ([], 0)


async def test_load_that_returns_during_a_drain_gets_the_drained_worker_back_at_once() -> None:
    world = ScalingWorld(minReplicas=1, behavior={"scaleDown": {"stabilizationWindowSeconds": 0}}, batch=2)
    await world.run(30)
    await burst(world, 20, 100)
    await world.run(60)
    count = len(world.pods)
    for pod in world.pods:  # all but one long request end
        pod.waiting.clear()
        pod.ends_s = pod.ends_s[:1]
    await world.step()
    assert any(pod.drains for pod in world.pods)
    made = world.made
    await burst(world, 40, 50)
    await world.step()
    assert not any(pod.drains for pod in world.pods)
    assert len(world.pods) >= count and world.made - made <= 8 - count


async def test_from_zero_a_waiting_request_is_acted_on_without_waiting_for_the_next_round() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    await world.run(120)
    assert (world.replicas, world.events[-1][0]) == (0, "NoRequests")
    world.arrive([5.0])
    world.scaler.look_at({"team-a/m"})  # what `run` does when it is woken
    await world.scaler.settle()
    assert (world.replicas, world.events[-1][0]) == (1, "FirstRequest")
    await world.run(40)
    assert len(world.ready()) == 1 and not world.at_door


async def test_nothing_goes_to_zero_while_a_gateway_is_silent() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    world.gateway_silent = True
    await world.run(600)
    assert world.replicas == 1


async def test_a_restarted_operator_goes_on_with_a_drain_and_loses_nobody() -> None:
    world = ScalingWorld(start_s=2, behavior={"scaleDown": {"stabilizationWindowSeconds": 0}})
    await world.run(10)
    await burst(world, 40, 40)
    await world.run(20)
    for pod in world.pods:
        pod.waiting.clear()
        pod.ends_s = pod.ends_s[:1]
    await world.step()
    marked = {pod.name for pod in world.pods if pod.drains}
    assert marked
    # With the default window a number that was found at the start would be kept for five minutes, marks and all undone.
    del world.service["spec"]["scaling"]["behavior"]
    world.restart()
    await world.step()
    assert {pod.name for pod in world.pods if pod.drains} == marked
    await world.run(200)
    assert not marked & {pod.name for pod in world.pods}
    assert world.cut == []


async def test_unschedulable_workers_are_told_once_and_go_first_when_load_ends() -> None:
    world = ScalingWorld(gpus=2)
    await world.run(60)
    for _ in range(60):
        await burst(world, 4, 20)
    assert world.replicas < 8, "no more was asked for than one step that the cluster could not give"
    told = [reason for reason, _ in world.events]
    assert told.count("InsufficientCapacity") == 1
    await world.run(1_500)
    assert len(world.pods) == 1 and world.ready()


async def test_a_quota_stops_growth_and_growth_goes_on_when_it_is_lifted() -> None:
    world = ScalingWorld(start_s=2)
    world.quota = 2
    await world.run(10)
    for _ in range(20):
        await burst(world, 6, 30)
    before = world.replicas
    assert len(world.pods) == 2 and before < 8
    assert "QuotaExceeded" in [reason for reason, _ in world.events]
    world.quota = 20
    for _ in range(20):
        await burst(world, 6, 30)
    assert len(world.pods) == 8


REFUSED = Problem("GpuClassUnknown", "There is no class h900.")
TO_ZERO = {"minReplicas": 0, "scaleToZeroAfter": "30s", "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}}}


async def some_workers() -> ScalingWorld:
    """More than two, all of them at work."""
    world = ScalingWorld(start_s=2, **TO_ZERO)
    await world.run(10)
    await burst(world, 40, 20)
    await world.run(6)
    assert len(world.ready()) == world.replicas > 2
    return world


async def test_while_the_deployment_cannot_be_written_nobody_is_drained_and_when_it_can_again_it_goes_on() -> None:
    world = await some_workers()
    count = world.replicas
    world.mark_by_hand(world.pods[0])  # or a drain had begun
    world.problem = REFUSED
    await world.run(300)
    assert len(world.ready()) == count and not any(pod.drains for pod in world.pods)
    world.arrive([1.0])
    assert not world.at_door, "they answer"
    world.problem = None
    await world.run(300)
    assert (world.replicas, world.cut) == (0, [])


async def test_a_deployment_that_was_not_lowered_though_nobody_said_so_loses_no_more_workers_than_are_wanted() -> None:
    world = await some_workers()
    count = world.replicas
    world.problem, world.problem_is_told = REFUSED, False
    await world.run(300)
    assert world.replicas == count and all(pod.drains for pod in world.pods)
    world.arrive([30.0])
    await world.run(4)
    assert [pod.drains for pod in world.pods].count(False) == 1 and not world.at_door


@pytest.mark.parametrize("seed", range(8))
async def test_through_every_fault_it_stays_in_bounds_cuts_nothing_off_and_converges(seed: int) -> None:
    """API away, silent workers, a silent gateway, restarts, at random; then calm, and what calm leads to."""
    world = ScalingWorld(seed, start_s=8, minReplicas=seed % 2, scaleToZeroAfter="60s")
    chance = world.random
    for _ in range(300):
        world.away = chance.random() < 0.2
        world.gateway_silent = chance.random() < 0.1
        for pod in world.pods:
            pod.silent = chance.random() < 0.1
        if chance.random() < 0.02:
            world.restart()
        if chance.random() < 0.3:
            world.arrive([chance.uniform(1, 60) for _ in range(chance.randrange(12))])
        await world.step()
        assert world.replicas <= 8
    world.away = world.gateway_silent = False
    for pod in world.pods:
        pod.silent = False
    await world.run(1_800)
    assert (len(world.pods), len(world.at_door)) == (seed % 2, 0)
    assert world.cut == [] and world.routed_to_marked == 0
    last_s: dict[tuple[str, str], float] = {}
    for event, at_s in zip(world.events, world.told_s, strict=True):
        assert at_s - last_s.get(event, -60) >= 30, f"told twice: {event}"
        last_s[event] = at_s
