"""The flow of one service against an API server in memory: what is written, when, and what a refusal becomes."""

import asyncio
import copy
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, Keep, Labels, Manifest, Refused, Resource, whole
from gpumeter_operator.adapters.operator_metrics import OperatorMetrics
from gpumeter_operator.adapters.starting import Answer
from gpumeter_operator.decide.access import Monitoring, Peers
from gpumeter_operator.decide.names import SERVICE_LABEL, TEMPLATE_ANNOTATION
from gpumeter_operator.decide.workload import Installation
from gpumeter_operator.flow import children, optional
from gpumeter_operator.flow.fleet import Fleet
from gpumeter_operator.flow.reconcile import Reconciler
from gpumeter_operator.flow.release import Releaser

INSTALLATION = Installation("worker:1", "IfNotPresent", "http://gateway")
KEY = b"k" * 32
DELETED_AT = datetime(2026, 11, 21, 10, 0, 0, tzinfo=UTC)


class ApiInMemory:
    """Keeps objects, hands out versions and tells watches, as far as the flows can see the difference."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Manifest] = {}
        self.writes: list[str] = []
        self.refusals: dict[str, Refused] = {}
        self.unseen_pods: list[Manifest] = []
        self.unknown: set[str] = set()
        self.asked: Counter[str] = Counter()
        self._version = 100
        self._watches: dict[str, list[asyncio.Queue[tuple[str, Manifest]]]] = {}

    async def list_at(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Labels | None = None,
        keep: Keep = whole,
    ) -> tuple[list[Manifest], str]:
        self.asked[resource.kind] += 1
        if resource.kind in self.unknown:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        found = [keep(copy.deepcopy(one)) for (kind, _, _), one in self.objects.items() if kind == resource.kind]
        return found, str(self._version)

    async def watch(
        self, resource: Resource, namespace: str | None, labels: Labels | None, version: str
    ) -> AsyncIterator[tuple[str, Manifest]]:
        queue: asyncio.Queue[tuple[str, Manifest]] = asyncio.Queue()
        self._watches.setdefault(resource.kind, []).append(queue)
        while True:
            yield await queue.get()
            queue.task_done()  # who watches has taken it

    async def settled(self) -> None:
        """Until whoever watches has taken all that was told."""
        async with asyncio.timeout(60):  # a mirror that has ended takes nothing any more
            for queue in [queue for of_kind in self._watches.values() for queue in of_kind]:
                await queue.join()

    async def list(
        self, resource: Resource, namespace: str | None = None, labels: Labels | None = None
    ) -> list[Manifest]:
        return (await self.list_at(resource))[0] + (self.unseen_pods if resource.kind == "Pod" else [])

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest | None:
        return copy.deepcopy(self.objects.get((resource.kind, namespace or "", name)))

    async def apply(
        self, manifest: Manifest, *, field_manager: str, subresource: str | None = None, only_new: bool = False
    ) -> Manifest:
        if manifest["kind"] in self.refusals:
            raise self.refusals[manifest["kind"]]
        metadata = manifest["metadata"]
        if only_new and (manifest["kind"], metadata["namespace"], metadata["name"]) in self.objects:
            raise Refused(409, "Conflict", "the object has been modified")
        self.writes.append(manifest["kind"])
        return self.put(manifest)

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest, *, subresource: str | None = None
    ) -> Manifest | None:
        assert not patch, "an object is asked for without a right to read it"
        return copy.deepcopy(self.objects.get((resource.kind, namespace or "", name)))

    async def patch_status(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest
    ) -> Manifest | None:
        found = self.objects[resource.kind, namespace or "", name]
        if patch["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
            raise Refused(409, "Conflict", "the object has been modified")
        self.writes.append("status")
        return self.put({**found, "status": {**found.get("status", {}), **patch["status"]}})

    async def delete(
        self, resource: Resource, name: str, namespace: str | None = None, *, uid: str | None = None
    ) -> None:
        if "delete" in self.refusals:
            raise self.refusals["delete"]
        self.remove(resource.kind, namespace or "", name)

    def put(self, manifest: Manifest) -> Manifest:
        self._version += 1
        item = copy.deepcopy(manifest)
        key = item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"]
        item["metadata"]["resourceVersion"] = str(self._version)
        item["metadata"].setdefault("uid", f"uid-{self._version}")
        self.objects[key] = item
        self._tell("MODIFIED", item)
        return copy.deepcopy(item)

    def remove(self, kind: str, namespace: str, name: str) -> None:
        item = self.objects.pop((kind, namespace, name), None)
        if item is not None:
            self._tell("DELETED", item)

    def _tell(self, change: str, item: Manifest) -> None:
        for queue in self._watches.get(item["kind"], []):
            queue.put_nowait((change, copy.deepcopy(item)))


class World:
    """An API in memory with one service, and a fresh operator on top whenever a test asks for one."""

    def __init__(self) -> None:
        self.api = ApiInMemory()
        self.fleet = Fleet(self.api)
        self.now = DELETED_AT
        self.installation = INSTALLATION
        self.reconciler = self._reconciler()

    def _reconciler(self, key: bytes = KEY) -> Reconciler:
        metrics = OperatorMetrics()
        return Reconciler(self.api, self.fleet, self.installation, key, metrics, clock=lambda: self.now)

    def restart(self, key: bytes = KEY) -> None:
        self.reconciler = self._reconciler(key)

    def service(self) -> Manifest:
        return copy.deepcopy(self.api.objects["InferenceService", "team-a", "smollm2"])

    async def look(self) -> list[str]:
        """Reconcile once; the kinds that were written."""
        await self.api.settled()
        before = len(self.api.writes)
        await self.reconciler.reconcile(self.service())
        return self.api.writes[before:]

    def ready(self) -> dict[str, Any]:
        one: dict[str, Any] = self.service()["status"]["conditions"][0]
        return one


async def eventually(seen: Callable[[], bool], timeout_s: float = 60) -> None:
    """Until it is so."""
    async with asyncio.timeout(timeout_s):
        while not seen():  # noqa: ASYNC110 - what is waited for is asked, and tells nobody
            await asyncio.sleep(0.001)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    one = World()
    one.api.put(
        {
            "apiVersion": "gpumeter.io/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"namespace": "team-a", "name": "smollm2", "uid": "u-1", "generation": 1},
            "spec": {"model": {"uri": "hf://o/n"}},
        }
    )
    await one.fleet.start()
    await eventually(lambda: one.fleet.has_pod_monitors and one.fleet.has_plan("any") is not None)
    yield one
    await one.fleet.stop()


def worker(name: str = "smollm2-1", **more: Any) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": "team-a",
            "name": name,
            "labels": {"gpumeter.io/inferenceservice": "smollm2"},
            "annotations": {"gpumeter.io/service-uid": "u-1"},
            "creationTimestamp": "2026-11-21T09:59:00Z",
        },
        "spec": {"terminationGracePeriodSeconds": 150},
        "status": {"phase": "Running"},
        **more,
    }


ALL = ["Secret", "ServiceAccount", "Service", "Service", "PodDisruptionBudget", "Deployment", "status", "Event"]


async def test_the_first_look_writes_everything_in_order_and_the_second_nothing(world: World) -> None:
    assert await world.look() == ALL
    assert await world.look() == []


async def a_calm_service(world: World) -> None:
    """Its one worker is ready, its status says so, and a look has found nothing to do."""
    await world.look()
    deployment = world.api.objects["Deployment", "team-a", "smollm2"]
    pod = worker(status={"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]})
    pod["metadata"]["annotations"] |= deployment["spec"]["template"]["metadata"]["annotations"]
    pod["metadata"]["labels"] |= deployment["spec"]["template"]["metadata"]["labels"]
    world.api.put(pod)
    while await world.look():
        pass


async def test_a_service_that_is_well_is_not_due_until_something_of_it_changes(world: World) -> None:
    assert world.reconciler.is_due(world.service()), "nobody has looked at it yet"
    await a_calm_service(world)
    assert world.ready()["status"] == "True", world.ready()
    assert not world.reconciler.is_due(world.service())

    changes: list[tuple[str, Callable[[], object]]] = [
        ("another's label on a pod", lambda: world.api.put(changed("Pod", "smollm2-1"))),
        ("a drift of the Deployment", lambda: world.api.put(changed("Deployment", "smollm2"))),
        ("a Service that was removed", lambda: world.api.remove("Service", "team-a", "smollm2-usage")),
        ("an edit", lambda: world.api.put(changed("InferenceService", "smollm2"))),
        ("a pod that went", lambda: world.api.remove("Pod", "team-a", "smollm2-1")),
    ]

    def changed(kind: str, name: str) -> Manifest:
        found = copy.deepcopy(world.api.objects[kind, "team-a", name])
        found["metadata"].setdefault("labels", {})["other"] = "x"
        return found

    for what, change in changes:
        change()
        await world.api.settled()
        assert world.reconciler.is_due(world.service()), what
        while await world.look():
            pass
        assert what == changes[-1][0] or not world.reconciler.is_due(world.service()), f"calm again after {what}"
    assert world.reconciler.is_due(world.service()), "a service without its worker is looked at in every round"


async def test_a_service_that_is_well_is_looked_at_again_after_a_while_all_the_same(world: World) -> None:
    await a_calm_service(world)
    assert not world.reconciler.is_due(world.service())
    world.reconciler.calm_ns = 0
    assert world.reconciler.is_due(world.service())


async def test_a_service_that_is_not_looked_at_because_it_is_well_is_not_overdue(world: World) -> None:
    await a_calm_service(world)
    assert world.reconciler.overdue(0.0) is not None
    world.reconciler.is_due(world.service())
    assert world.reconciler.overdue(5.0) is None


AN_HOUR_NS = 3_600_000_000_000


def started(world: World, **status: Any) -> None:
    """A worker of the present template, as its node tells of it."""
    deployment = world.api.objects["Deployment", "team-a", "smollm2"]
    pod = worker(status={"phase": "Running", **status})
    pod["metadata"]["annotations"] |= deployment["spec"]["template"]["metadata"]["annotations"]
    pod["metadata"]["labels"] |= deployment["spec"]["template"]["metadata"]["labels"]
    world.api.put(pod)


async def test_a_start_that_is_over_in_a_moment_is_told_once_and_as_one_event(world: World) -> None:
    world.reconciler.hold_ns = AN_HOUR_NS
    assert await world.look() == ALL[:-2], "not yet that it starts"
    started(world)
    assert await world.look() == []
    started(world, conditions=[{"type": "Ready", "status": "True"}])
    assert await world.look() == ["status", "Event"]
    assert (world.ready()["status"], world.ready()["reason"]) == ("True", "Serving")


async def test_an_event_has_the_age_that_kubectl_describe_shows(world: World) -> None:
    await world.look()
    [event] = [object for (kind, *_), object in world.api.objects.items() if kind == "Event"]
    assert event["firstTimestamp"] == event["lastTimestamp"] == "2026-11-21T10:00:00Z"
    assert event["count"] == 1


async def test_a_start_that_takes_longer_is_told(world: World) -> None:
    world.reconciler.hold_ns = AN_HOUR_NS
    assert "status" not in await world.look()
    world.reconciler.hold_ns = 0
    assert await world.look() == ["status", "Event"]
    assert world.ready()["reason"] == "PodsStarting"
    world.reconciler.hold_ns = AN_HOUR_NS
    started(world)
    assert await world.look() == [], "what follows waits anew"
    world.reconciler.hold_ns = 0
    assert await world.look() == ["status"]


async def test_what_went_wrong_in_a_start_does_not_wait(world: World) -> None:
    world.reconciler.hold_ns = AN_HOUR_NS
    await world.look()
    waiting = {"name": "main", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    started(world, containerStatuses=[waiting])
    assert await world.look() == ["status", "Event"]
    assert world.ready()["reason"] == "ImagePullFailed"
    started(world)
    assert await world.look() == ["status", "Event"], "nor that it is over"


async def test_what_has_become_of_an_edit_does_not_wait(world: World) -> None:
    await world.look()
    world.reconciler.hold_ns = AN_HOUR_NS
    edited = world.service()
    edited["metadata"]["generation"] = 2
    edited["spec"]["replicas"] = 3
    world.api.put(edited)
    assert await world.look() == ["Deployment", "status"]


async def test_a_restarted_operator_finds_everything_settled(world: World) -> None:
    await world.look()
    world.restart()
    assert await world.look() == []


async def test_an_edit_writes_only_what_it_changes(world: World) -> None:
    await world.look()
    edited = world.service()
    edited["metadata"]["generation"] = 2
    edited["spec"]["replicas"] = 3
    world.api.put(edited)
    assert await world.look() == ["Deployment", "status"]
    assert world.service()["status"]["observedGeneration"] == 2


async def test_a_value_that_the_server_writes_in_a_form_of_its_own_is_applied_once(world: World) -> None:
    await world.look()
    stored = world.api.objects["Deployment", "team-a", "smollm2"]
    stored["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"] = "another form"
    world.api.put(stored)
    assert await world.look() == ["Deployment"]
    world.api.objects["Deployment", "team-a", "smollm2"]["spec"]["paused"] = True
    assert await world.look() == []


async def test_what_the_installation_does_not_want_any_more_is_removed_and_others_of_that_name_are_not(
    world: World,
) -> None:
    everyone = ({"podSelector": {}},)
    world.installation = replace(INSTALLATION, peers=Peers(everyone, everyone), monitoring=Monitoring({}, "15s"))
    world.restart()
    assert [one for one in await world.look() if one in ("NetworkPolicy", "PodMonitor")] == [
        "NetworkPolicy",
        "PodMonitor",
    ]
    world.installation = INSTALLATION
    world.restart()
    await world.look()
    assert not {kind for kind, _, _ in world.api.objects} & {"NetworkPolicy", "PodMonitor"}
    theirs = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    world.api.put({**theirs, "metadata": {"namespace": "team-a", "name": "smollm2"}})
    await world.look()
    assert ("NetworkPolicy", "team-a", "smollm2") in world.api.objects


async def test_a_pod_monitor_that_is_refused_keeps_no_service_from_serving(world: World) -> None:
    world.installation = replace(INSTALLATION, monitoring=Monitoring({}, "15s"))
    world.api.refusals["PodMonitor"] = Refused(404, "NotFound", "the server could not find the requested resource")
    world.restart()
    assert "Deployment" in await world.look()
    assert world.ready()["reason"] == "PodsStarting"


async def test_a_pod_monitor_of_somebody_else_is_left_alone_and_keeps_no_service_from_serving(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "spec": {"theirs": True}}
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "x", "controller": True}
    metadata = {"namespace": "team-a", "name": "smollm2", "labels": {SERVICE_LABEL: "smollm2"}}
    world.api.put({**theirs, "metadata": {**metadata, "ownerReferences": [owner]}})
    world.installation = replace(INSTALLATION, monitoring=Monitoring({}, "15s"))
    world.restart()
    assert "Deployment" in await world.look()
    await world.look()
    assert world.api.objects["PodMonitor", "team-a", "smollm2"]["spec"] == {"theirs": True}
    assert world.ready()["reason"] == "PodsStarting"
    told = [one.getMessage().partition(":")[0] for one in caplog.records if one.name.endswith("flow.children")]
    assert told == ["team-a/smollm2 has no PodMonitor"], "and once"


async def test_pod_monitors_are_made_from_the_moment_at_which_the_cluster_knows_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optional, "ASK_AGAIN_S", 0.01)
    api = ApiInMemory()
    api.unknown.add("PodMonitor")
    one = Fleet(api)
    await one.start()
    await eventually(lambda: api.asked["PodMonitor"] > 1)
    assert not one.has_pod_monitors
    assert one.unsynced() is None, "nobody waits for what may never come"
    api.unknown.clear()
    await eventually(lambda: one.has_pod_monitors)
    await one.stop()


async def test_a_status_that_someone_changed_meanwhile_is_decided_again_and_not_announced_twice(world: World) -> None:
    old = world.service()
    world.api.put(world.service())
    await world.api.settled()
    await world.reconciler.reconcile(old)
    assert "status" not in world.api.writes
    assert "Event" not in world.api.writes
    assert await world.look() == ["status", "Event"]


async def test_an_older_copy_of_a_service_overwrites_no_newer_edit(world: World) -> None:
    await world.look()
    old = world.service()
    edited = world.service()
    edited["metadata"]["generation"] = 2
    edited["spec"]["replicas"] = 3
    world.api.put(edited)
    await world.look()
    await world.reconciler.reconcile(old)
    assert world.api.objects["Deployment", "team-a", "smollm2"]["spec"]["replicas"] == 3
    assert world.service()["status"]["observedGeneration"] == 2
    world.api.remove("Deployment", "team-a", "smollm2")
    await world.api.settled()
    await world.reconciler.reconcile(old)
    assert world.api.objects["Deployment", "team-a", "smollm2"]["spec"]["replicas"] == 3, "it goes by the newest"
    world.api.remove("InferenceService", "team-a", "smollm2")
    world.api.remove("Deployment", "team-a", "smollm2")
    await world.api.settled()
    await world.reconciler.reconcile(old)
    assert ("Deployment", "team-a", "smollm2") not in world.api.objects


async def test_a_new_master_key_reaches_secret_and_workers(world: World) -> None:
    await world.look()
    before = world.api.objects["Secret", "team-a", "smollm2-usage"]["data"]
    world.restart(b"another key of the release, long enough")
    assert await world.look() == ["Secret", "Deployment"]
    assert world.api.objects["Secret", "team-a", "smollm2-usage"]["data"] != before


async def test_the_secret_is_written_again_when_pods_wait_for_it_but_not_at_every_look(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.look()
    world.now = DELETED_AT + timedelta(seconds=60)
    waiting = {"name": "main", "state": {"waiting": {"reason": "ContainerCreating"}}}
    world.api.put(worker(status={"phase": "Pending", "containerStatuses": [waiting]}))
    assert "Secret" not in await world.look(), "it was written a moment ago"
    monkeypatch.setattr(children, "SECRET_AGAIN_NS", 0)
    assert "Secret" in await world.look()


@pytest.mark.parametrize("status", [400, 403, 404, 422])
async def test_what_the_api_server_refuses_for_good_becomes_a_condition(world: World, status: int) -> None:
    world.api.refusals["Deployment"] = Refused(
        status, "Invalid", "spec.template.spec.containers[1].image: Required value"
    )
    await world.look()
    assert (world.ready()["status"], world.ready()["reason"]) == ("False", "WorkloadRefused")
    assert "spec.template.spec.containers[1].image: Required value." in world.ready()["message"]
    del world.api.refusals["Deployment"]
    assert "Deployment" in await world.look()
    assert world.ready()["reason"] == "PodsStarting"


async def test_scaling_is_not_ready_while_the_deployment_cannot_be_written(world: World) -> None:
    scaled = world.service()
    scaled["spec"]["scaling"] = {"minReplicas": 1, "maxReplicas": 3}
    world.api.put(scaled)
    await world.look()
    assert world.reconciler.problem(scaled) is None
    world.api.refusals["Deployment"] = Refused(422, "Invalid", "no such field")
    scaled = world.service()
    scaled["spec"]["model"]["uri"] = "hf://o/other"
    scaled["metadata"]["generation"] = 2
    world.api.put(scaled)
    await world.look()
    problem = world.reconciler.problem(scaled)
    assert problem is not None and problem.reason == "WorkloadRefused"
    [scaling] = [one for one in world.service()["status"]["conditions"] if one["type"] == "ScalingReady"]
    assert (scaling["status"], scaling["reason"]) == ("False", "DeploymentNotWritten")
    assert scaling["message"].endswith(problem.message)
    del world.api.refusals["Deployment"]
    await world.look()
    assert world.reconciler.problem(scaled) is None


async def test_the_stop_annotation_stops_a_service_whose_spec_cannot_be_run_too(world: World) -> None:
    await world.look()
    broken = world.service()
    broken["metadata"]["generation"] = 2
    broken["metadata"]["annotations"] = {"gpumeter.io/stop": "true"}
    broken["spec"]["engine"] = {"type": "vllm"}
    world.api.put(broken)
    await world.look()
    assert ("Deployment", "team-a", "smollm2") not in world.api.objects
    assert world.ready()["reason"] == "NotSupported"
    repaired = world.service()
    repaired["metadata"] |= {"generation": 3, "annotations": {}}
    repaired["spec"]["engine"] = {}
    world.api.put(repaired)
    assert "Deployment" in await world.look()


async def test_a_notebooks_token_is_there_before_its_pod_and_no_worker_is_left_beside_it(world: World) -> None:
    await world.look()
    edited = world.service()
    edited["metadata"]["generation"] = 2
    edited["spec"]["development"] = {"jupyter": True}
    world.api.put(edited)
    await world.look()
    assert world.ready()["reason"] == "DevelopmentImageMissing"
    world.installation = replace(INSTALLATION, development_image="development:1")
    world.restart()
    written = await world.look()
    assert written[:3] == ["Secret", "Secret", "Deployment"], "the pod's Secrets come first"
    secret = world.api.objects["Secret", "team-a", "smollm2-jupyter"]["data"]
    assert secret.keys() == {"token"}
    world.restart()
    assert await world.look() == []


async def test_a_notebook_that_is_switched_on_later_has_its_secret_before_its_pod(world: World) -> None:
    world.installation = replace(INSTALLATION, development_image="development:1")
    world.restart()
    await world.look()
    edited = world.service()
    edited["metadata"]["generation"] = 2
    edited["spec"]["development"] = {"jupyter": True}
    world.api.put(edited)
    assert (await world.look())[:3] == ["Secret", "Secret", "Deployment"], "by the same operator"
    assert not [one for one in await world.look() if one == "Secret"]


@pytest.mark.parametrize("status", [409, 429, 500, 503])
async def test_what_may_go_well_later_is_raised_and_told_to_nobody_at_first(world: World, status: int) -> None:
    world.api.refusals["Deployment"] = Refused(status, "Later", "try again")
    for _ in range(2):
        with pytest.raises(Refused):
            await world.look()
    assert "status" not in world.api.writes


@pytest.mark.parametrize("kind", ["Secret", "Deployment"])
async def test_what_may_go_well_later_is_told_once_when_it_has_lasted_and_is_over_when_it_went_well(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    world.api.refusals[kind] = Refused(500, "InternalError", "failed calling webhook from port 40001.")
    with pytest.raises(Refused):
        await world.look()
    monkeypatch.setattr(children, "TOLD_AFTER_NS", 0)
    assert (await world.look())[-2:] == ["status", "Event"]
    assert (world.ready()["status"], world.ready()["reason"]) == ("False", "WorkloadNotTaken")
    assert (
        "says that it may later: failed calling webhook from port 40001. It is tried again;" in world.ready()["message"]
    )
    world.api.refusals[kind] = Refused(500, "InternalError", "failed calling webhook from port 40002.")
    assert await world.look() == [], "other words of the same failure are no news"
    monkeypatch.undo()
    del world.api.refusals[kind]
    assert "Deployment" in await world.look()
    assert world.ready()["reason"] == "PodsStarting"
    world.api.refusals["Service"] = Refused(500, "InternalError", "again")
    world.api.remove("Service", "team-a", "smollm2")
    with pytest.raises(Refused):
        await world.look()


async def test_a_field_that_no_pod_has_becomes_a_condition_though_the_api_server_calls_it_its_own_failure(
    world: World,
) -> None:
    sentence = "failed to create typed patch object: .spec.template.spec.nodeSelectr: field not declared in schema"
    world.api.refusals["Deployment"] = Refused(500, "Unknown", sentence)
    await world.look()
    ready = world.ready()
    assert (ready["status"], ready["reason"]) == ("False", "WorkloadRefused")
    assert ".spec.template.spec.nodeSelectr: field not declared in schema" in ready["message"]


async def test_an_event_that_is_refused_is_no_failure(world: World) -> None:
    world.api.refusals["Event"] = Refused(403, "Forbidden", "the namespace is being terminated")
    assert "status" in await world.look()


async def test_an_orphan_of_ours_is_adopted_and_a_namesakes_child_waited_for(world: World) -> None:
    await world.look()
    orphan = world.api.objects["Service", "team-a", "smollm2"]
    orphan["metadata"]["ownerReferences"] = []
    world.api.put(orphan)
    assert await world.look() == ["Service"]
    other = copy.deepcopy(world.api.objects["Service", "team-a", "smollm2"])
    other["metadata"]["ownerReferences"] = [{"uid": "u-0", "controller": True}]
    world.api.put(other)
    assert "Service" not in await world.look()
    assert world.ready()["reason"] == "NameTaken"


async def test_nothing_is_asked_of_the_api_server_about_names_that_are_free(world: World) -> None:
    async def get(resource: Resource, name: str, namespace: str | None = None) -> Manifest | None:
        raise AssertionError(f"{resource.kind} {name} was asked for")

    world.api.get = get  # type: ignore[method-assign]
    assert await world.look() == ALL


@pytest.mark.parametrize("kind", ["ServiceAccount", "Service", "PodDisruptionBudget", "Deployment"])
async def test_an_object_of_somebody_else_is_not_touched_and_its_name_is_told(world: World, kind: str) -> None:
    theirs = {"apiVersion": "v1", "kind": kind, "metadata": {"namespace": "team-a", "name": "smollm2"}}
    world.api.objects[kind, "team-a", "smollm2"] = copy.deepcopy(theirs)  # no watch tells: it has none of our labels
    await world.look()
    assert world.api.objects[kind, "team-a", "smollm2"] == theirs
    assert world.ready()["reason"] == "NameTaken"
    assert f"has a {kind} called smollm2 that gpumeter did not make" in world.ready()["message"]
    del world.api.objects[kind, "team-a", "smollm2"]
    assert kind in await world.look()
    assert world.ready()["reason"] == "PodsStarting"


SECRET_OWNERS = [
    {},
    {"ownerReferences": [{"uid": "theirs", "controller": True}]},
    {"ownerReferences": [{"uid": "u-1"}]},
    {"labels": {SERVICE_LABEL: "another", "app.kubernetes.io/managed-by": "gpumeter"}},
]


@pytest.mark.parametrize("owners", SECRET_OWNERS)
@pytest.mark.parametrize("name", ["smollm2-usage", "smollm2-jupyter"])
async def test_a_secret_of_somebody_else_is_neither_touched_nor_read_and_its_name_is_told(
    world: World, name: str, owners: dict[str, Any]
) -> None:
    world.installation = replace(INSTALLATION, development_image="development:1")
    world.restart()
    edited = world.service()
    edited["spec"]["development"] = {"jupyter": True}
    world.api.put(edited)
    metadata = {"namespace": "team-a", "name": name, **owners}
    theirs = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"password": "eA=="}}
    world.api.objects["Secret", "team-a", name] = copy.deepcopy(theirs)
    for _ in range(2):
        await world.look()
        assert world.api.objects["Secret", "team-a", name] == theirs
        assert world.ready()["reason"] == "NameTaken"
        assert f"has a Secret called {name} that gpumeter did not make" in world.ready()["message"]
        assert ("Deployment", "team-a", "smollm2") not in world.api.objects, "its pod would use what is not ours"
    del world.api.objects["Secret", "team-a", name]
    assert "Deployment" in await world.look()


async def test_a_secret_of_ours_is_written_again_and_a_namesakes_waited_for(world: World) -> None:
    await world.look()
    secret = world.api.objects["Secret", "team-a", "smollm2-usage"]
    for owners in ([], [{"uid": "u-1", "controller": True}]):
        secret["metadata"]["ownerReferences"] = owners
        secret["data"] = {}
        world.api.remove("Deployment", "team-a", "smollm2")
        world.restart()
        assert "Secret" in await world.look()
        secret = world.api.objects["Secret", "team-a", "smollm2-usage"]
        assert secret["data"].keys() == {"usage-token", "hop-key"}
    secret["metadata"]["ownerReferences"] = [{"uid": "u-0", "controller": True}]
    world.api.remove("Deployment", "team-a", "smollm2")
    world.restart()
    assert "Secret" not in await world.look()
    assert "The Secret smollm2-usage in team-a still belongs to another owner" in world.ready()["message"]


async def test_an_object_of_ours_that_no_mirror_has_yet_is_written_and_not_called_anothers(world: World) -> None:
    await world.look()
    world.restart()
    world.fleet = Fleet(ApiInMemory())  # its watches have told nothing yet
    world.restart()
    assert "Deployment" in await world.look()
    assert world.ready()["reason"] == "PodsStarting"


async def test_a_price_plan_that_comes_and_goes_is_told_by_condition_and_event_and_stops_nothing(world: World) -> None:
    edited = world.service()
    edited["spec"]["pricing"] = {"planRef": {"name": "gold"}}
    world.api.put(edited)
    assert await world.look() == [*ALL, "Event"], "the second event is the plan's"
    assert [one["reason"] for one in told(world)] == ["PodsStarting", "NoPricePlan"]

    def plan_found() -> tuple[str, str]:
        [one] = [one for one in world.service()["status"]["conditions"] if one["type"] == "PricePlanFound"]
        return one["status"], one["reason"]

    assert plan_found() == ("False", "NoPricePlan")
    plan = {"apiVersion": "gpumeter.io/v1alpha1", "kind": "PricePlan", "metadata": {"name": "gold"}, "spec": {}}
    world.api.put(plan)
    assert await world.look() == ["status"]
    assert plan_found() == ("True", "PlanFound")
    world.api.remove("PricePlan", "", "gold")
    assert await world.look() == ["status", "Event"]
    assert plan_found() == ("False", "NoPricePlan")


async def test_a_service_that_is_well_is_due_when_its_price_plan_goes(world: World) -> None:
    plan = {"apiVersion": "gpumeter.io/v1alpha1", "kind": "PricePlan", "metadata": {"name": "default"}, "spec": {}}
    world.api.put(plan)
    await world.api.settled()
    await a_calm_service(world)
    world.api.put({**plan, "spec": {"currency": "USD"}})
    await world.api.settled()
    assert not world.reconciler.is_due(world.service()), "its content is the collector's concern"
    world.api.remove("PricePlan", "", "default")
    await world.api.settled()
    assert world.reconciler.is_due(world.service())


async def test_a_frozen_loop_is_told_by_the_age_of_its_last_look(world: World) -> None:
    await world.look()
    assert world.reconciler.overdue(60) is None
    assert world.reconciler.overdue(-1) == "1 services were not looked at for more than -1 s."
    world.reconciler.drop(world.service()["metadata"])
    assert world.reconciler.overdue(-1) is None


async def test_a_service_that_was_let_go_is_not_made_anew_by_a_look_at_what_a_slow_mirror_still_shows(
    world: World,
) -> None:
    await world.look()
    del world.api.objects["Deployment", "team-a", "smollm2"]
    await world.reconciler.leave(world.service())
    assert await world.look() == []
    assert world.reconciler.overdue(-1) is None, "and nobody waits for a look at it"


async def test_nothing_is_kept_of_a_service_that_is_gone_though_its_finalizer_was_taken_away_by_hand(
    world: World,
) -> None:
    await world.look()
    metadata = world.service()["metadata"]
    for kind, namespace, name in list(world.api.objects):
        world.api.remove(kind, namespace, name)
    world.reconciler.drop(metadata)
    await world.api.settled()
    assert not world.reconciler._known and not world.reconciler._children._settled and not world.fleet._changes


async def test_a_service_that_comes_again_shows_another_version_than_before(world: World) -> None:
    await world.look()
    await world.api.settled()
    seen = set()
    for _ in range(3):
        seen.add(world.fleet.version("team-a", "smollm2"))
        world.api.put(worker())
        await world.api.settled()
        seen.add(world.fleet.version("team-a", "smollm2"))
        for kind, namespace, name in list(world.api.objects):
            world.api.remove(kind, namespace, name)
        await world.api.settled()
        assert world.fleet.version("team-a", "smollm2") == 0
        world.api.put(worker())
        await world.api.settled()
    assert len(seen) == 6


async def test_a_service_is_let_go_when_the_look_under_way_has_ended(world: World) -> None:
    begun, answers, apply = asyncio.Event(), asyncio.Event(), world.api.apply

    async def slowly(manifest: Manifest, **options: Any) -> Manifest:
        begun.set()
        await answers.wait()
        return await apply(manifest, **options)

    world.api.apply = slowly  # type: ignore[method-assign]
    looking = asyncio.create_task(world.look())
    await begun.wait()
    leaving = asyncio.create_task(world.reconciler.leave(world.service()))
    await asyncio.sleep(0)  # its turn
    assert not leaving.done()
    answers.set()
    assert (await asyncio.gather(looking, leaving))[0] == ALL
    assert await world.look() == []


async def test_the_fleets_short_form_of_a_deployment_names_the_template_that_pods_are_made_from(world: World) -> None:
    await world.look()
    whole = world.api.objects["Deployment", "team-a", "smollm2"]["spec"]["template"]["metadata"]["annotations"]
    kept = world.fleet.deployment("team-a", "smollm2")
    assert kept is not None
    assert kept["spec"]["template"]["metadata"]["annotations"] == {TEMPLATE_ANNOTATION: whole[TEMPLATE_ANNOTATION]}


async def test_services_that_wait_for_their_turn_are_no_frozen_loop_as_long_as_looks_end(world: World) -> None:
    answers = asyncio.Semaphore(0)

    async def apply(manifest: Manifest, **_: Any) -> Manifest:
        await answers.acquire()
        raise Refused(503, "ServiceUnavailable", "later")

    world.api.apply = apply  # type: ignore[method-assign]
    services = [world.service() for _ in range(18)]
    for number, service in enumerate(services):
        service["metadata"] |= {"name": f"s{number}", "uid": f"u-{number}"}
    looks = [asyncio.create_task(world.reconciler.reconcile(service)) for service in services]
    async with asyncio.timeout(30):  # no look ends: that is a frozen one
        while not (world.reconciler.overdue(0.5) or "").startswith("18 services"):  # noqa: ASYNC110 - a clock's words
            await asyncio.sleep(0.05)
    answered_s = time.monotonic()
    answers.release()
    await asyncio.wait(looks, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(0)
    late = world.reconciler.overdue(time.monotonic() - answered_s + 0.25) or ""
    assert late.startswith("15 services"), "one was looked at, one has its turn since just now, and one waits"
    for _ in looks:
        answers.release()
    assert all(isinstance(one, Refused) for one in await asyncio.gather(*looks, return_exceptions=True))


def releaser(world: World) -> Releaser:
    return Releaser(world.api, world.fleet, timedelta(seconds=60), clock=lambda: world.now)


def deleted(world: World) -> Manifest:
    service = world.service()
    service["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"
    return world.api.put(service)


async def test_a_release_waits_for_the_last_pod_and_deletes_the_deployment_first(world: World) -> None:
    await world.look()
    world.api.put(worker())
    await world.look()
    task = asyncio.create_task(releaser(world).release(deleted(world)))
    done, _ = await asyncio.wait([task], timeout=1)
    assert not done
    assert world.ready()["reason"] == "Deleting"
    assert ("Deployment", "team-a", "smollm2") not in world.api.objects
    world.api.remove("Pod", "team-a", "smollm2-1")
    async with asyncio.timeout(10):
        await task
    assert not [one for one in told(world) if one["reason"] == "ReleaseForced"]


async def test_a_service_whose_spec_cannot_even_be_read_can_be_deleted(world: World) -> None:
    await world.look()
    broken = world.service()
    broken["spec"] = {"metering": {"checkpointInterval": 5}, "drain": {"timeout": "30s"}}
    world.api.put(broken)
    with pytest.raises(TypeError):
        await world.look()
    service = deleted(world)
    await world.reconciler.leave(service)
    async with asyncio.timeout(10):
        await releaser(world).release(service)
    assert ("Deployment", "team-a", "smollm2") not in world.api.objects


async def test_a_pod_that_the_mirror_has_not_seen_yet_keeps_the_service(world: World) -> None:
    world.api.unseen_pods = [worker()]
    task = asyncio.create_task(releaser(world).release(deleted(world)))
    done, _ = await asyncio.wait([task], timeout=1)
    assert not done
    world.api.unseen_pods = []
    async with asyncio.timeout(10):
        await task


async def test_a_release_is_forced_after_the_longest_grace_period_and_a_minute_and_says_so(world: World) -> None:
    pod = worker(spec={"terminationGracePeriodSeconds": 300})
    pod["metadata"]["deletionTimestamp"] = "2026-11-21T10:05:00Z"  # as Kubernetes has it: the end of its grace period
    world.api.put(pod)
    service = deleted(world)
    await world.api.settled()
    world.now = DELETED_AT + timedelta(seconds=300 + 59)
    task = asyncio.create_task(releaser(world).release(service))
    done, _ = await asyncio.wait([task], timeout=1)
    assert not done, "the limit is the pod's own grace period and a minute"
    world.now = DELETED_AT + timedelta(seconds=300 + 60)
    async with asyncio.timeout(10):
        await task
    [event] = [one for one in told(world) if one["reason"] == "ReleaseForced"]
    assert event["type"] == "Warning"
    assert "smollm2-1 had not ended" in event["message"]
    assert "booked as unaccounted" in event["message"]


async def test_an_operator_that_was_away_past_the_limit_gives_the_workers_their_whole_time(world: World) -> None:
    await world.look()
    world.api.put(worker())
    service = deleted(world)
    await world.api.settled()
    back = world.now = DELETED_AT + timedelta(hours=1)
    task = asyncio.create_task(releaser(world).release(service))
    done, _ = await asyncio.wait([task], timeout=0.7)
    assert not done, "the workers were told to go only now"
    assert ("Deployment", "team-a", "smollm2") not in world.api.objects
    task.cancel()
    await asyncio.wait([task])
    # Another operator comes: the Deployment is gone, and when the pod's time is over says the pod itself.
    pod = worker()
    pod["metadata"]["deletionTimestamp"] = "2026-11-21T11:02:45Z"
    world.api.put(pod)
    await world.api.settled()
    world.now = back + timedelta(seconds=165 + 59)
    task = asyncio.create_task(releaser(world).release(service))
    done, _ = await asyncio.wait([task], timeout=0.7)
    assert not done
    assert not [one for one in told(world) if one["reason"] == "ReleaseForced"]
    world.now = back + timedelta(seconds=165 + 60)
    async with asyncio.timeout(10):
        await task
    assert [one for one in told(world) if one["reason"] == "ReleaseForced"], "and no longer than that"


async def test_a_deletion_that_the_cluster_refuses_to_carry_out_has_its_limit_too_and_says_who_refused(
    world: World,
) -> None:
    await world.look()
    world.api.put(worker())
    service = deleted(world)
    world.api.refusals["delete"] = Refused(403, "Forbidden", "a webhook denied the request")
    await world.api.settled()
    one = releaser(world)
    with pytest.raises(Refused):
        await one.release(service)
    assert not [one for one in told(world) if one["reason"] == "ReleaseForced"], "it is tried again until the limit"
    world.now = DELETED_AT + timedelta(hours=1)
    async with asyncio.timeout(10):
        await one.release(service)
    [event] = [one for one in told(world) if one["reason"] == "ReleaseForced"]
    assert event["message"].endswith("The API server refuses a part of it: a webhook denied the request.")


def told(world: World) -> list[Manifest]:
    return [one for (kind, _, _), one in world.api.objects.items() if kind == "Event"]


async def test_the_key_of_an_event_is_what_it_says() -> None:
    from gpumeter_operator.decide.events import event

    service = {"metadata": {"namespace": "team-a", "name": "smollm2", "uid": "u-1"}}
    one = event(service, "Warning", "OOMKilled", "More memory.", DELETED_AT)
    again = event(service, "Warning", "OOMKilled", "More memory.", DELETED_AT + timedelta(hours=1))
    other = event(service, "Warning", "OOMKilled", "Much more memory.", DELETED_AT)
    assert one["metadata"]["name"] == again["metadata"]["name"] != other["metadata"]["name"]
    assert len(event(service, "Warning", "X", "long " * 1_000, DELETED_AT)["message"]) == 1_024


def test_the_resource_that_the_operator_serves_is_the_crds() -> None:
    from gpumeter_operator.main import SERVICES

    assert (INFERENCE_SERVICES.group, INFERENCE_SERVICES.version, INFERENCE_SERVICES.plural) == SERVICES


async def test_a_worker_that_starts_is_asked_how_far_it_is_and_a_ready_one_how_it_meters(world: World) -> None:
    asked: list[tuple[str, bool]] = []

    def told(pod: str, address: str, serves: bool) -> Answer:
        asked.append((address, serves))
        if serves:
            return Answer(stand_in=("CalibrationPoor", "Steps are split by proportions."))
        return Answer(progress="fetching the model: 1 of 4 MB (25 %)")

    await world.look()
    world.reconciler = Reconciler(
        world.api, world.fleet, INSTALLATION, KEY, OperatorMetrics(), clock=lambda: world.now, told=told
    )
    template_hash = world.api.objects["Deployment", "team-a", "smollm2"]["spec"]["template"]["metadata"]["annotations"]
    starting = worker(
        status={
            "phase": "Running",
            "podIP": "10.0.0.7",
            "containerStatuses": [{"name": "main", "state": {"running": {}}}],
        }
    )
    starting["metadata"]["annotations"] |= template_hash
    world.api.put(starting)
    assert "status" in await world.look()
    assert world.service()["status"]["modelStatus"]["progress"] == "fetching the model: 1 of 4 MB (25 %)"
    assert world.ready()["message"].endswith("1 loading the model: fetching the model: 1 of 4 MB (25 %).")
    assert asked == [("10.0.0.7", False)]
    starting["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    world.api.put(starting)
    await world.look()
    assert asked[1:] == [("10.0.0.7", True)]
    status = world.service()["status"]
    assert status["modelStatus"].get("progress") is None
    metering = next(one for one in status["conditions"] if one["type"] == "MeteringReady")
    assert (metering["status"], metering["reason"]) == ("True", "CalibrationPoor")
