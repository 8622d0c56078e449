"""What a pod's status means, in words that a user can act on."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gpumeter_operator.decide.pods import PodState, belongs, describe, exists

GPU = "nvidia.com/gpu"
SOON = datetime(2026, 11, 21, 10, 0, 20, tzinfo=UTC)


def pod(*, main: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    annotations = {"gpumeter.io/service-uid": "u-1"}
    metadata: dict[str, Any] = {"name": "smollm2-1", "namespace": "team-a", "annotations": annotations}
    metadata["creationTimestamp"] = "2026-11-21T10:00:00Z"
    if main is not None:
        status["containerStatuses"] = [{"name": "sidecar", "state": {"running": {}}}, {"name": "main", **main}]
    return {"metadata": metadata, "status": status}


def unschedulable(message: str, reason: str = "Unschedulable") -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return pod(phase="Pending", conditions=[condition])


def ended(**terminated: Any) -> dict[str, Any]:
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
    return pod(main={"state": waiting, "lastState": {"terminated": terminated}, "restartCount": 2})


def described(one: dict[str, Any]) -> PodState:
    return describe(one, GPU, SOON)


@pytest.mark.parametrize(
    ("one", "reason", "parts"),
    [
        (
            unschedulable("0/1 nodes are available: 1 Insufficient nvidia.com/gpu."),
            "InsufficientCapacity",
            ["0/1 nodes are available: 1 Insufficient nvidia.com/gpu.", "nodes that offer nvidia.com/gpu"],
        ),
        (
            unschedulable("0/2 nodes are available: 2 Insufficient memory."),
            "InsufficientCapacity",
            ["2 Insufficient memory.", "ask for less in spec.resources"],
        ),
        (
            unschedulable("0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."),
            "Unschedulable",
            ["didn't match Pod's node affinity/selector.", "Check spec.template"],
        ),
        (
            unschedulable('persistentvolumeclaim "models" not found'),
            "Unschedulable",
            ['persistentvolumeclaim "models" not found.', "volume claims"],
        ),
        (
            pod(main={"state": {"waiting": {"reason": "ErrImagePull", "message": "not found: worker:9"}}}),
            "ImagePullFailed",
            ["not found: worker:9", "spec.engine.image"],
        ),
        (
            pod(
                main={"state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}}}
            ),
            "CreateContainerConfigError",
            ['secret "x" not found.', "kubectl describe pod -n team-a smollm2-1"],
        ),
        (
            ended(exitCode=137, reason="OOMKilled", finishedAt="2026-11-21T10:00:00Z"),
            "OOMKilled",
            ["raise spec.resources.memory"],
        ),
        (
            ended(exitCode=255, reason="Unknown", message="ready: smollm2", finishedAt="2026-11-21T10:00:00Z"),
            "ContainerLost",
            ["lost with its node", "restarts: 2", "the worker did not fail"],
        ),
        (
            ended(exitCode=1, reason="Error", message="Traceback\nValueError: boom", finishedAt="2026-11-21T10:00:00Z"),
            "WorkerCrashed",
            ["exit code 1", "restarts: 2", "ValueError: boom.", "kubectl logs -n team-a smollm2-1 --previous"],
        ),
    ],
)
def test_every_way_to_fail_has_its_reason_and_says_what_to_do(
    one: dict[str, Any], reason: str, parts: list[str]
) -> None:
    problem = described(one).problem
    assert problem is not None
    assert problem.reason == reason
    for part in parts:
        assert part in problem.message


@pytest.mark.parametrize(
    "one",
    [
        pod(phase="Pending"),
        unschedulable("gated", reason="SchedulingGated"),
        pod(main={"state": {"waiting": {"reason": "ContainerCreating"}}}),
        pod(main={"state": {"running": {}}}),
        pod(main={"state": {"running": {}}, "lastState": {"terminated": {"exitCode": 0, "reason": "Completed"}}}),
    ],
)
def test_a_pod_that_simply_starts_has_no_problem(one: dict[str, Any]) -> None:
    assert described(one).problem is None
    assert described(one).failure is None


def test_a_container_that_waits_long_says_where_to_look() -> None:
    one = pod(main={"state": {"waiting": {"reason": "ContainerCreating"}}})
    state = describe(one, GPU, SOON + timedelta(seconds=1))
    assert state.stuck
    assert state.problem is not None
    assert state.problem.reason == "ContainerCreating"
    assert "kubectl describe pod -n team-a smollm2-1" in state.problem.message


@pytest.mark.parametrize("where", ["initContainerStatuses", "containerStatuses"])
def test_a_container_of_the_template_that_does_not_run_is_named(where: str) -> None:
    one = pod(**{where: [{"name": "fetch", "state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}}]})
    problem = described(one).problem
    assert problem is not None
    assert problem.reason == "CompanionFailed"
    assert "The container fetch of spec.template does not run (ErrImagePull: not found.)" in problem.message


def test_a_workers_last_words_are_taken_unchanged() -> None:
    state = described(ended(exitCode=3, message="GpuNotFound: No GPU; ask for one: set count.\n", finishedAt="t"))
    assert state.failure is not None
    assert state.problem == state.failure.problem
    assert (state.failure.problem.reason, state.failure.problem.message) == (
        "GpuNotFound",
        "No GPU; ask for one: set count.",
    )
    assert state.failure.finished_at == "t"


@pytest.mark.parametrize(("uri", "revision"), [("hf://o/n", "v2"), ("pvc://models/n", "")])
def test_a_failure_knows_the_revision_of_the_model_where_its_source_has_revisions(uri: str, revision: str) -> None:
    one = ended(exitCode=3, message="ModelNotFound: There is no revision v2.")
    env = [{"name": "GPUMETER_MODEL_URI", "value": uri}, {"name": "GPUMETER_MODEL_REVISION", "value": "v2"}]
    one["spec"] = {"containers": [{"name": "main", "env": env}]}
    state = described(one)
    assert state.failure is not None
    assert state.failure.revision == revision


def test_only_exit_code_3_speaks_in_the_workers_own_reasons() -> None:
    problem = described(ended(exitCode=1, message="ValueError: boom")).problem
    assert problem is not None
    assert problem.reason == "WorkerCrashed"


def test_the_memory_limit_is_named_when_kubernetes_states_it() -> None:
    main = {"state": {}, "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    problem = described(pod(main={**main, "resources": {"limits": {"memory": "4Gi"}}})).problem
    assert problem is not None
    assert "spec.resources.memory (4Gi)" in problem.message


def test_a_ready_pod_has_no_problem_but_remembers_its_last_failure() -> None:
    one = ended(exitCode=3, message="OutOfMemory: The model does not fit.")
    one["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    state = described(one)
    assert state.ready
    assert state.problem is None
    assert state.failure is not None


def test_a_terminating_pod_is_not_ready_whatever_it_says() -> None:
    one = pod(conditions=[{"type": "Ready", "status": "True"}])
    one["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"
    state = described(one)
    assert (state.ready, state.terminating) == (False, True)


def test_pods_of_a_former_namesake_do_not_belong() -> None:
    assert belongs(pod(), "u-1")
    assert not belongs(pod(), "u-2")


@pytest.mark.parametrize(
    ("phase", "there"), [("Pending", True), ("Running", True), ("Failed", False), ("Succeeded", False)]
)
def test_a_pod_that_ended_for_good_no_longer_counts(phase: str, there: bool) -> None:
    assert exists(pod(phase=phase)) is there


def unheard(**ready: str) -> dict[str, Any]:
    conditions = [{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": "False", **ready}]
    one = pod(main={"state": {"running": {"startedAt": "2026-11-21T09:00:00Z"}}, "ready": True}, conditions=conditions)
    return {**one, "spec": {"nodeName": "node-7"}}


def test_a_worker_whose_node_says_nothing_is_not_said_to_load_its_model():
    problem = described(unheard()).problem
    assert problem is not None and problem.reason == "NodeLost"
    assert "node-7" in problem.message and "node.kubernetes.io/unreachable" in problem.message


def test_a_readiness_gate_that_is_closed_is_no_lost_node():
    assert described(unheard(reason="ReadinessGatesNotReady")).problem is None


def test_a_pod_that_is_marked_as_draining_is_told_from_one_that_serves() -> None:
    one = pod(phase="Running")
    assert not described(one).draining
    one["metadata"]["labels"] = {"gpumeter.io/draining": "true"}
    assert described(one).draining
