"""The operator as a real process against a real API server and controller manager, with the chart's own rights.

There is no node, so nobody runs the pods: the tests play scheduler and kubelet by writing the pods' status.
"""

import asyncio
import base64
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from apiserver import Run
from gpumeter_operator.adapters.kubernetes import (
    DEPLOYMENTS,
    EVENTS,
    INFERENCE_SERVICES,
    NAMESPACES,
    NETWORK_POLICIES,
    POD_DISRUPTION_BUDGETS,
    PODS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Cluster,
    Manifest,
    Refused,
    Resource,
)
from gpumeter_operator.cli.main import allow_deep_objects
from gpumeter_operator.decide.credentials import derive
from operatorrun import (
    MASTER_KEY,
    OperatorProcess,
    condition,
    eventually,
    identity_of_the_chart,
    let_controllers_work,
    running_operator,
    service,
    status_of,
)

NAME = "smollm2"
USER = "a-user"
OWNED = (
    (DEPLOYMENTS, NAME),
    (SERVICES, NAME),
    (SERVICES, f"{NAME}-usage"),
    (SERVICE_ACCOUNTS, NAME),
    (POD_DISRUPTION_BUDGETS, NAME),
    (NETWORK_POLICIES, NAME),
    (SECRETS, f"{NAME}-usage"),
)
Show = Callable[..., Awaitable[Manifest]]


@pytest.fixture(scope="module")
def operator(
    server: object, plane: Path, kubectl: Run, helm: Run, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    folder = tmp_path_factory.mktemp("operator")
    let_controllers_work(kubectl)
    with running_operator(identity_of_the_chart(kubectl, helm, plane, folder), folder) as one:
        yield one
        assert "Traceback" not in one.log.read_text(), one.log.read_text()


@pytest.fixture
async def cluster(operator: OperatorProcess, plane: Path, namespace: str) -> AsyncIterator[Cluster]:
    """The administrator's connection; afterwards no InferenceService of the test is left."""
    allow_deep_objects()  # as each command does: one of the tests writes such an object
    one = Cluster.connect(plane)
    yield one
    if not operator.runs:
        operator.start()
    await clear(one, namespace)
    await one.close()


async def clear(cluster: Cluster, namespace: str) -> None:
    """Delete what is left in a namespace, and wait until the operator has let it go."""

    async def gone() -> bool:
        for pod in await cluster.list(PODS, namespace):
            await end_pod(cluster, pod)
        left = await cluster.list(INFERENCE_SERVICES, namespace)
        for each in left:
            await cluster.delete(INFERENCE_SERVICES, each["metadata"]["name"], namespace)
        return not left

    await eventually(gone)


@pytest.fixture
def show(cluster: Cluster, namespace: str) -> Show:
    """Apply an InferenceService as a user would, and wait until the operator has told of that generation."""

    async def apply(**spec: Any) -> Manifest:
        return await shown(cluster, namespace, **spec)

    return apply


async def shown(cluster: Cluster, namespace: str, **spec: Any) -> Manifest:
    applied = await cluster.apply(service(namespace, NAME, **spec), field_manager=USER)

    async def told() -> Manifest | None:
        status = await status_of(cluster, namespace)
        return status if status.get("observedGeneration") == applied["metadata"]["generation"] else None

    await eventually(told, timeout_s=10)
    return applied


@pytest.fixture(scope="module", autouse=True)
def stories(
    request: pytest.FixtureRequest, operator: OperatorProcess, plane: Path
) -> Iterator[dict[str, Future[None]]]:
    """What waits for a clock and for nothing else: begun with the first test, judged by the test of its name.

    Those tests come before any that stops the operator, or counts what it writes.
    """
    asked = {item.name for item in request.session.items}
    with ThreadPoolExecutor(len(STORIES)) as threads:
        yield {
            name: threads.submit(lambda story=story: asyncio.run(in_a_namespace_of_its_own(plane, story)))
            for name, story in STORIES.items()
            if name in asked
        }


async def in_a_namespace_of_its_own(plane: Path, story: Callable[[Cluster, str], Awaitable[None]]) -> None:
    cluster, name = Cluster.connect(plane), f"test-{uuid.uuid4().hex[:8]}"
    try:
        await cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        await story(cluster, name)
        await clear(cluster, name)
        await cluster.delete(NAMESPACES, name)
    finally:
        await cluster.close()


async def end_pod(cluster: Cluster, pod: Manifest) -> None:
    """What a kubelet does when the last container has ended."""
    # The adapter has no deletion without grace, because the product must never use one.
    try:
        await cluster._answer("DELETE", _path_of(pod), None, {"gracePeriodSeconds": 0}, "application/json")
    except Refused as refusal:
        assert refusal.status == 404, refusal


def _path_of(pod: Manifest) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


async def pods(cluster: Cluster, namespace: str, count: int) -> list[Manifest]:
    async def exist() -> list[Manifest] | None:
        found = await cluster.list(PODS, namespace)
        found = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
        return sorted(found, key=lambda pod: pod["metadata"]["name"]) if len(found) == count else None

    return await eventually(exist)


async def say(cluster: Cluster, pod: Manifest, **status: Any) -> None:
    """Play the kubelet: write a pod's status."""
    metadata = pod["metadata"]
    await cluster.patch_status(PODS, metadata["name"], metadata["namespace"], {"status": status})


def container(state: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    defaults = {"name": "main", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
    return [{**defaults, "state": state, **more}]


def truth(kind: str, value: bool, **more: str) -> dict[str, str]:
    return {"type": kind, "status": str(value), "lastTransitionTime": "2026-11-21T10:00:00Z", **more}


READY = {
    "phase": "Running",
    "conditions": [truth("Ready", True), truth("ContainersReady", True), truth("PodScheduled", True)],
    "containerStatuses": container({"running": {"startedAt": "2026-11-21T10:00:00Z"}}, ready=True),
}


async def becomes(cluster: Cluster, namespace: str, reason: str, *, within_s: float = 30) -> Manifest:
    async def so() -> Manifest | None:
        status = await status_of(cluster, namespace)
        return status if condition(status).get("reason") == reason else None

    so.__name__ = f"Ready's reason {reason}"
    return await eventually(so, within_s)


async def bind(cluster: Cluster, pod: Manifest) -> None:
    """Play the scheduler, so that a deleted pod waits for its kubelet as a running one does."""
    metadata = {"name": pod["metadata"]["name"], "namespace": pod["metadata"]["namespace"]}
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": {"kind": "Node", "name": "none"}}
    await cluster._answer("POST", f"{_path_of(pod)}/binding", None, binding, "application/json")


async def serving(cluster: Cluster, namespace: str, **spec: Any) -> Manifest:
    """The pod of a service whose one worker is ready."""
    await shown(cluster, namespace, **spec)
    [pod] = await pods(cluster, namespace, 1)
    await bind(cluster, pod)
    await say(cluster, pod, **READY)
    await becomes(cluster, namespace, "Serving")
    return pod


async def test_a_service_becomes_everything_that_it_owns(cluster: Cluster, namespace: str, show: Show) -> None:
    applied = await show(replicas=2)
    uid = applied["metadata"]["uid"]
    for resource, name in OWNED:
        owned = await cluster.get(resource, name, namespace)
        assert owned is not None, f"{resource.kind} {name}"
        assert owned["metadata"]["ownerReferences"][0]["uid"] == uid
        assert owned["metadata"]["labels"]["gpumeter.io/inferenceservice"] == NAME
    secret = await cluster.get(SECRETS, f"{NAME}-usage", namespace) or {}
    kept = {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
    assert kept == {
        "usage-token": derive(MASTER_KEY, "usage-token", uid),
        "hop-key": derive(MASTER_KEY, "hop-key", uid),
    }
    made = await pods(cluster, namespace, 2)
    assert made[0]["metadata"]["annotations"]["gpumeter.io/service-uid"] == uid
    status = await status_of(cluster, namespace)
    assert status["url"] == f"http://{NAME}.{namespace}.svc:8000/v1"
    assert status["selector"] == f"gpumeter.io/inferenceservice={NAME}"
    finalizers = (await cluster.get(INFERENCE_SERVICES, NAME, namespace) or {})["metadata"]["finalizers"]
    assert finalizers == ["gpumeter.io/usage"]


async def test_an_edit_converges_within_seconds(cluster: Cluster, namespace: str, show: Show) -> None:
    await show()
    for size in ("8", "16", "32"):
        await show(engine={"maxBatchSize": int(size)})

        async def applied(size: str = size) -> bool:
            deployment = await cluster.get(DEPLOYMENTS, NAME, namespace) or {}
            environment = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
            return {"name": "GPUMETER_MAX_BATCH_SIZE", "value": size} in environment

        await eventually(applied, timeout_s=5)


@pytest.mark.parametrize(("resource", "name"), OWNED[:6], ids=lambda one: getattr(one, "kind", one))
async def test_an_owned_object_that_was_deleted_comes_back(
    cluster: Cluster, namespace: str, show: Show, resource: Resource, name: str
) -> None:
    await show()
    before = await cluster.get(resource, name, namespace) or {}
    await cluster.delete(resource, name, namespace)

    async def back() -> bool:
        again = await cluster.get(resource, name, namespace)
        return again is not None and again["metadata"]["uid"] != before["metadata"]["uid"]

    await eventually(back, timeout_s=15)


async def test_a_change_by_hand_is_put_right_and_a_users_own_label_survives(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    await show(replicas=1)
    by_hand = {"metadata": {"labels": {"team": "blue"}}, "spec": {"replicas": 5}}
    await cluster.patch(DEPLOYMENTS, NAME, namespace, by_hand)

    async def right() -> bool:
        deployment = await cluster.get(DEPLOYMENTS, NAME, namespace) or {}
        return bool(deployment["spec"]["replicas"] == 1 and deployment["metadata"]["labels"]["team"] == "blue")

    await eventually(right, timeout_s=10)
    await show(replicas=1, engine={"maxBatchSize": 8})
    deployment = await cluster.get(DEPLOYMENTS, NAME, namespace) or {}
    assert deployment["metadata"]["labels"]["team"] == "blue"


async def test_labels_and_annotations_of_others_survive_on_everything_that_is_owned(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    await show()
    theirs = {"metadata": {"labels": {"team": "blue"}, "annotations": {"note": "theirs"}}}
    for resource, name in OWNED:
        await cluster.patch(resource, name, namespace, theirs)
    # What is removed and what is edited makes the operator write each of them again.
    for resource, name in OWNED[:-1]:
        ours = {"metadata": {"labels": {"llm-d.ai/model": None}}}
        await cluster.patch(resource, name, namespace, ours)
    await show(engine={"maxBatchSize": 8})

    async def written_again() -> bool:
        found = [await cluster.get(resource, name, namespace) or {} for resource, name in OWNED[:-1]]
        return all("llm-d.ai/model" in one["metadata"]["labels"] for one in found)

    await eventually(written_again, timeout_s=10)
    for resource, name in OWNED:
        metadata = (await cluster.get(resource, name, namespace) or {})["metadata"]
        assert (metadata["labels"]["team"], metadata["annotations"]["note"]) == ("blue", "theirs"), resource.kind


async def test_a_rule_that_lets_strangers_in_and_a_selector_that_cuts_workers_off_are_put_right(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    await show()
    policy = await cluster.get(NETWORK_POLICIES, NAME, namespace) or {}
    await cluster.patch(
        NETWORK_POLICIES, NAME, namespace, {"spec": {"ingress": [*policy["spec"]["ingress"], {}], "egress": []}}
    )
    await cluster.patch(SERVICES, NAME, namespace, {"spec": {"selector": {"app": "theirs"}}})

    async def right() -> bool:
        policy = await cluster.get(NETWORK_POLICIES, NAME, namespace) or {}
        found = await cluster.get(SERVICES, NAME, namespace) or {}
        return len(policy["spec"]["ingress"]) == 2 and "app" not in found["spec"]["selector"]

    await eventually(right, timeout_s=10)


async def test_the_number_of_replicas_follows_the_spec_up_and_down(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    for wanted in (3, 1, 0, 2):
        await show(replicas=wanted)
        await pods(cluster, namespace, wanted)


async def test_conditions_follow_a_pod_from_no_capacity_over_failures_to_serving(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    await show(resources={"gpu": {"count": 1}})
    [pod] = await pods(cluster, namespace, 1)
    scheduler_says = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    unschedulable = truth("PodScheduled", False, reason="Unschedulable", message=scheduler_says)
    await say(cluster, pod, phase="Pending", conditions=[unschedulable])
    status = await becomes(cluster, namespace, "InsufficientCapacity")
    assert scheduler_says in condition(status)["message"]
    assert "spec.resources.gpu.count 0" in condition(status)["message"], "it says what to do"
    since = condition(status)["lastTransitionTime"]

    scheduled = [truth("PodScheduled", True), truth("Ready", False)]
    backing_off = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "nowhere/worker:1"'}}
    await say(cluster, pod, conditions=scheduled, containerStatuses=container(backing_off))
    status = await becomes(cluster, namespace, "ImagePullFailed")
    assert "nowhere/worker:1" in condition(status)["message"]

    sentence = "There is no model at file:///mnt/models/smollm2; check spec.model.uri."
    last_words = {"exitCode": 3, "message": f"ModelNotFound: {sentence}", "finishedAt": "2026-11-21T10:01:00Z"}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}}
    ended = {"terminated": {**last_words, "reason": "Error", "startedAt": "2026-11-21T10:00:00Z"}}
    await say(cluster, pod, containerStatuses=container(waiting, lastState=ended, restartCount=1))
    status = await becomes(cluster, namespace, "ModelNotFound")
    assert condition(status)["message"] == sentence, "the worker's own words, unchanged"
    assert status["modelStatus"] == {
        "state": "FailedToLoad",
        "lastFailureInfo": {"reason": "ModelNotFound", "message": sentence, "time": "2026-11-21T10:01:00Z"},
    }
    assert condition(status)["lastTransitionTime"] == since, "Ready was False all the time"

    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-11-21T10:02:00Z"}}
    await say(cluster, pod, containerStatuses=container(waiting, lastState=killed, restartCount=2))
    await becomes(cluster, namespace, "OOMKilled")

    await say(cluster, pod, **READY)
    status = await becomes(cluster, namespace, "Serving")
    assert condition(status)["status"] == "True"
    assert status["readyReplicas"] == 1
    assert status["modelStatus"] == {"state": "Loaded"}
    assert condition(status, "MeteringReady")["status"] == "True"

    async def all_told() -> list[Manifest] | None:
        told = await cluster.list(EVENTS, namespace)
        about = [one for one in told if one["involvedObject"]["kind"] == "InferenceService"]
        wanted = {"InsufficientCapacity", "ImagePullFailed", "ModelNotFound", "OOMKilled", "Serving"}
        return about if wanted <= {one["reason"] for one in about} else None

    told = await eventually(all_told, 10)  # an event is posted after the status that it is about
    reasons = [one["reason"] for one in told]
    assert sorted(reasons) == sorted(set(reasons)), "an event is not repeated"
    [failure] = [one for one in told if one["reason"] == "ModelNotFound"]
    assert (failure["message"], failure["type"]) == (sentence, "Warning")


async def test_a_spec_that_this_version_cannot_run_is_a_condition_and_makes_nothing(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    shared = {"gpu": {"resourceName": "nvidia.com/gpu.shared"}}
    await show(resources=shared, engine={"type": "vllm"})
    ready = condition(await becomes(cluster, namespace, "NotSupported"))
    assert "the time of its steps cannot be measured" in ready["message"]
    assert "only the engine transformers" in ready["message"], "all problems at once"
    for resource, name in OWNED:
        assert await cluster.get(resource, name, namespace) is None, f"{resource.kind} {name}"
    await show()
    await becomes(cluster, namespace, "PodsStarting")


async def test_scaling_starts_at_its_minimum_and_says_what_it_follows(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    await show(scaling={"minReplicas": 2, "maxReplicas": 4})
    scaling = condition(await status_of(cluster, namespace), "ScalingReady")
    assert (scaling["status"], scaling["reason"]) == ("True", "WithinTarget")
    assert "From 2 to 4 workers" in scaling["message"]
    await pods(cluster, namespace, 2)


async def test_a_template_without_the_shape_of_a_pod_is_told_and_one_that_the_api_server_refuses_in_its_own_words(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    await show(template={"spec": {"containers": {"main": {"env": {"A": "b"}}}}})
    ready = condition(await becomes(cluster, namespace, "TemplateInvalid"))
    assert "spec.template.spec.containers is a map, but Kubernetes takes a list there" in ready["message"]
    await show(template={"spec": {"nodeSelector": {"not a label": "x"}}})
    ready = condition(await becomes(cluster, namespace, "WorkloadRefused"))
    assert "spec.template.spec.nodeSelector" in ready["message"]
    assert await cluster.get(DEPLOYMENTS, NAME, namespace) is None


async def test_a_template_without_a_bottom_is_told_and_keeps_no_other_service_from_its_workers(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    bottomless: Any = "x"
    for _ in range(9_000):  # the API server takes up to 10,000 levels
        bottomless = {"inner": bottomless}
    odd = service(namespace, "odd", template={"spec": {"odd": bottomless}})
    await cluster.create(odd)
    await show()
    await pods(cluster, namespace, 1)

    async def told() -> bool:
        found = await cluster.get(INFERENCE_SERVICES, "odd", namespace) or {}
        conditions = (found.get("status") or {}).get("conditions") or ()
        return any("spec.template.spec.odd holds more than 100 levels" in one["message"] for one in conditions)

    await eventually(told, timeout_s=15)


async def test_the_stop_annotation_stops_and_its_removal_starts_again(
    cluster: Cluster, namespace: str, show: Show
) -> None:
    await show()
    await pods(cluster, namespace, 1)
    await cluster.patch(
        INFERENCE_SERVICES, NAME, namespace, {"metadata": {"annotations": {"gpumeter.io/stop": "true"}}}
    )
    status = await becomes(cluster, namespace, "Stopped", within_s=10)
    assert condition(status, "Stopped")["status"] == "True"
    await pods(cluster, namespace, 0)
    await cluster.patch(INFERENCE_SERVICES, NAME, namespace, {"metadata": {"annotations": {"gpumeter.io/stop": None}}})
    await pods(cluster, namespace, 1)
    status = await becomes(cluster, namespace, "PodsStarting", within_s=10)
    assert condition(status, "Stopped")["status"] == "False"


async def test_an_object_of_a_user_is_never_taken_over(cluster: Cluster, namespace: str, show: Show) -> None:
    port = {"name": "theirs", "port": 80, "protocol": "TCP", "targetPort": 80}
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME, "namespace": namespace}}
    await cluster.apply({**theirs, "spec": {"selector": {"app": "theirs"}, "ports": [port]}}, field_manager=USER)
    await show()
    ready = condition(await becomes(cluster, namespace, "NameTaken"))
    assert f"a Service called {NAME} that gpumeter did not make" in ready["message"]
    untouched = await cluster.get(SERVICES, NAME, namespace) or {}
    assert untouched["spec"]["selector"] == {"app": "theirs"}
    await cluster.delete(SERVICES, NAME, namespace)
    await becomes(cluster, namespace, "PodsStarting", within_s=15)


async def test_a_secret_of_a_user_is_never_taken_over(cluster: Cluster, namespace: str, show: Show) -> None:
    metadata = {"name": f"{NAME}-usage", "namespace": namespace}
    theirs = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"password": "eA=="}}
    made = await cluster.apply(theirs, field_manager=USER)
    await show()
    ready = condition(await becomes(cluster, namespace, "NameTaken"))
    assert f"a Secret called {NAME}-usage that gpumeter did not make" in ready["message"]
    untouched = await cluster.get(SECRETS, f"{NAME}-usage", namespace) or {}
    assert untouched["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    await cluster.delete(SECRETS, f"{NAME}-usage", namespace)
    await becomes(cluster, namespace, "PodsStarting", within_s=15)


async def test_a_deleted_service_stays_until_its_last_worker_has_ended(cluster: Cluster, namespace: str) -> None:
    pod = await serving(cluster, namespace)
    await cluster.delete(INFERENCE_SERVICES, NAME, namespace)

    ready = condition(await becomes(cluster, namespace, "Deleting"))
    assert "1 worker finishes running requests and hands over the last usage records" in ready["message"]

    async def drains() -> Manifest | None:
        found = await cluster.get(PODS, pod["metadata"]["name"], namespace) or {}
        return found if "deletionTimestamp" in found.get("metadata", {}) else None

    draining = await eventually(drains)
    assert draining["metadata"]["deletionGracePeriodSeconds"] == 165, "drain.timeout and 45 seconds, nothing cut short"
    assert await cluster.get(DEPLOYMENTS, NAME, namespace) is None
    assert await cluster.get(INFERENCE_SERVICES, NAME, namespace) is not None, "the collector still needs it"

    await end_pod(cluster, draining)

    async def gone() -> bool:
        return await cluster.get(INFERENCE_SERVICES, NAME, namespace) is None

    await eventually(gone, timeout_s=10)


async def _a_secret_is_deleted(cluster: Cluster, namespace: str) -> None:
    await shown(cluster, namespace)
    [pod] = await pods(cluster, namespace, 1)
    await cluster.delete(SECRETS, f"{NAME}-usage", namespace)
    await say(cluster, pod, phase="Pending", containerStatuses=container({"waiting": {"reason": "ContainerCreating"}}))

    async def back() -> bool:
        return await cluster.get(SECRETS, f"{NAME}-usage", namespace) is not None

    await eventually(back, timeout_s=45)


def test_a_deleted_secret_comes_back_when_pods_wait_for_it(
    request: pytest.FixtureRequest, stories: dict[str, Future[None]]
) -> None:
    stories[request.node.name].result()


async def _a_namespace_is_deleted(cluster: Cluster, namespace: str) -> None:
    pod = await serving(cluster, namespace)
    await cluster.delete(NAMESPACES, namespace)

    async def drains() -> bool:
        found = await cluster.get(PODS, pod["metadata"]["name"], namespace) or {}
        return "deletionTimestamp" in found.get("metadata", {})

    await eventually(drains)
    assert await cluster.get(INFERENCE_SERVICES, NAME, namespace) is not None, "the collector still needs it"
    await end_pod(cluster, pod)

    async def gone() -> bool:
        return await cluster.get(NAMESPACES, namespace) is None

    await eventually(gone, timeout_s=60)


def test_a_namespace_that_is_deleted_takes_its_service_with_it(
    request: pytest.FixtureRequest, stories: dict[str, Future[None]]
) -> None:
    stories[request.node.name].result()


STORIES: dict[str, Callable[[Cluster, str], Awaitable[None]]] = {
    test_a_deleted_secret_comes_back_when_pods_wait_for_it.__name__: _a_secret_is_deleted,
    test_a_namespace_that_is_deleted_takes_its_service_with_it.__name__: _a_namespace_is_deleted,
}


async def test_a_deletion_that_the_operator_slept_through_is_finished_after_its_return(
    operator: OperatorProcess, cluster: Cluster, namespace: str
) -> None:
    pod = await serving(cluster, namespace)
    await cluster.delete(INFERENCE_SERVICES, NAME, namespace)
    await becomes(cluster, namespace, "Deleting")
    operator.stop(signal.SIGKILL)
    await end_pod(cluster, pod)
    assert await cluster.get(INFERENCE_SERVICES, NAME, namespace) is not None
    operator.start()

    async def gone() -> bool:
        return await cluster.get(INFERENCE_SERVICES, NAME, namespace) is None

    await eventually(gone)


async def test_a_restart_with_everything_settled_writes_nothing(
    operator: OperatorProcess, cluster: Cluster, namespace: str, show: Show
) -> None:
    await show(resources={"gpu": {"count": 0}, "memory": "1024Mi", "cpu": "0.5"})
    [pod] = await pods(cluster, namespace, 1)
    await say(cluster, pod, **READY)
    await becomes(cluster, namespace, "Serving")

    async def versions() -> dict[str, str]:
        found = [
            await cluster.get(resource, name, namespace) for resource, name in (*OWNED, (INFERENCE_SERVICES, NAME))
        ]
        events = await cluster.list(EVENTS, namespace)
        ours = [one for one in events if one["involvedObject"]["kind"] == "InferenceService"]
        everything = [*(one for one in found if one), *ours]
        return {f"{one['kind']} {one['metadata']['name']}": one["metadata"]["resourceVersion"] for one in everything}

    async def counted_again() -> bool:
        return operator.metric('gpumeter_operator_reconciles_total{result="settled"}') >= 1  # calm from then on

    await settled(cluster, namespace)
    before = await versions()
    assert len(before) >= len(OWNED) + 1
    operator.stop()
    operator.start()
    await eventually(counted_again)
    assert await versions() == before
    assert operator.metric("gpumeter_operator_api_writes_total") == 0


async def settled(cluster: Cluster, namespace: str) -> None:
    """Wait until the controllers have no more to say about the Deployment, and the operator about the service."""
    seen: list[str] = []

    async def quiet() -> bool:
        objects = [
            await cluster.get(DEPLOYMENTS, NAME, namespace),
            await cluster.get(INFERENCE_SERVICES, NAME, namespace),
        ]
        seen.append(" ".join((one or {})["metadata"]["resourceVersion"] for one in objects))
        return len(seen) > 40 and len(set(seen[-40:])) == 1

    await eventually(quiet)


async def test_an_edit_made_while_the_operator_was_away_is_applied_after_its_return(
    operator: OperatorProcess, cluster: Cluster, namespace: str, show: Show
) -> None:
    await show(replicas=1)
    await pods(cluster, namespace, 1)
    operator.stop(signal.SIGKILL)
    await cluster.patch(INFERENCE_SERVICES, NAME, namespace, {"spec": {"replicas": 2}})
    await cluster.delete(SERVICES, NAME, namespace)
    operator.start()
    await pods(cluster, namespace, 2)

    async def back() -> bool:
        return await cluster.get(SERVICES, NAME, namespace) is not None

    await eventually(back)


async def test_a_settled_service_costs_no_write(
    operator: OperatorProcess, cluster: Cluster, namespace: str, show: Show
) -> None:
    await show()
    await pods(cluster, namespace, 1)
    await settled(cluster, namespace)
    writes = operator.metric("gpumeter_operator_api_writes_total")
    looks = operator.metric("gpumeter_operator_reconciles_total")

    async def looked() -> bool:
        return operator.metric("gpumeter_operator_reconciles_total") >= looks + 3

    await eventually(looked)
    assert operator.metric("gpumeter_operator_api_writes_total") == writes


async def test_probes_and_metrics_answer(operator: OperatorProcess) -> None:
    assert operator.answer("/healthz") == (200, "ok\n")
    assert operator.answer("/readyz") == (200, "ok\n")
    assert "gpumeter_operator_reconcile_seconds_bucket" in operator.answer("/metrics")[1]


async def test_the_operator_ends_cleanly_on_sigterm(operator: OperatorProcess) -> None:
    begun = asyncio.get_running_loop().time()
    assert operator.stop() == 0
    assert asyncio.get_running_loop().time() - begun < 10
    operator.start()
