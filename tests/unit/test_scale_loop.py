"""The autoscaler's loop: what it tells the reconciler and the status, who else may write, and when it lets go."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.replicas import decide_replicas
from gpumeter_operator.decide.spec import Problem, read
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


async def test_a_restart_rewrites_no_figures_and_who_answers_late_once_is_not_silent() -> None:
    world = ScalingWorld(start_s=2)
    await world.run(20)
    world.arrive([60.0] * 7)
    await world.run(20)
    shown = status(world)["queueLength"]
    assert shown
    await world.reconcile(world.service)
    for each in world.ready():
        each.silent = True
    world.restart()
    world.scaler.replicas(world.service, read(world.service)[0])
    assert status(world)["queueLength"] == shown, "before anybody was asked"
    await world.step()
    assert status(world)["queueLength"] == shown
    await world.run(12)
    assert status(world)["queueLength"] == shown
    await world.run(12)
    assert status(world)["queueLength"] is None, "they stay silent"


async def test_a_service_at_zero_shows_an_empty_queue() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    await world.run(160)
    assert (world.replicas, status(world)["queueLength"]) == (0, 0)
    [ready] = [one for one in status(world)["conditions"] if one["type"] == "Ready"]  # type: ignore[attr-defined]
    assert ready["message"] == "Nothing was asked for 30s, so no worker runs; the next request starts one."


async def test_a_worker_that_got_ready_since_all_were_asked_is_called_silent_only_when_it_stays_so() -> None:
    world = ScalingWorld(start_s=2)
    await world.run(6)
    [pod] = world.ready()
    pod.silent = True
    world.restart()
    await world.step()
    assert world.events == [] and words(world)[0] == "WithinTarget"
    await world.run(12)
    assert [reason for reason, _ in world.events] == ["SignalsMissing"] == [words(world)[0]]


async def test_after_a_restart_silence_counts_from_the_first_question_and_not_from_the_start() -> None:
    """Asking thousands of workers takes longer than silence may last before it is told."""
    world = ScalingWorld(start_s=2)
    await world.run(20)
    await world.reconcile(world.service)
    before = words(world), status(world)["queueLength"]
    world.restart()
    world.asked_from_s = world.now_s + 60
    await world.run(58)
    assert (world.events, words(world), status(world)["queueLength"]) == ([], *before)
    [pod] = world.ready()
    pod.silent = True
    await world.run(10)
    assert world.events == [], "silence lasts before it is told, as it does otherwise"
    await world.run(4)
    assert [reason for reason, _ in world.events] == ["SignalsMissing"] == [words(world)[0]]
    assert status(world)["queueLength"] is None


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


UNREADABLE = {
    "metadata": {"namespace": "team-a", "name": "a", "uid": "s-0", "generation": 1},
    "spec": {"model": {"uri": "hf://o/n"}, "drain": {"timeout": 5}, "scaling": {"maxReplicas": 2}},
}


async def test_a_service_that_cannot_be_read_keeps_no_other_from_being_scaled_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = ScalingWorld(start_s=2)
    world.others["team-a", "a"] = copy.deepcopy(UNREADABLE)
    await world.run(20)
    world.arrive([60.0] * 40)
    await world.step()
    assert world.events[0][0] == "QueueAboveTarget"

    def told() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name.endswith("flow.scale")]

    assert [one.partition(":")[0] for one in told()] == ["team-a/a"], "once, not at every look"
    assert world.failures == 11, "and counted each time"
    world.others["team-a", "a"]["metadata"]["generation"] = 2
    await world.step()
    assert len(told()) == 2, "an edit that cured nothing is told again"


async def test_a_gateway_that_wakes_for_two_services_is_heard_though_one_of_them_cannot_be_read() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    await world.run(120)
    world.others["team-a", "a"] = copy.deepcopy(UNREADABLE)
    world.arrive([5.0])
    world.scaler.look_at(["team-a/a", REFERENCE])
    await world.scaler.settle()
    assert world.events[-1][0] == "FirstRequest"


async def test_a_reconciler_that_fails_for_a_reason_that_nobody_thought_of_is_told_once_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = ScalingWorld(start_s=2)
    await world.run(20)
    world.failure = AttributeError("'str' object has no attribute 'get'")
    world.arrive([60.0] * 40)
    await world.run(10)
    assert (world.replicas, world.events, world.failures) == (1, [], 5)
    assert len([one for one in caplog.records if one.name.endswith("flow.scale")]) == 1
    world.failure = None
    await world.step()
    assert world.replicas > 1 and world.events


async def test_a_deployment_that_can_be_written_again_is_written_with_the_workers_that_it_has() -> None:
    world = ScalingWorld(start_s=2)
    await world.run(20)
    world.arrive([60.0] * 40)
    await world.run(20)
    world.problem = Problem("WorkloadRefused", "A webhook denied the request.")
    await world.step()
    decided = world.scaler.replicas(world.service, read(world.service)[0])
    assert decided is not None and decided.wanted == world.replicas > 1


async def two_fixed_workers() -> ScalingWorld:
    world = ScalingWorld(start_s=2)
    world.service["spec"] = {"model": {"uri": "hf://o/n"}, "replicas": 2}
    world.replicas = 2
    await world.run(10)
    assert len(world.ready()) == 2
    return world


async def test_with_fixed_replicas_no_worker_stays_marked() -> None:
    """Whether the autoscaler marked it before spec.scaling was taken away, or somebody by hand."""
    world = await two_fixed_workers()
    world.mark_by_hand(world.pods[0])
    await world.step()
    assert not any(pod.drains for pod in world.pods) and world.replicas == 2


async def test_a_deployment_that_has_still_to_be_lowered_loses_the_marked_worker_and_no_other() -> None:
    world = await two_fixed_workers()
    world.mark_by_hand(world.pods[0])
    world.service["spec"]["replicas"] = 1
    world.service["metadata"]["generation"] = 2
    await world.step()
    assert [pod.drains for pod in world.pods] == [True, False]


async def test_a_notebook_and_the_workers_of_a_stopped_service_keep_their_marks() -> None:
    world = await two_fixed_workers()
    notebook, stopping = world.pods
    notebook.manifest["metadata"]["annotations"]["gpumeter.io/development"] = "true"
    world.mark_by_hand(notebook)
    await world.step()
    assert notebook.drains, "the workers that take its place may still start"
    world.service["metadata"]["annotations"] = {"gpumeter.io/stop": "true"}
    world.mark_by_hand(stopping)
    await world.step()
    assert stopping.drains


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("before_s", [40, 160], ids=["serving", "at zero"])
async def test_a_stopped_service_that_may_go_to_zero_starts_again_when_it_is_stopped_no_longer(
    before_s: float, restarted: bool
) -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    await world.run(before_s)
    world.service["metadata"]["annotations"] = {"gpumeter.io/stop": "true"}
    await world.step()
    world.replicas = 0  # as the reconciler does
    stopped = {"type": "ScalingReady", "status": "False", "reason": "Stopped", "message": "It is stopped."}
    world.service["status"] = {**world.service.get("status", {}), "conditions": [stopped]}
    await world.step()
    world.service["metadata"]["annotations"] = {}
    if restarted:
        world.restart()
    await world.step()
    assert world.replicas == 1
    await world.run(160)
    assert (world.replicas, world.events[-1][0]) == (0, "NoRequests"), "and goes when nothing was asked"


async def test_an_older_copy_of_a_service_is_not_what_is_decided_by() -> None:
    world = ScalingWorld(start_s=2)
    old = copy.deepcopy(world.service)
    old["spec"]["engine"] = {"type": "vllm"}
    world.service["metadata"]["generation"] = 2
    await world.run(20)
    signs = world.scaler.signs(world.service)
    assert world.scaler.replicas(old, read(old)[0]) is not None
    assert world.scaler.signs(world.service) == signs


async def test_a_zero_that_was_decided_is_still_one_after_a_restart() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    await world.run(160)
    made = world.made
    world.restart()
    await world.run(60)
    assert (world.replicas, world.made) == (0, made)


async def test_a_notebook_that_becomes_a_service_that_may_go_to_zero_gets_its_first_worker() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    world.service["spec"] = {"model": {"uri": "hf://o/n"}, "development": {"jupyter": True}}
    await world.run(10)
    [notebook] = world.pods
    notebook.manifest["metadata"]["annotations"]["gpumeter.io/development"] = "true"
    world.mark_by_hand(notebook)
    world.service["spec"] = {"model": {"uri": "hf://o/n"}, "scaling": {"minReplicas": 0, "maxReplicas": 2}}
    world.service["metadata"]["generation"] = 2
    await world.step()
    assert world.replicas == 1 and words(world)[0] == "WithinTarget"


async def test_a_request_that_comes_while_something_is_written_is_looked_at_when_that_has_ended() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    await world.run(120)
    async with running(world):
        assert world.replicas == 0
        world.written = asyncio.Event()
        world.arrive([1.0])
        await asyncio.sleep(0.02)
        world.arrive([1.0] * 20)
        await asyncio.sleep(0.02)
        world.written.set()
        assert await comes(lambda: world.replicas > 1)


async def test_a_request_that_comes_while_a_worker_hangs_is_not_left_waiting_for_it() -> None:
    world = ScalingWorld(minReplicas=0, scaleToZeroAfter="30s")
    await world.run(120)
    world.answers = asyncio.Event()
    async with running(world):
        world.arrive([1.0])
        assert await comes(lambda: world.replicas == 1)
    assert world.events[-1][0] == "FirstRequest"


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
