"""Whatever a service meets, its autoscaler stays in its bounds, answers more load with no fewer workers, and waits."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gpumeter_operator.decide.autoscale import Memory, Sight, Worker, decide
from gpumeter_operator.decide.crew import Door, Load
from gpumeter_operator.decide.hpa import asked_for
from gpumeter_operator.decide.scaling import Scaling, read_scaling
from gpumeter_operator.decide.spec import Problem
from rigs.thoroughness import examples

POLICY = st.fixed_dictionaries(
    {"type": st.sampled_from(["Pods", "Percent"]), "value": st.integers(1, 200), "periodSeconds": st.integers(1, 600)}
)
RULES = st.fixed_dictionaries(
    {},
    optional={
        "stabilizationWindowSeconds": st.integers(0, 600),
        "selectPolicy": st.sampled_from(["Max", "Min", "Disabled"]),
        "policies": st.lists(POLICY, min_size=1, max_size=3),
        "tolerance": st.sampled_from(["0", "0.05", "500m", "2"]),
    },
)


@st.composite
def scalings(draw: st.DrawFn) -> Scaling:
    least = draw(st.integers(0, 12))
    spec: dict[str, Any] = {
        "minReplicas": least,
        "maxReplicas": draw(st.integers(max(least, 1), 20)),
        "targetQueueLength": draw(st.integers(1, 50)),
        "targetGpuUtilization": draw(st.integers(1, 100)),
        "behavior": draw(st.fixed_dictionaries({}, optional={"scaleUp": RULES, "scaleDown": RULES})),
    }
    return read_scaling(spec, draw(st.sampled_from([30_000, 1_800_000])))


LOADS = st.builds(
    Load, st.just(0), st.integers(0, 300), st.integers(0, 64), st.none() | st.integers(0, 100), st.integers(0, 3)
)
WORKERS = st.builds(Worker, st.booleans(), st.booleans(), st.none() | LOADS)
DOORS = st.builds(Door, st.integers(0, 200), st.integers(0, 200), st.booleans())
BLOCKS = st.none() | st.just(Problem("QuotaExceeded", "Exceeded quota."))


@given(scalings(), st.data(), st.integers(0, 25))
@settings(max_examples=examples(150), deadline=None)
def test_the_number_never_leaves_its_bounds_and_the_reason_is_never_empty(
    scaling: Scaling, data: st.DataObject, replicas: int
) -> None:
    memory, now_ms, was_ready = Memory(), 0, False
    for _ in range(data.draw(st.integers(1, 12))):
        now_ms += data.draw(st.sampled_from([100, 2_000, 60_000, 2_000_000]))
        workers = tuple(data.draw(st.lists(WORKERS, max_size=8)))
        was_ready |= any(one.ready and one.load is not None for one in workers)
        sight = Sight(replicas, workers, data.draw(DOORS), data.draw(st.integers(1, 64)), data.draw(BLOCKS))
        decision, memory = decide(scaling, sight, memory, now_ms)
        assert scaling.least <= decision.replicas <= scaling.most
        assert decision.reason and decision.message and decision.former == replicas
        if decision.replicas == 0 and replicas > 0:
            assert was_ready, "to zero before a worker was ready"
        if sight.blocked is not None and scaling.least <= replicas <= scaling.most and replicas:
            assert decision.replicas <= replicas, "more was asked of a cluster that gives no more"
        replicas = decision.replicas


@given(scalings(), st.lists(st.integers(0, 300), max_size=8), st.integers(0, 5), st.integers(0, 5), st.integers(1, 20))
@settings(max_examples=examples(300), deadline=None)
def test_a_longer_queue_never_asks_for_fewer_workers(
    scaling: Scaling, measured: list[int], silent: int, starting: int, current: int
) -> None:
    def ask(measured: list[int], beside: int) -> int:
        return asked_for(
            measured,
            silent=silent,
            starting=starting,
            beside=beside,
            current=current,
            target=scaling.queue_length,
            scaling=scaling,
        )

    numbers = [ask(measured, beside) for beside in range(0, 120, 3)]
    assert numbers == sorted(numbers)
    for place in range(len(measured)):
        more = [*measured[:place], measured[place] + 7, *measured[place + 1 :]]
        assert ask(more, 0) >= ask(measured, 0)


@given(scalings(), st.lists(st.integers(0, 60), min_size=2, max_size=60), st.integers(1, 20))
@settings(max_examples=examples(150), deadline=None)
def test_windows_are_honoured_in_both_directions(scaling: Scaling, queues: list[int], replicas: int) -> None:
    """Down never below the highest recommendation of the window, up never above the lowest of its own."""
    memory, asked, now_ms = Memory(), [], 0
    for queue in queues:
        now_ms += 7_000
        busy = Worker(ready=True, placed=True, load=Load(now_ms, queue, 1))
        replicas = min(max(replicas, scaling.least, 1), scaling.most)
        decision, memory = decide(scaling, Sight(replicas, (busy,) * replicas, batch=64), memory, now_ms)
        asked.append((now_ms, memory.recommendations[-1].replicas))
        inside_down = [n for at, n in asked if now_ms - at < scaling.down.window_ms] or [asked[-1][1]]
        inside_up = [n for at, n in asked if now_ms - at < scaling.up.window_ms] or [asked[-1][1]]
        if decision.replicas < replicas:
            assert decision.replicas >= min(max(inside_down), scaling.most)
        if decision.replicas > replicas:
            assert decision.replicas <= max(min(inside_up), scaling.least)
        replicas = decision.replicas
