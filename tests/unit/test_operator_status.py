"""From pods to what the user reads: conditions, their reasons and their times."""

from datetime import UTC, datetime
from typing import Any

import pytest

from gpumeter_operator.decide.pods import Failure, PodState
from gpumeter_operator.decide.replicas import decide_replicas
from gpumeter_operator.decide.spec import Problem, read
from gpumeter_operator.decide.status import (
    Seen,
    changes,
    decide_leaving,
    decide_status,
    is_only_progress,
    plan_missing,
)

NOW = datetime(2026, 11, 21, 10, 0, 30, tzinfo=UTC)
LATER = datetime(2026, 11, 21, 11, 0, 0, tzinfo=UTC)
CAPACITY = Problem("InsufficientCapacity", "No node has a free GPU.")
LOST_MODEL = Problem("ModelNotFound", "There is no model at file:///x; check spec.model.uri.")


def worker(name: str = "w-1", **state: Any) -> PodState:
    defaults: dict[str, Any] = {
        "template_hash": "now", "ready": False, "terminating": False, "started": False,
        "stuck": False, "problem": None, "failure": None,
    }  # fmt: skip
    return PodState(name=name, **{**defaults, **state})


def ready(name: str = "w-1", **state: Any) -> PodState:
    return worker(name, ready=True, started=True, **state)


def status(
    *pods: PodState,
    spec: dict[str, Any] | None = None,
    problems: tuple[Problem, ...] = (),
    deployment: dict[str, Any] | None = None,
    former: dict[str, Any] | None = None,
    stopped: bool = False,
    now: datetime = NOW,
    has_plan: bool | None = None,
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"namespace": "team-a", "name": "smollm2", "uid": "u", "generation": 4}
    if stopped:
        metadata["annotations"] = {"gpumeter.io/stop": "true"}
    read_spec, _ = read({"metadata": metadata, "spec": {"model": {"uri": "hf://o/n"}, **(spec or {})}})
    hash_ = "" if problems else "now"
    seen = Seen(read_spec, decide_replicas(read_spec), problems, hash_, deployment, pods, has_plan=has_plan)
    return decide_status(seen, former or {}, now)


def told(one: dict[str, Any], kind: str = "Ready") -> tuple[str, str, str]:
    [condition] = [condition for condition in one["conditions"] if condition["type"] == kind]
    return condition["status"], condition["reason"], condition["message"]


FAILED = worker(started=True, problem=LOST_MODEL, failure=Failure(LOST_MODEL, "2026-11-21T10:00:00Z"))


@pytest.mark.parametrize(
    ("pods", "spec", "expected", "state"),
    [
        ([], {}, ("False", "PodsStarting"), "Pending"),
        ([worker()], {}, ("False", "PodsStarting"), "Pending"),
        ([worker(started=True)], {}, ("False", "ModelLoading"), "Loading"),
        ([worker(problem=CAPACITY)], {}, ("False", "InsufficientCapacity"), "Pending"),
        ([FAILED], {}, ("False", "ModelNotFound"), "FailedToLoad"),
        ([ready()], {}, ("True", "Serving"), "Loaded"),
        ([ready(), worker("w-2", problem=CAPACITY)], {"replicas": 2}, ("True", "InsufficientCapacity"), "Loaded"),
        ([ready(), worker("w-2")], {"replicas": 2}, ("True", "PodsStarting"), "Loaded"),
        ([ready(), ready("w-2")], {"replicas": 1}, ("True", "Serving"), "Loaded"),
        ([], {"replicas": 0}, ("False", "ScaledToZero"), "Standby"),
        ([ready(template_hash="old")], {}, ("True", "PodsStarting"), "Loaded"),
        ([ready(template_hash="old"), FAILED], {}, ("True", "ModelNotFound"), "Loaded"),
        ([worker(problem=CAPACITY), FAILED], {"replicas": 2}, ("False", "ModelNotFound"), "FailedToLoad"),
    ],
)
def test_ready_says_whether_requests_are_answered_and_its_reason_what_is_wrong(
    pods: list[PodState], spec: dict[str, Any], expected: tuple[str, str], state: str
) -> None:
    one = status(*pods, spec=spec)
    assert told(one)[:2] == expected
    assert one["modelStatus"]["state"] == state


def test_the_words_of_a_problem_are_not_changed_on_their_way() -> None:
    one = status(FAILED)
    assert told(one)[2] == LOST_MODEL.message
    assert told(one, "WorkloadsReady") == ("False", LOST_MODEL.reason, LOST_MODEL.message)
    assert one["modelStatus"]["lastFailureInfo"] == {
        "reason": LOST_MODEL.reason,
        "message": LOST_MODEL.message,
        "modelRevision": None,
        "time": "2026-11-21T10:00:00Z",
    }


def test_a_broken_rollout_says_that_the_former_workers_go_on() -> None:
    message = told(status(ready("w-0", template_hash="old"), FAILED))[2]
    assert message == f"1 of 1 worker: {LOST_MODEL.message} The former workers go on serving."


def test_a_rollout_that_finds_no_room_says_how_to_make_some() -> None:
    old, room = ready("w-0", template_hash="old"), "maxSurge: 0, maxUnavailable: 1"
    for one in (status(old, worker(problem=CAPACITY)), status(old, deployment=refusing("exceeded quota: gpus"))):
        assert told(one)[0] == "True"
        assert room in told(one)[2]
        assert told(one)[2].endswith("The former workers go on serving.")
    assert room not in told(status(old, FAILED))[2], "a model that is not there needs no room"
    assert room not in told(status(ready(), worker("w-2", problem=CAPACITY), spec={"replicas": 2}))[2], "no rollout"


def refusing(message: str) -> dict[str, Any]:
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    return {"status": {"conditions": [condition]}}


def test_a_rollout_under_way_says_so_too() -> None:
    old = ready("w-0", template_hash="old")
    loading = "0 of 1 worker ready; 1 loading the model. The former workers go on serving."
    assert told(status(old, worker(started=True))) == ("True", "ModelLoading", loading)
    assert told(status(old))[2] == "0 of 1 worker ready; the others are starting. The former workers go on serving."


def test_a_spec_that_cannot_be_run_takes_nothing_from_the_former_workers_that_answer() -> None:
    one = status(ready(template_hash="old"), problems=(Problem("NotSupported", "One."),))
    assert told(one)[:2] == ("True", "NotSupported")
    assert told(one, "WorkloadsReady")[:2] == ("False", "NotSupported")
    assert told(status(worker(), problems=(Problem("NotSupported", "One."),)))[:2] == ("False", "NotSupported")


def test_a_rollout_that_the_deployment_has_given_up_says_so_where_no_pod_says_why() -> None:
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    deployment = {"status": {"conditions": [late]}}
    old = ready("w-0", template_hash="old")
    reason, message = told(status(old, worker(started=True), deployment=deployment))[1:]
    assert reason == "ProgressDeadlineExceeded"
    assert message.startswith("0 of 1 worker: no further worker got ready in 60 minutes;")
    assert message.endswith("The former workers go on serving.")
    assert told(status(old, FAILED, deployment=deployment))[1] == LOST_MODEL.reason, "the pod's own words come first"
    assert told(status(ready(), deployment=deployment))[1] == "Serving", "a deadline that passed long ago"


CAN = {"profileHash": "p-1", "gpuClass": "h100", "boundBy": "Compute", "contextTokens": 512, "batches": []}


def test_what_a_worker_can_do_is_told_once_for_a_profile_and_kept_while_nobody_runs() -> None:
    first = status(ready(capacity=CAN))
    assert first["capacity"] == {**CAN, "measuredAt": "2026-11-21T10:00:30Z"}
    other = {**CAN, "profileHash": "p-2"}
    beside = status(ready(capacity=CAN), ready("w-2", capacity=other), former=first)
    for later in (status(former=first, now=LATER), beside):
        assert "capacity" not in later, "it stays as it is"
    replaced = status(ready("w-2", capacity=other), former={"capacity": {**CAN, "memoryHeadroomBytes": 7}}, now=LATER)
    assert replaced["capacity"] == {**other, "memoryHeadroomBytes": None, "measuredAt": "2026-11-21T11:00:00Z"}
    assert "capacity" not in status(ready("w-1", template_hash="old", capacity=CAN)), "of a former version"


def test_the_last_failure_names_the_revision_that_failed() -> None:
    failed = worker(started=True, problem=LOST_MODEL, failure=Failure(LOST_MODEL, "2026-11-21T10:00:00Z", "v2"))
    assert status(failed)["modelStatus"]["lastFailureInfo"]["modelRevision"] == "v2"


def test_problems_of_the_spec_are_all_in_ready() -> None:
    problems = (Problem("NotSupported", "One."), Problem("TemplateInvalid", "Two."))
    assert told(status(problems=problems)) == ("False", "SpecInvalid", "One. Two.")
    assert told(status(problems=problems[:1])) == ("False", "NotSupported", "One.")
    assert told(status(ready(template_hash="old"), problems=problems[:1]))[2] == "One. 1 former worker still serving."


def test_pods_that_cannot_be_created_are_told_from_the_deployment() -> None:
    message = 'pods "smollm2-x" is forbidden: exceeded quota: gpus, requested: 1, used: 4, limited: 4'
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    one = status(deployment={"status": {"conditions": [condition]}})
    assert told(one)[:2] == ("False", "QuotaExceeded")
    assert message in told(one)[2]


def test_a_stopped_service_says_so_and_does_not_scale() -> None:
    one = status(stopped=True, spec={"replicas": 3})
    assert told(one)[:2] == ("False", "Stopped")
    assert told(one, "Stopped")[0] == "True"
    assert told(one, "ScalingReady")[:2] == ("False", "Stopped")
    assert one["modelStatus"]["state"] == "Standby"


def test_scaling_says_its_bounds_and_fixed_replicas_say_who_else_may_change_them() -> None:
    one = status(spec={"scaling": {"minReplicas": 0, "maxReplicas": 4}})
    assert told(one, "ScalingReady")[:2] == ("True", "WithinTarget")
    assert "From 0 to 4 workers" in told(one, "ScalingReady")[2]
    assert "an HPA or KEDA may change it" in told(status(spec={"replicas": 2}), "ScalingReady")[2]
    assert told(status(spec={"replicas": 2}), "ScalingReady")[:2] == ("True", "FixedReplicas")


def test_metering_is_known_only_of_ready_workers() -> None:
    assert told(status(), "MeteringReady")[:2] == ("Unknown", "NoWorkerReady")
    assert told(status(ready()), "MeteringReady")[0] == "True"
    broken = Problem("JournalUnusable", "The journal cannot be written; free space on the node.")
    assert told(status(worker(problem=broken)), "MeteringReady") == ("False", broken.reason, broken.message)


def test_a_calibration_that_failed_is_told_and_takes_neither_metering_nor_readiness_away() -> None:
    poor = Problem("CalibrationPoor", "The calibration is not good enough.")
    one = status(ready(), ready("w-2", stand_in=poor), spec={"replicas": 2})
    assert told(one, "MeteringReady") == ("True", "CalibrationPoor", "1 of 2 workers: " + poor.message)
    assert told(one)[:2] == ("True", "Serving")


GOLD = {"pricing": {"planRef": {"name": "gold"}}}


def test_a_price_plan_that_is_not_there_is_told_with_what_to_do_and_takes_nothing_from_serving() -> None:
    one = status(ready(), spec=GOLD, has_plan=False)
    assert told(one, "PricePlanFound")[:2] == ("False", "NoPricePlan")
    assert (
        "no PricePlan called gold, so usage is metered and reported without amounts" in told(one, "PricePlanFound")[2]
    )
    assert "Create it, or name another one in spec.pricing.planRef" in told(one, "PricePlanFound")[2]
    assert told(one)[:2] == ("True", "Serving")
    found = status(ready(), spec=GOLD, has_plan=True)
    assert told(found, "PricePlanFound") == ("True", "PlanFound", "There is a PricePlan called gold.")
    assert told(status(has_plan=False), "PricePlanFound")[2].startswith("There is no PricePlan called default,")


def test_where_nobody_can_tell_whether_there_is_a_plan_what_was_told_stays() -> None:
    for known in (True, False):
        former = status(spec=GOLD, has_plan=known)
        assert changes(former, status(spec=GOLD, former=former, now=LATER)) == {}
    assert "PricePlanFound" not in {one["type"] for one in status(spec=GOLD)["conditions"]}


def test_that_a_plan_is_missing_is_news_once_and_only_of_a_plan_that_the_service_names_itself() -> None:
    def news(former: dict[str, Any], now: dict[str, Any], spec: dict[str, Any]) -> Problem | None:
        metadata = {"namespace": "team-a", "name": "smollm2", "uid": "u"}
        return plan_missing(read({"metadata": metadata, "spec": spec})[0], former, now)

    missing, there = status(spec=GOLD, has_plan=False), status(spec=GOLD, has_plan=True)
    told_now = news({}, missing, GOLD)
    assert told_now is not None
    assert (told_now.reason, told_now.message) == told(missing, "PricePlanFound")[1:]
    assert news(there, missing, GOLD) is not None
    assert news(missing, missing, GOLD) is None
    assert news(missing, there, GOLD) is None
    assert news({}, status(has_plan=False), {}) is None, "who sets no prices need not be warned"


def test_only_the_progress_of_a_start_may_wait() -> None:
    starting, loading = status(), status(worker(started=True))
    assert is_only_progress({}, starting)
    assert is_only_progress({"usage": {}}, loading), "what the collector wrote is no state of ours"
    assert is_only_progress(starting, loading)
    assert not is_only_progress(starting, status(ready()))
    assert not is_only_progress(starting, status(worker(problem=CAPACITY)))
    assert not is_only_progress(status(worker(problem=CAPACITY)), starting), "nor that an error is over"
    assert not is_only_progress(status(ready()), starting), "nor that nobody serves any more"
    assert not is_only_progress({**starting, "observedGeneration": 3}, starting), "nor what has become of an edit"


def test_terminating_pods_do_not_count() -> None:
    one = status(worker("w-0", terminating=True), ready())
    assert (one["replicas"], one["readyReplicas"]) == (1, 1)


def test_url_and_selector_are_for_the_clients_and_the_scale_subresource() -> None:
    one = status()
    assert one["url"] == "http://smollm2.team-a.svc:8000/v1"
    assert one["selector"] == "gpumeter.io/inferenceservice=smollm2"
    assert one["observedGeneration"] == 4


def test_a_condition_keeps_its_time_while_its_status_stays_even_if_the_reason_changes() -> None:
    first = status()
    second = status(FAILED, former=first, now=LATER)
    assert [one["lastTransitionTime"] for one in second["conditions"]] == ["2026-11-21T10:00:30Z"] * 5
    third = status(ready(), former=second, now=LATER)
    times = {one["type"]: one["lastTransitionTime"] for one in third["conditions"]}
    assert times["Ready"] == times["MeteringReady"] == "2026-11-21T11:00:00Z"
    assert times["Stopped"] == "2026-11-21T10:00:30Z"


def test_deciding_again_with_nothing_new_changes_nothing() -> None:
    for pods in ([], [FAILED], [ready()]):
        first = status(*pods)
        stored = {**first, "modelStatus": {key: one for key, one in first["modelStatus"].items() if one is not None}}
        assert changes(stored, status(*pods, former=stored, now=LATER)) == {}


def test_a_patch_holds_only_what_differs_and_removes_what_is_over() -> None:
    former = {
        "replicas": 1,
        "queueLength": 7,
        "modelStatus": {"state": "FailedToLoad", "lastFailureInfo": {"reason": "X"}},
    }
    wanted = {"replicas": 1, "modelStatus": {"state": "Loaded", "lastFailureInfo": None}}
    assert changes(former, wanted) == {"modelStatus": {"state": "Loaded", "lastFailureInfo": None}}
    assert changes({}, wanted) == {"replicas": 1, "modelStatus": {"state": "Loaded"}}


def test_a_leaving_service_counts_its_workers_and_names_the_limit() -> None:
    former = status(ready())
    leaving = decide_leaving(former, 5, 2, "2026-11-21T10:05:00Z", LATER)
    assert told(leaving)[:2] == ("False", "Deleting")
    assert "2 workers finish" in told(leaving)[2]
    assert "2026-11-21T10:05:00Z" in told(leaving)[2]
    assert "1 worker finishes running requests and hands over" in told(decide_leaving(former, 5, 1, "", LATER))[2]
    assert told(decide_leaving(former, 5, 0, "", LATER))[2].startswith("No worker runs any more")
    assert [one["type"] for one in leaving["conditions"]] == [one["type"] for one in former["conditions"]]


def test_how_far_a_model_is_stands_in_model_status_and_condition_until_it_is_loaded() -> None:
    far = "fetching the model: 1,234 of 4,000 MB (30 %)"
    one = status(worker(started=True, loading=far))
    assert one["modelStatus"]["progress"] == far
    assert told(one)[2] == f"0 of 1 worker ready; 1 loading the model: {far}."
    assert status(ready(), worker("w-2", started=True, loading=far))["modelStatus"]["progress"] is None
    assert status(worker(started=True))["modelStatus"]["progress"] is None


def test_a_worker_that_drains_does_not_answer_and_a_service_with_no_other_is_not_ready() -> None:
    found = status(ready(draining=True), ready("w-2"), spec={"replicas": 2})
    assert (found["replicas"], found["readyReplicas"], told(found)) == (2, 1, ("True", "Serving", "1 worker ready."))
    found = status(ready(draining=True))
    assert (found["readyReplicas"], told(found)[:2]) == (0, ("False", "WorkersDraining"))
    broken = status(ready(draining=True), problems=(Problem("TemplateInvalid", "No."),))
    assert told(broken)[0] == "False", "no former worker serves"
