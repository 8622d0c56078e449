"""HPA v2's algorithm gives the numbers that Kubernetes' own tests publish.

The figures are those of k8s.io/kubernetes v1.36.3, pkg/controller/podautoscaler: TestScalingWithRules and
TestNormalizeDesiredReplicasWithBehavior in horizontal_test.go, the plain metrics of replica_calculator_test.go.
"""

from typing import Any

import pytest

from gpumeter_operator.decide.hpa import Change, Recommendation, asked_for, limited, recent, remembered, stabilized
from gpumeter_operator.decide.scaling import Scaling, read_scaling

NOW_MS = 10_000_000
NONE: tuple[tuple[int, ...], int] = ((), 1)
MINUTE_MS = 60_000


def scaling(**behavior: Any) -> Scaling:
    return read_scaling({"minReplicas": 1, "maxReplicas": 1000, "behavior": behavior}, 1_800_000)


def rules(pods: int, pods_s: int, percent: int, percent_s: int, window_s: int) -> dict[str, Any]:
    policies = [
        *([{"type": "Pods", "value": pods, "periodSeconds": pods_s}] if pods else []),
        *([{"type": "Percent", "value": percent, "periodSeconds": percent_s}] if percent else []),
    ]
    return {
        "stabilizationWindowSeconds": window_s,
        "selectPolicy": "Max",
        **({"policies": policies} if policies else {}),
    }


def spread(events: tuple[tuple[int, ...], int], sign: int) -> list[Change]:
    """Changes in the middle of equal parts of the last so many seconds, as the upstream tests make them."""
    values, period_s = events
    part_s = period_s / max(len(values), 1)
    return [
        Change(NOW_MS - int(1_000 * (period_s - part_s * (place + 1) + part_s / 2)), sign * value)
        for place, value in enumerate(values)
    ]


# (current, wanted, (min, max), scaleUp, scaleDown, raised lately, lowered lately, expected, what limited it)
# fmt: off
RATES: list[Any] = [
    (5, 7, (3, 8), None, None, NONE, NONE, 7, ""),
    (3, 1, (2, 8), None, None, NONE, NONE, 2, "TooFewReplicas"),
    (1, 0, (0, 10), None, None, NONE, NONE, 0, ""),
    (20, 1000, (1, 10), None, None, NONE, NONE, 10, "TooManyReplicas"),
    (100, 1000, (100, 150), None, None, NONE, NONE, 150, "TooManyReplicas"),
    (3, 1000, (1, 2000), (0, 0, 1, 60, 0), None, NONE, NONE, 4, "ScaleUpLimit"),
    (1000, 3, (3, 2000), None, (20, 60, 0, 0, 0), NONE, NONE, 980, "ScaleDownLimit"),
    (10, 50, (1, 1000), None, None, NONE, NONE, 20, "ScaleUpLimit"),
    (10, 500, (1, 1000), (100, 60, 100, 60, 0), None, NONE, NONE, 110, "ScaleUpLimit"),
    (10, 500, (1, 1000), (2, 60, 100, 60, 0), None, NONE, NONE, 20, "ScaleUpLimit"),
    (10, 50, (1, 1000), (100, 60, 0, 0, 0), None, NONE, NONE, 50, ""),
    (10, 50, (1, 1000), (10000, 60, 0, 0, 0), None, NONE, NONE, 50, ""),
    (10, 50, (1, 1000), (30, 60, 0, 0, 0), None, NONE, NONE, 40, "ScaleUpLimit"),
    (10, 50, (1, 1000), (0, 0, 200, 60, 0), None, NONE, NONE, 30, "ScaleUpLimit"),
    (100, 2, (1, 1000), None, (20, 60, 1, 60, 300), NONE, NONE, 80, "ScaleDownLimit"),
    (100, 2, (1, 1000), None, (2, 60, 1, 60, 300), NONE, NONE, 98, "ScaleDownLimit"),
    (10, 0, (1, 1000), None, (100, 60, 0, 0, 300), NONE, NONE, 1, "TooFewReplicas"),
    (10, 0, (1, 1000), None, (100, 60, 0, 0, 300), NONE, NONE, 1, "TooFewReplicas"),
    (10, 2, (5, 1000), None, (0, 0, 100, 60, 300), NONE, NONE, 5, "TooFewReplicas"),
    (10, 2, (1, 1000), None, (5, 60, 0, 0, 300), NONE, NONE, 5, "ScaleDownLimit"),
    (10, 5, (1, 1000), None, (0, 0, 50, 60, 300), NONE, NONE, 5, ""),
    (100, 500, (1, 200), (300, 60, 0, 0, 0), None, ((1, 5, 9,), 120), NONE, 200, "TooManyReplicas"),
    (100, 500, (1, 200), (0, 0, 10000, 60, 0), None, ((1, 5, 9,), 120), NONE, 200, "TooManyReplicas"),
    (100, 500, (1, 1000), (5, 120, 0, 0, 0), None, ((1, 5, 9,), 120), NONE, 100, "ScaleUpLimit"),
    (100, 500, (1, 1000), (150, 120, 0, 0, 0), None, ((1, 5, 9,), 120), NONE, 235, "ScaleUpLimit"),
    (100, 500, (1, 1000), (0, 0, 200, 120, 0), None, ((1, 5, 9,), 120), NONE, 255, "ScaleUpLimit"),
    (6, 24, (1, 1000), (0, 0, 300, 300, 0), None, ((4,), 120), ((2,), 120), 16, "ScaleUpLimit"),
    (10, 5, (1, 1000), None, None, NONE, ((1, 5, 9,), 120), 5, ""),
    (100, 0, (1, 1000), None, (115, 120, 0, 0, 300), NONE, ((1, 5, 9,), 120), 1, "TooFewReplicas"),
    (100, 0, (5, 1000), None, (130, 120, 0, 0, 300), NONE, ((1, 5, 9,), 120), 5, "TooFewReplicas"),
    (100, 2, (5, 1000), None, (0, 0, 100, 120, 300), NONE, ((1, 5, 9,), 120), 5, "TooFewReplicas"),
    (100, 2, (1, 1000), None, (5, 120, 0, 0, 300), NONE, ((1, 5, 9,), 120), 100, "ScaleDownLimit"),
    (100, 0, (1, 1000), None, (0, 0, 50, 120, 300), NONE, ((2, 4, 6,), 120), 56, "ScaleDownLimit"),
    (10, 1, (1, 1000), None, (0, 0, 50, 180, 0), ((2,), 120), ((4,), 120), 6, "ScaleDownLimit"),
    (100, 0, (1, 1000), None, (0, 0, 10, 120, 300), NONE, ((10, 10, 10,), 120), 100, "ScaleDownLimit"),
    (10, 5, (1, 1000), None, (0, 0, 1000, 120, 300), NONE, ((10, 10, 10,), 120), 5, ""),
    (100, 200, (1, 1000), (1000, 60, 0, 0, 0), None, ((8, 12, 9, 11,), 120), NONE, 200, ""),
    (100, 200, (1, 1000), (1000, 120, 100, 60, 0), None, ((8, 12, 9, 11,), 120), NONE, 200, ""),
    (100, 200, (1, 1000), (1000, 30, 100, 60, 0), None, ((8, 12, 9, 11,), 120), NONE, 200, ""),
    (100, 5, (1, 1000), None, (1000, 60, 0, 0, 300), NONE, ((8, 12, 9, 11,), 120), 5, ""),
    (100, 5, (1, 1000), None, (1000, 120, 100, 60, 300), NONE, ((8, 12, 9, 11,), 120), 5, ""),
    (100, 5, (1, 1000), None, (1000, 30, 100, 60, 300), NONE, ((8, 12, 9, 11,), 120), 5, ""),
]
# fmt: on


@pytest.mark.parametrize(("current", "wanted", "bounds", "up", "down", "raised", "lowered", "expected", "why"), RATES)
def test_policies_and_bounds_limit_as_upstream(
    *, current: int, wanted: int, bounds: Any, up: Any, down: Any, raised: Any, lowered: Any, expected: int, why: str
) -> None:
    behavior = {"scaleUp": rules(*up) if up else {}, "scaleDown": rules(*down) if down else {}}
    changes = [*spread(raised, 1), *spread(lowered, -1)]
    asked = scaling(**behavior)
    found = limited(wanted, current, changes, NOW_MS, asked, least=bounds[0], most=bounds[1])
    assert found == (expected, why)
    kept = recent(changes, NOW_MS, asked)
    assert limited(wanted, current, kept, NOW_MS, asked, least=bounds[0], most=bounds[1]) == found


@pytest.mark.parametrize(
    ("past", "current", "wanted", "up_s", "down_s", "expected"),
    [
        ([], 100, 5, 0, 0, 5),
        ([(4, 2), (5, 1)], 100, 3, 0, 180, 5),
        ([(4, 2), (5, 1)], 1, 7, 300, 0, 4),
        ([(1, 2), (2, 1)], 100, 3, 300, 0, 3),
        ([(4, 2), (5, 1)], 1, 3, 0, 300, 3),
        ([(10, 10), (9, 9)], 100, 3, 0, 0, 3),
        ([(10, 10), (9, 9)], 1, 100, 0, 0, 100),
        ([(10, 10), (5, 2), (4, 1)], 100, 3, 0, 180, 5),
        ([(10, 100), (9, 3), (5, 2), (6, 1)], 1, 100, 300, 0, 5),
        ([(2, 100), (3, 3)], 2, 1, 300, 300, 2),
        ([(2, 100), (1, 3)], 2, 3, 300, 300, 2),
    ],
)
def test_windows_hold_back_as_upstream(
    *, past: list[tuple[int, int]], current: int, wanted: int, up_s: int, down_s: int, expected: int
) -> None:
    asked = scaling(scaleUp={"stabilizationWindowSeconds": up_s}, scaleDown={"stabilizationWindowSeconds": down_s})
    before = [Recommendation(NOW_MS - minutes * MINUTE_MS, replicas) for replicas, minutes in past]
    assert stabilized(wanted, current, before, NOW_MS, asked) == expected


@pytest.mark.parametrize(
    ("measured", "silent", "starting", "current", "target", "expected"),
    [
        ((20, 10, 30), 0, 0, 3, 15, 4),  # TestReplicaCalcScaleUpCM
        ((50, 10, 30), 0, 0, 3, 15, 6),  # ...ScaleUpCMUnreadyHotCpuNoLessScale: plain metrics do not judge by CPU
        ((50, 15, 30), 0, 0, 3, 15, 7),  # ...ScaleUpCMUnreadyHotCpuScaleWouldScaleDown
        ((12, 12, 12, 12, 12), 0, 0, 5, 20, 3),  # TestReplicaCalcScaleDownCM
        ((20, 21, 21), 0, 0, 3, 20, 3),  # TestReplicaCalcToleranceCM
        ((20, 19, 21), 2, 0, 5, 20, 5),  # TestPlainMetricReplicaCalcMissingMetricsNoChangeEq
        ((10, 10), 1, 0, 2, 17, 2),  # TestReplicaCalcDuringRollingUpdateWithMaxSurgeCM
    ],
)
def test_the_ratio_asks_for_as_many_as_upstream(
    *, measured: tuple[int, ...], silent: int, starting: int, current: int, target: int, expected: int
) -> None:
    found = asked_for(
        measured, silent=silent, starting=starting, beside=0, current=current, target=target, scaling=scaling()
    )
    assert found == expected


def test_starting_pods_count_as_idle_when_more_is_wanted_and_not_at_all_when_less_is() -> None:
    def ask(measured: tuple[int, ...], starting: int) -> int:
        return asked_for(measured, silent=0, starting=starting, beside=0, current=4, target=4, scaling=scaling())

    assert ask((8, 8), 2) == 4, "the two that start will take what is too much"
    assert ask((16, 16), 2) == 8
    assert ask((1, 1), 2) == 1, "those that start do not keep a lower number from being found"


def test_a_silent_pod_moves_nothing_in_either_direction() -> None:
    def ask(measured: tuple[int, ...]) -> int:
        return asked_for(measured, silent=1, starting=0, beside=0, current=2, target=4, scaling=scaling())

    assert ask((0,)) == 1 and ask((6,)) == 2 and ask((4,)) == 2


def test_surplus_pods_and_missing_ones_never_turn_the_direction_round() -> None:
    assert asked_for((3, 3, 3), silent=0, starting=0, beside=0, current=2, target=4, scaling=scaling()) == 2
    assert asked_for((8, 8), silent=0, starting=0, beside=0, current=10, target=4, scaling=scaling()) == 10


def test_the_tolerance_is_a_quantity_and_each_direction_has_its_own() -> None:
    def ask(measured: int, **behavior: Any) -> int:
        return asked_for(
            (measured,), silent=0, starting=0, beside=0, current=1, target=100, scaling=scaling(**behavior)
        )

    assert (ask(110), ask(111)) == (1, 2)
    assert (ask(111, scaleUp={"tolerance": "0.2"}), ask(121, scaleUp={"tolerance": "200m"})) == (1, 2)
    assert ask(101, scaleUp={"tolerance": 0}) == 2


def test_equal_recommendations_in_a_row_are_kept_once_and_old_ones_go() -> None:
    past: tuple[Recommendation, ...] = ()
    for second in range(0, 1_000, 2):
        past = remembered(past, 3 if second < 500 else 2, second * 1_000, scaling())
    assert past == (Recommendation(998_000, 2),)
    assert remembered(past, 5, 999_000, scaling()) == (*past, Recommendation(999_000, 5))


@pytest.mark.parametrize(("select", "expected"), [("Max", 110), ("Min", 20), ("Disabled", 10)])
def test_select_policy_says_which_policy_holds(select: str, expected: int) -> None:
    asked = scaling(scaleUp={**rules(100, 60, 100, 60, 0), "selectPolicy": select})
    assert limited(500, 10, [], NOW_MS, asked, least=1, most=1000)[0] == expected
