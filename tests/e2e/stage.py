"""What the fault stories see of one service and do to it: polls without kubectl, edits, kills.

Owns the calls; the order of events is the stories'. Polling goes through the small API client, because a kubectl for
every look would take a processor from the workers that are waited for.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from demo import steps
from demo.manifests import RELEASE, RELEASE_NAMESPACE
from devcluster.apiclient import Api, ApiError, open_api
from e2e.story import WORKERS, kill_processes, until

Manifest = dict[str, Any]
SERVICES = "/apis/gpumeter.io/v1alpha1/namespaces/{}/inferenceservices"


@dataclass(frozen=True)
class Act:
    """When something was done to the service, until it had settled; what was seen meanwhile."""

    begun_ns: int
    ended_ns: int
    seen: Mapping[str, Any]

    def meets(self, started_ns: int, ended_ns: int) -> bool:
        """Whether a request was under way in it."""
        return started_ns <= self.ended_ns and ended_ns >= self.begun_ns


@dataclass
class Stage:
    """One service on a real cluster."""

    demo: steps.Demo
    namespace: str
    name: str
    acts: dict[str, Act] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.api: Api = open_api(self.demo.kube.kubeconfig)

    @property
    def path(self) -> str:
        return f"{SERVICES.format(self.namespace)}/{self.name}"

    @contextmanager
    def act(self, name: str, text: str, within_s: float = 150) -> Iterator[dict[str, Any]]:
        """An act, which ends when as many workers serve as are wanted. Yields its evidence, such as who served."""
        seen: dict[str, Any] = {"before": uids(self.ready())}
        begun_ns = time.time_ns()
        with self.demo.progress.step(text, self.told):
            yield seen
            until(self.settled, within_s, self.told)
            seen["after"] = uids(self.ready())
        self.acts[name] = Act(begun_ns, time.time_ns(), seen)

    def service(self) -> Manifest:
        found: Manifest = self.api.get(self.path)
        return found

    def edit(self, **spec: Any) -> None:
        """A merge patch of the spec; None removes."""
        self.api.merge(self.path, {"spec": spec})

    def status(self, field_name: str) -> Any:
        """One field of the status."""
        return self.service().get("status", {}).get(field_name)

    def deployed(self) -> Manifest:
        """The pod template of the Deployment."""
        path = f"/apis/apps/v1/namespaces/{self.namespace}/deployments/{self.name}"
        found: Manifest = self.api.get(path)["spec"]["template"]
        return found

    def condition(self, kind: str = "Ready") -> Manifest:
        """The condition as it stands, empty while it is about an older generation."""
        service = self.service()
        status = service.get("status", {})
        if status.get("observedGeneration") != service["metadata"]["generation"]:
            return {}
        return next((one for one in status.get("conditions", []) if one["type"] == kind), {})

    def told(self) -> str:
        """Ready's reason and message, or why they cannot be asked for."""
        try:
            ready = self.condition()
        except ApiError as problem:
            return str(problem)
        return f"{ready['reason']}: {ready['message']}" if ready else "an edit was not seen by the operator yet"

    def await_reason(self, reason: str, within_s: float) -> Manifest:
        """Ready's condition once it names this reason."""
        found: Manifest = {}

        def looked() -> bool:
            found.clear()
            found.update(self.condition())
            return found.get("reason") == reason

        until(looked, within_s, lambda: f"Ready does not say {reason}; it says {self.told()}")
        return found

    def pods(self) -> list[Manifest]:
        """Every pod of the service, also those on their way out."""
        path = f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={WORKERS}%3D{self.name}"
        found: list[Manifest] = self.api.get(path)["items"]
        return found

    def ready(self) -> list[Manifest]:
        """Those that serve."""
        return [pod for pod in self.pods() if is_ready(pod)]

    def running_in(self, pod: Manifest) -> int:
        """How many requests a worker computes at this moment, as its own metrics say."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}:8000/proxy/metrics"
        lines = str(self.api.get(path)).splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:num_requests_running"))

    def settled(self) -> bool:
        """Whether everything that is wanted serves, and nothing else is there or on its way out."""
        service, ready = self.service(), self.condition()
        wanted = service["status"].get("replicas") if "scaling" in service["spec"] else service["spec"]["replicas"]
        pods = [pod for pod in self.pods() if not is_lost(pod)]
        return ready.get("reason") == "Serving" and len(pods) == wanted and all(map(is_ready, pods))

    def kill_operators(self) -> int:
        """kill -9 to every operator that runs; returns how many there were."""
        selector = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=operator"
        pods = self.demo.kube.get("-n", RELEASE_NAMESPACE, "pods", "-l", selector)["items"]
        running = [pod for pod in pods if any("running" in one["state"] for one in containers(pod))]
        # The API still says "running" for a second after a container was killed; what is dead is not killed again.
        return sum(kill_processes(pod) > 0 for pod in running)

    def evict(self, pod: Manifest) -> None:
        """Ask for a pod to leave, as `kubectl drain` does: a disruption budget may refuse it."""
        metadata = {"name": pod["metadata"]["name"], "namespace": self.namespace}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        self.api.request("POST", f"/api/v1/namespaces/{self.namespace}/pods/{metadata['name']}/eviction", eviction)

    def remove_by_force(self, pod: Manifest) -> None:
        """Take a pod off the books that nobody can end any more, as the taint out-of-service makes Kubernetes do."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}"
        self.api.request("DELETE", path, {"gracePeriodSeconds": 0, "propagationPolicy": "Background"})


def containers(pod: Manifest) -> list[Manifest]:
    """What the kubelet last said of a pod's containers."""
    found: list[Manifest] = pod["status"].get("containerStatuses", [])
    return found


def is_ready(pod: Manifest) -> bool:
    """Whether a pod serves and is not on its way out."""
    conditions = pod["status"].get("conditions", [])
    leaving = "deletionTimestamp" in pod["metadata"]
    return not leaving and any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def is_lost(pod: Manifest) -> bool:
    """Whether Kubernetes gave the pod up together with its node, and waits for a kubelet that will not come."""
    reasons = [one.get("reason") for one in pod["status"].get("conditions", []) if one["type"] == "DisruptionTarget"]
    return "deletionTimestamp" in pod["metadata"] and "DeletionByTaintManager" in reasons


def uids(pods: list[Manifest]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}
