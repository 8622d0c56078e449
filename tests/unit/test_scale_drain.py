"""Which workers are to go, when they may, and the way back when load returns meanwhile."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from gpumeter_operator.decide.conditions import timestamp
from gpumeter_operator.decide.crew import COST_DRAINING, COST_LEAVING, Load, Replica, is_marked, replica_of
from gpumeter_operator.decide.drain import SETTLE_MS, Plan, plan

NOW = datetime(2026, 11, 21, 10, 0, 0, tzinfo=UTC)
NOW_MS = 5_000_000
TIMEOUT_MS = 120_000


def worker(
    name: str, *, ready: bool = True, marked_s: float | None = None, leaving: bool = False, age_s: int = 900
) -> Replica:
    since = "" if marked_s is None else timestamp(NOW - timedelta(seconds=marked_s))
    created = timestamp(NOW - timedelta(seconds=age_s))
    return Replica(name, name, "10.0.0.1", ready, True, since, leaving, created)


def load(in_flight: int, *, age_ms: int = 500) -> Load:
    return Load(NOW_MS - age_ms, 0, in_flight)


def planned(wanted: int, deployed: int, *crew: Replica, template: str = "", **loads: Load) -> Plan:
    return plan(wanted, deployed, crew, loads, timeout_ms=TIMEOUT_MS, now=NOW, now_ms=NOW_MS, template=template)


def test_the_worker_with_fewest_requests_is_marked_and_the_deployment_waits() -> None:
    found = planned(2, 3, worker("a"), worker("b"), worker("c"), a=load(5), b=load(1), c=load(4))
    assert found == Plan(3, mark=("b",))


def test_of_equals_the_youngest_goes_and_one_that_tells_nothing_goes_last() -> None:
    old, young, silent = worker("a", age_s=900), worker("b", age_s=60), worker("c", age_s=10)
    assert planned(2, 3, old, young, silent, a=load(2), b=load(2)).mark == ("b",)
    assert planned(1, 3, old, young, silent, a=load(9), b=load(9)).mark == ("b", "a")


def test_a_worker_that_is_not_ready_goes_first_and_at_once() -> None:
    found = planned(1, 2, worker("a"), worker("b", ready=False), a=load(0))
    assert found == Plan(1, leave=("b",))


def test_a_marked_worker_leaves_when_it_told_after_the_mark_that_it_is_empty() -> None:
    crew = worker("a"), worker("b", marked_s=10)
    assert planned(1, 2, *crew, a=load(3), b=load(1)) == Plan(2)
    assert planned(1, 2, *crew, a=load(3), b=load(0)) == Plan(1, leave=("b",))
    assert planned(1, 2, *crew, a=load(3), b=load(0, age_ms=9_000)) == Plan(2), "told before requests ceased to come"


def test_until_every_gateway_knows_an_empty_worker_stays() -> None:
    fresh = worker("b", marked_s=SETTLE_MS / 1_000 - 1)
    assert planned(1, 2, worker("a"), fresh, a=load(3), b=load(0, age_ms=0)) == Plan(2)


def test_after_the_drain_timeout_it_goes_whatever_runs_and_a_silent_one_no_earlier() -> None:
    assert planned(1, 2, worker("a"), worker("b", marked_s=119), a=load(0)) == Plan(2)
    assert planned(1, 2, worker("a"), worker("b", marked_s=120), a=load(0), b=load(7)) == Plan(1, leave=("b",))


@pytest.mark.parametrize("since", ["x", "3000-01-01T00:00:00Z"])
def test_a_mark_by_hand_whose_time_says_nothing_is_marked_again_with_a_time_and_cuts_nobody_off(since: str) -> None:
    by_hand = replace(worker("b"), draining_since=since)
    assert planned(1, 2, worker("a"), by_hand, a=load(3), b=load(1)) == Plan(2, mark=("b",))
    assert planned(2, 2, worker("a"), by_hand, a=load(3), b=load(1)) == Plan(2, unmark=("b",))


def test_a_mark_whose_time_has_no_zone_is_of_that_time_in_utc() -> None:
    by_hand = replace(worker("b"), draining_since="2026-11-21T09:59:50")
    assert planned(1, 2, worker("a"), by_hand, a=load(3), b=load(1)) == Plan(2)
    assert planned(1, 2, worker("a"), by_hand, a=load(3), b=load(0)) == Plan(1, leave=("b",))


def test_load_that_returns_takes_drained_workers_back_before_new_ones_are_made() -> None:
    found = planned(4, 3, worker("a"), worker("b", marked_s=10), worker("c", marked_s=10))
    assert found == Plan(4, unmark=("b", "c"))
    assert planned(2, 3, worker("a"), worker("b", marked_s=9), worker("c", marked_s=9), b=load(4), c=load(2)) == Plan(
        3, unmark=("b",)
    )


def test_a_choice_once_made_is_kept_while_loads_change() -> None:
    crew = worker("a"), worker("b", marked_s=10), worker("c")
    assert planned(2, 3, *crew, a=load(0), b=load(6), c=load(0)) == Plan(3)


def test_while_a_worker_that_left_is_still_seen_no_other_is_taken_back_or_sent() -> None:
    crew = worker("a"), worker("b"), worker("c", marked_s=20, leaving=True)
    assert planned(2, 2, *crew, a=load(1), b=load(1)) == Plan(2)


def test_when_the_replicaset_deleted_another_one_the_drained_worker_serves_again() -> None:
    assert planned(2, 2, worker("a"), worker("c", marked_s=20, leaving=True)) == Plan(2, unmark=("c",))


def test_pods_that_a_quota_never_let_be_made_are_taken_off_without_draining_anybody() -> None:
    assert planned(2, 6, worker("a"), worker("b"), a=load(3), b=load(3)) == Plan(2)
    assert planned(1, 6, worker("a"), worker("b"), a=load(3), b=load(2)) == Plan(2, mark=("b",))


def test_of_a_rollout_a_former_worker_goes_for_from_those_the_deployment_takes() -> None:
    former = [replace(worker("a"), template="old"), replace(worker("b"), template="old")]
    starting = replace(worker("c", ready=False, age_s=5), template="new")
    found = planned(1, 2, *former, starting, template="new", a=load(5), b=load(2))
    assert found == Plan(2, mark=("b",)), "not the one that starts, though it has nothing to lose"
    assert planned(1, 2, *former, starting, a=load(5), b=load(2)).leave == ("c",), "without a rollout it would"


def test_what_a_pod_says_of_its_draining_is_read_from_it() -> None:
    pod = {
        "metadata": {
            "name": "w",
            "uid": "u",
            "creationTimestamp": "2026-11-21T09:00:00Z",
            "labels": {"gpumeter.io/draining": "true"},
            "annotations": {
                "gpumeter.io/draining-since": "2026-11-21T09:59:00Z",
                "controller.kubernetes.io/pod-deletion-cost": str(COST_DRAINING),
            },
        },
        "spec": {"nodeName": "n"},
        "status": {"podIP": "10.0.0.7", "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    }
    one = replica_of(pod)
    assert one is not None and (one.ready, one.placed, one.draining, one.leaving) == (True, True, True, False)
    pod["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"] = str(COST_LEAVING)  # type: ignore[index]
    assert (one := replica_of(pod)) is not None and one.leaving and is_marked(pod)
    pod["metadata"]["labels"] = {}  # type: ignore[index]
    assert (one := replica_of(pod)) is not None and not one.draining and not is_marked(pod)
    pod["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"  # type: ignore[index]
    assert replica_of(pod) is None
