"""How many workers there should be, and why: the rules, and what went wrong in other operators."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from gpumeter_operator.decide.autoscale import WAITS_MS, Decision, Memory, Sight, Worker, decide
from gpumeter_operator.decide.crew import NOBODY, Door, Load
from gpumeter_operator.decide.scaling import read_scaling
from gpumeter_operator.decide.spec import Problem

STARTING = Worker(ready=False, placed=True)
SILENT = Worker(ready=True, placed=True)
PENDING = Worker(ready=False, placed=False)


def ready(waiting: int = 0, running: int = 0, gpu: int | None = None, ended: int = 0) -> Worker:
    return Worker(ready=True, placed=True, load=Load(0, waiting, running, gpu, ended))


@dataclass
class Service:
    """One service and its autoscaler on a made-up clock; the workers are set by the test."""

    spec: dict[str, Any] = field(default_factory=lambda: {"minReplicas": 1, "maxReplicas": 8})
    replicas: int = 1
    batch: int = 8
    now_ms: int = 1_000_000
    memory: Memory = field(default_factory=Memory)

    def look(
        self,
        *workers: Worker,
        door: Door = NOBODY,
        blocked: Problem | None = None,
        rolling: bool = False,
        after_s: float = 2,
    ) -> Decision:
        self.now_ms += int(after_s * 1_000)
        sight = Sight(self.replicas, workers, door, self.batch, blocked, rolling)
        decision, self.memory = decide(read_scaling(self.spec, 1_800_000), sight, self.memory, self.now_ms)
        self.replicas = decision.replicas
        return decision

    def look_for(self, seconds: int, *workers: Worker, **seen: Any) -> list[int]:
        """A look every two seconds; the numbers that were decided."""
        return [self.look(*workers, **seen).replicas for _ in range(seconds // 2)]


def test_waiting_requests_are_spread_over_as_many_workers_as_the_target_says() -> None:
    decision = Service().look(ready(waiting=17))
    assert (decision.replicas, decision.reason) == (5, "QueueAboveTarget")
    assert decision.message == "From 1 to 5 workers. 17 requests wait for 1 ready worker, 4 aimed at for each."


def test_a_decision_never_leaves_its_bounds_and_says_which_one_held_it() -> None:
    service = Service({"minReplicas": 1, "maxReplicas": 3})
    assert service.look(ready(waiting=500)).message.endswith("spec.scaling.maxReplicas allows no more.")
    assert service.replicas == 3
    assert service.look(ready(waiting=500), ready(500), ready(500)).reason == "AtMaximum"


@pytest.mark.parametrize(("found", "reason", "wanted"), [(9, "AboveMaximum", 6), (1, "BelowMinimum", 3)])
def test_a_number_outside_edited_bounds_is_brought_back(found: int, reason: str, wanted: int) -> None:
    service = Service({"minReplicas": 3, "maxReplicas": 6}, replicas=found)
    decision = service.look(*[ready(waiting=4, running=8)] * found)
    assert (decision.replicas, decision.reason) == (wanted, reason)


# What went wrong elsewhere.


def test_one_request_that_pins_gpu_utilisation_does_not_make_scaling_run_away() -> None:
    service = Service()
    assert set(service.look_for(600, ready(running=1, gpu=100))) == {1}
    passing = [service.look(ready(waiting=step % 5 == 0, running=1, gpu=100)).replicas for step in range(300)]
    assert set(passing) == {1}, "a request that merely passes does not wait"


def test_a_busy_gpu_raises_once_something_really_waits_and_by_its_own_ratio() -> None:
    service = Service(replicas=4)
    busy = [ready(waiting=1, running=8, gpu=100)] * 4
    assert set(service.look_for(WAITS_MS // 1_000, *busy)) == {4}
    decision = service.look(*busy)
    assert (decision.replicas, decision.reason) == (5, "GpuBusyWhileWaiting")
    assert set(service.look_for(60, *busy, STARTING)) == {5}, "the one that starts is counted as idle: no second step"


def test_a_worker_that_never_gets_ready_does_not_freeze_the_loop() -> None:
    service = Service(replicas=3)
    assert service.look(ready(waiting=20), STARTING, STARTING).replicas == 5
    idle = Service(replicas=3)
    assert idle.look_for(310, ready(), STARTING, STARTING)[-1] == 1


def test_a_new_version_that_never_gets_ready_does_not_keep_a_rollout_from_growing() -> None:
    beside = Service()
    assert beside.look(ready(waiting=8), STARTING, rolling=True).replicas == 2, "the one beside adds no capacity"
    missing = Service(replicas=2)
    assert missing.look(ready(waiting=8), STARTING).replicas == 2, "the one that is to come is counted"


def test_the_last_former_worker_stays_while_a_new_version_is_not_ready_to_be_started_from_zero() -> None:
    service = Service({"minReplicas": 0, "maxReplicas": 4})
    assert set(service.look_for(3_600, ready(), STARTING, rolling=True)) == {1}
    decision = service.look(ready(), STARTING, rolling=True)
    assert (decision.reason, decision.able) == ("RolloutUnfinished", False)
    assert "they stay until it is" in decision.message
    assert service.look(ready()).replicas == 0, "the new version is ready, and nothing was asked for long enough"


def test_unschedulable_workers_stop_scaling_up_and_never_block_scaling_down() -> None:
    service = Service(replicas=4)
    no_gpu = Problem("InsufficientCapacity", "No node has a free GPU for the worker.")
    full = [ready(waiting=40, running=8)] * 2
    decision = service.look(*full, PENDING, PENDING, blocked=no_gpu)
    assert (decision.replicas, decision.reason, decision.able) == (4, "InsufficientCapacity", False)
    assert "No node has a free GPU for the worker." in decision.message
    assert service.look(*full, PENDING, PENDING).reason == "PodsPending"
    numbers = service.look_for(310, ready(), ready(), PENDING, PENDING, blocked=no_gpu)
    assert numbers[-1] == 1


def test_a_quota_that_is_used_up_is_the_reason_and_no_pod_more_is_asked_for() -> None:
    service = Service(replicas=2)
    quota = Problem("QuotaExceeded", "The cluster refuses to create worker pods: exceeded quota: gpus.")
    decision = service.look(ready(waiting=40), blocked=quota)
    assert (decision.replicas, decision.reason) == (2, "QuotaExceeded")
    assert service.look(ready(waiting=40)).replicas > 2, "and it goes on when the quota does"


def test_nothing_scales_to_zero_before_a_worker_was_ready() -> None:
    service = Service({"minReplicas": 0, "maxReplicas": 4})
    assert set(service.look_for(7_200, STARTING)) == {1}
    assert service.look_for(1_802, ready())[-1] == 0


def test_a_silent_worker_is_not_an_idle_one() -> None:
    service = Service({"minReplicas": 0, "maxReplicas": 4}, replicas=2)
    assert set(service.look_for(7_200, SILENT, SILENT)) == {2}
    decision = service.look(SILENT, SILENT)
    assert (decision.reason, decision.able) == ("SignalsMissing", False)
    assert service.look(SILENT, SILENT, door=Door(waiting=30)).replicas > 2, "a queue at the gateway is a signal too"


# To zero, and from it.


def quiet_to_zero() -> Service:
    service = Service({"minReplicas": 0, "maxReplicas": 4})
    service.look_for(1_802, ready())
    assert service.replicas == 0
    return service


def test_the_last_worker_goes_after_the_time_without_a_request_and_says_so() -> None:
    service = Service({"minReplicas": 0, "maxReplicas": 4})
    service.look(ready())
    assert set(service.look_for(1_798, ready())) == {1}
    decision = service.look(ready())
    assert (decision.replicas, decision.reason) == (0, "NoRequests")
    assert decision.message == "From 1 to 0 workers. Nothing was asked for 30m (spec.scaling.scaleToZeroAfter)."


@pytest.mark.parametrize(
    ("worker", "door"),
    [
        (ready(running=1), NOBODY),
        (ready(ended=1), NOBODY),
        (ready(), Door(inflight=1)),
        (ready(), Door(known=False)),
        (SILENT, NOBODY),
    ],
    ids=["one runs", "one came and went between two looks", "one at a gateway", "a gateway is silent", "silent"],
)
def test_whatever_may_be_a_request_starts_the_time_to_zero_anew(worker: Worker, door: Door) -> None:
    service = Service({"minReplicas": 0, "maxReplicas": 4})
    service.look_for(1_798, ready())
    service.look(worker, door=door)
    after = ready(ended=1) if worker.load is not None and worker.load.ended else ready()
    assert set(service.look_for(1_798, after)) == {1}
    assert service.look_for(4, after)[-1] == 0


def test_a_window_shorter_than_that_of_scale_down_holds_for_the_way_to_zero() -> None:
    service = Service({"minReplicas": 0, "maxReplicas": 4})
    service.look(ready(running=3))
    scaling = read_scaling(service.spec, 30_000)
    numbers = []
    for _ in range(20):
        service.now_ms += 2_000
        decision, service.memory = decide(scaling, Sight(1, (ready(),)), service.memory, service.now_ms)
        numbers.append(decision.replicas)
    assert numbers.index(0) == 15


def test_a_busy_gpu_of_somebody_else_does_not_keep_an_unused_service_from_zero() -> None:
    service = Service({"minReplicas": 0, "maxReplicas": 4})
    assert service.look_for(1_804, ready(gpu=100))[-1] == 0


def test_from_zero_the_first_request_counts_whatever_windows_say() -> None:
    service = quiet_to_zero()
    service.spec["behavior"] = {"scaleUp": {"stabilizationWindowSeconds": 300, "selectPolicy": "Disabled"}}
    decision = service.look(door=Door(waiting=1), after_s=0.1)
    assert (decision.replicas, decision.reason) == (1, "FirstRequest")
    assert decision.message == "From 0 to 1 worker. 1 request waits at the gateway, and there was no worker."


def test_from_zero_a_crowd_gets_as_many_as_the_policies_allow() -> None:
    service = quiet_to_zero()
    assert service.look(door=Door(waiting=400)).replicas == 4
    assert Service({"minReplicas": 0, "maxReplicas": 50}, replicas=0).look(door=Door(waiting=400)).replicas == 4


def test_what_waits_while_the_first_worker_starts_asks_for_it_only_once() -> None:
    service = quiet_to_zero()
    numbers = [service.look(door=Door(waiting=3)).replicas, *service.look_for(120, STARTING, door=Door(waiting=3))]
    assert set(numbers) == {1}


# Down.


def test_scaling_down_waits_for_the_window_and_says_the_figures_of_the_moment() -> None:
    service = Service(replicas=4)
    service.look(*[ready(waiting=4, running=8)] * 4)
    assert set(service.look_for(298, *[ready()] * 4)) == {4}
    decision = service.look(*[ready()] * 4)
    assert (decision.replicas, decision.reason) == (1, "QueueBelowTarget")


def test_a_busy_gpu_vetoes_scaling_down_while_it_is_above_its_target() -> None:
    service = Service(replicas=4)
    assert set(service.look_for(900, *[ready(running=1, gpu=81)] * 4)) == {4}
    assert service.look(*[ready(running=1, gpu=81)] * 4).reason == "GpuBusy"
    assert service.look_for(302, *[ready(running=1, gpu=80)] * 4)[-1] == 1


def test_no_worker_goes_whose_requests_have_no_place_in_the_others_batches() -> None:
    service = Service(replicas=4)
    decision = service.look(*[ready(running=7)] * 4, after_s=400)
    assert (decision.replicas, decision.reason) == (4, "BatchesFull")
    assert service.look_for(310, *[ready(running=5)] * 4)[-1] == 3


def test_a_policy_takes_workers_one_at_a_time() -> None:
    policy = {"type": "Pods", "value": 1, "periodSeconds": 60}
    behavior = {"scaleDown": {"stabilizationWindowSeconds": 0, "policies": [policy]}}
    service = Service({"minReplicas": 1, "maxReplicas": 8, "behavior": behavior}, replicas=4)
    numbers = []
    for _ in range(90):
        numbers.append(service.look(*[ready()] * service.replicas).replicas)
    assert [numbers.count(number) for number in (3, 2, 1)] == [30, 30, 30]


def test_scale_down_disabled_keeps_every_worker_even_from_zero() -> None:
    service = Service(
        {"minReplicas": 0, "maxReplicas": 8, "behavior": {"scaleDown": {"selectPolicy": "Disabled"}}}, replicas=2
    )
    assert set(service.look_for(7_200, ready(), ready())) == {2}


def test_a_restarted_autoscaler_keeps_the_number_for_a_whole_window() -> None:
    service = Service(replicas=5)
    assert set(service.look_for(300, *[ready()] * 5)) == {5}
    assert service.look(*[ready()] * 5).replicas == 1


def test_the_words_of_what_changes_nothing_stay_the_same_while_it_lasts() -> None:
    service = Service({"minReplicas": 1, "maxReplicas": 2}, replicas=2)
    words = {(one.reason, one.message) for one in (service.look(ready(waiting), ready()) for waiting in range(9, 90))}
    assert len(words) == 1
