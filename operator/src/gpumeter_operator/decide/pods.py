"""What one worker pod says about itself, in words that a user can act on.

Owns the translation of a pod's status into a PodState: ready, starting, or a Problem whose reason tells insufficient
capacity from a failed image pull, from a worker's own fatal problem, from memory, from a crash loop. Does not know how
many pods there should be.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gpumeter_operator.decide.names import (
    DRAINING_LABEL,
    MAIN_CONTAINER,
    MODEL_VARIABLE,
    REVISION_VARIABLE,
    SERVICE_UID_ANNOTATION,
    TEMPLATE_ANNOTATION,
)
from gpumeter_operator.decide.placement import LOST_NODE_S
from gpumeter_operator.decide.spec import Problem

# A worker's last words: one line, a CamelCase word, a colon and a sentence. They are shown unchanged.
_LAST_WORDS = re.compile(r"^([A-Z][A-Za-z0-9]*): (\S.*)$", re.DOTALL)
_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONTAINER_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
STUCK_AFTER_S = 20  # a container that waits longer waits for something: a volume, a Secret, a large image
_MESSAGE_MAX = 600  # characters of a crash's last words; the log has the rest


@dataclass(frozen=True, slots=True)
class Failure:
    """The last time a worker ended badly."""

    problem: Problem
    finished_at: str  # RFC 3339, as Kubernetes states it
    revision: str = ""  # of the model that it was to serve, where its source has revisions


@dataclass(frozen=True, slots=True)
class PodState:
    """One pod that exists, as the service's status needs it."""

    name: str
    template_hash: str
    ready: bool
    terminating: bool
    started: bool  # a container of it ran or runs
    stuck: bool  # its container waits for longer than usual, and the pod's status does not say for what
    problem: Problem | None
    failure: Failure | None
    address: str = ""  # where a worker that runs can be asked about itself; empty where it has none
    loading: str = ""  # how far it is, while it starts
    stand_in: Problem | None = None  # why it splits steps otherwise than the spec asks, while it serves
    capacity: Mapping[str, Any] | None = None  # what it can do, as status.capacity has it
    draining: bool = False  # it gets no new requests


def belongs(pod: Mapping[str, Any], service_uid: str) -> bool:
    """Whether a pod is of this very service, not of a former namesake."""
    annotations = pod["metadata"].get("annotations") or {}
    return bool(annotations.get(SERVICE_UID_ANNOTATION) == service_uid)


def exists(pod: Mapping[str, Any]) -> bool:
    """Whether a pod may still run something."""
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def describe(pod: Mapping[str, Any], gpu_resource_name: str, now: datetime) -> PodState:
    """Read one pod."""
    status = pod.get("status") or {}
    main: Mapping[str, Any] = next(
        (one for one in status.get("containerStatuses") or [] if one["name"] == MAIN_CONTAINER), {}
    )
    state = main.get("state") or {}
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions") or [])
    failure = _failure(main, pod["metadata"]["name"], pod["metadata"].get("namespace", ""), _revision(pod))
    stuck = _is_stuck(pod, (state.get("waiting") or {}).get("reason", ""), now)
    return PodState(
        name=pod["metadata"]["name"],
        template_hash=(pod["metadata"].get("annotations") or {}).get(TEMPLATE_ANNOTATION, ""),
        ready=ready and "deletionTimestamp" not in pod["metadata"],
        terminating="deletionTimestamp" in pod["metadata"],
        started="running" in state or bool(main.get("lastState")) or "terminated" in state,
        stuck=stuck,
        problem=None if ready else _problem(pod, state, failure, gpu_resource_name, stuck=stuck),
        failure=failure,
        address=status.get("podIP", "") if "running" in state else "",
        draining=(pod["metadata"].get("labels") or {}).get(DRAINING_LABEL) == "true",
    )


def _problem(
    pod: Mapping[str, Any], state: Mapping[str, Any], failure: Failure | None, gpu_resource_name: str, *, stuck: bool
) -> Problem | None:
    if _is_unheard(pod):
        node = (pod.get("spec") or {}).get("nodeName", "")
        return Problem(
            "NodeLost",
            f"The node {node} of the worker {pod['metadata']['name']} says nothing any more. Kubernetes starts another "
            f"worker in its place after {LOST_NODE_S} s, or after what spec.template tolerates of "
            f"node.kubernetes.io/unreachable; see kubectl describe node {node}.",
        )
    if failure is not None:
        return failure.problem
    describe_it = f"See kubectl describe pod -n {pod['metadata'].get('namespace', '')} {pod['metadata']['name']}."
    waiting = state.get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _IMAGE_REASONS:
        return Problem(
            "ImagePullFailed",
            f"The node cannot get the worker's image ({reason}: {_ended(message or 'no details')}) Check that "
            "spec.engine.image, or the worker image of the installation, names an image that the nodes can pull; a "
            "private registry's Secret goes into spec.template.spec.imagePullSecrets.",
        )
    if reason in _CONTAINER_REASONS:
        return Problem(
            reason,
            f"The worker's container cannot be made: {_ended(message or 'no details')} {describe_it}",
        )
    if (companion := _companion(pod)) is not None:
        return Problem("CompanionFailed", f"{companion} {describe_it}")
    if stuck:
        return Problem(
            "ContainerCreating",
            "The worker's container waits for its image or its volumes; a large image takes minutes to pull. "
            f"{describe_it}",
        )
    return _unschedulable(pod, gpu_resource_name)


def _is_unheard(pod: Mapping[str, Any]) -> bool:
    """Whether Kubernetes itself marked the pod not ready because of its node, though its containers were.

    A kubelet writes both conditions together, and gives a reason where a readiness gate sets them apart.
    """
    told = {one["type"]: one for one in (pod.get("status") or {}).get("conditions") or []}
    ready, containers = told.get("Ready", {}), told.get("ContainersReady", {})
    return ready.get("status") == "False" and not ready.get("reason") and containers.get("status") == "True"


def _companion(pod: Mapping[str, Any]) -> str | None:
    """What keeps a container of spec.template from running, without which the worker does not start or get ready."""
    status = pod.get("status") or {}
    for one in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (one.get("state") or {}).get("waiting") or {}
        if one["name"] != MAIN_CONTAINER and waiting.get("reason") in (
            *_IMAGE_REASONS,
            *_CONTAINER_REASONS,
            "CrashLoopBackOff",
        ):
            message = _ended(waiting.get("message") or "no details")
            return f"The container {one['name']} of spec.template does not run ({waiting['reason']}: {message})"
    return None


def _is_stuck(pod: Mapping[str, Any], waiting_reason: str, now: datetime) -> bool:
    if waiting_reason not in ("ContainerCreating", "CreateContainerConfigError"):
        return False
    created = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
    return (now - created).total_seconds() > STUCK_AFTER_S


def _unschedulable(pod: Mapping[str, Any], gpu_resource_name: str) -> Problem | None:
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            if condition.get("reason") != "Unschedulable":
                return None
            sentence = _ended(condition.get("message") or "the scheduler gave no reason")
            if f"Insufficient {gpu_resource_name}" in sentence:
                return Problem(
                    "InsufficientCapacity",
                    f"No node has a free GPU for the worker: {sentence} Free or add nodes that offer "
                    f"{gpu_resource_name}, lower spec.replicas, or serve on the CPU with spec.resources.gpu.count 0.",
                )
            if "Insufficient " in sentence:
                return Problem(
                    "InsufficientCapacity",
                    f"No node has room for the worker: {sentence} Add nodes, lower spec.replicas, "
                    "or ask for less in spec.resources.",
                )
            return Problem(
                "Unschedulable",
                f"No node fits the worker: {sentence} Check spec.template (node selectors, affinity, tolerations), "
                "the volume claims that the service names, and the taints of the nodes.",
            )
    return None


def _revision(pod: Mapping[str, Any]) -> str:
    containers = (pod.get("spec") or {}).get("containers") or []
    main: Mapping[str, Any] = next((one for one in containers if one.get("name") == MAIN_CONTAINER), {})
    told = {one["name"]: one.get("value", "") for one in main.get("env") or []}
    return str(told.get(REVISION_VARIABLE, "")) if str(told.get(MODEL_VARIABLE, "")).startswith("hf://") else ""


def _failure(main: Mapping[str, Any], pod_name: str, namespace: str, revision: str) -> Failure | None:
    for moment in (main.get("state") or {}, main.get("lastState") or {}):
        ended = moment.get("terminated")
        if ended is None:
            continue
        if ended.get("exitCode", 0) == 0 and ended.get("reason") != "OOMKilled":
            continue  # a clean end is no failure
        return Failure(_last_words(ended, main, pod_name, namespace), ended.get("finishedAt") or "", revision)
    return None


def _last_words(ended: Mapping[str, Any], main: Mapping[str, Any], pod_name: str, namespace: str) -> Problem:
    message = (ended.get("message") or "").strip()
    if ended.get("exitCode") == 3 and (words := _LAST_WORDS.match(message)):
        return Problem(words[1], words[2])
    if ended.get("reason") == "OOMKilled":
        limit = (main.get("resources") or {}).get("limits", {}).get("memory", "")
        return Problem(
            "OOMKilled",
            f"The worker used more memory than spec.resources.memory{f' ({limit})' if limit else ''} and was killed; "
            "raise spec.resources.memory, or lower spec.engine.maxBatchSize or spec.model.maxModelLen.",
        )
    if ended.get("exitCode") == 255 and ended.get("reason") == "Unknown":  # what containerd says after its own restart
        return Problem(
            "ContainerLost",
            "The worker's container was lost with its node, which is back and starts it anew (restarts: "
            f"{main.get('restartCount', 0)}); the worker did not fail. What it had written down is in its journal.",
        )
    last_line = message.splitlines()[-1].strip()[:_MESSAGE_MAX] if message else ""
    said = f" Its last line: {_ended(last_line)}" if last_line else ""
    return Problem(
        "WorkerCrashed",
        f"The worker ended with exit code {ended.get('exitCode')} (restarts: {main.get('restartCount', 0)}).{said} "
        f"See kubectl logs -n {namespace} {pod_name} --previous.",
    )


def _ended(sentence: str) -> str:
    sentence = sentence.strip()
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
