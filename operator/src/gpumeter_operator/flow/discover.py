"""Which pods are workers, and what their status says of their containers.

Owns the reading of pods: labels, annotations and container states become a Worker and container events. Pure; does not
collect or store anything.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gpumeter_operator.adapters.ledger.rows import ContainerEvent
from gpumeter_operator.billing.facts import Pod, Worker
from gpumeter_operator.decide.names import (
    DEVELOPMENT_ANNOTATION,
    DEVICES_ANNOTATION,
    GPU_CLASS_ANNOTATION,
    MAIN_CONTAINER,
    SERVICE_LABEL,
    SERVICE_UID_ANNOTATION,
)
from gpumeter_usage.period import SECOND_NS, from_rfc3339

LOST_AFTER_NS = 60 * SECOND_NS
"""How long a pod must be overdue, or its worker silent, before it counts as lost; a kubelet takes a second or two."""

MAX_DEVICES = 1024  # more GPUs than one machine holds, and small enough that no sum overflows

Manifest = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NotAWorker:
    """Why a pod that claims to be a worker is not asked, in a sentence."""

    reason: str
    message: str


def worker_of(pod: Manifest, services: Mapping[tuple[str, str], Manifest]) -> Worker | NotAWorker:
    """The worker that a pod is, if the InferenceService that it names exists in its own namespace.

    A pod can be labelled by whoever may create pods there; that the service with this very uid exists is what ties it
    to a token.
    """
    metadata = pod["metadata"]
    namespace, name = metadata["namespace"], metadata["name"]
    service_name = (metadata.get("labels") or {}).get(SERVICE_LABEL, "")
    annotations = metadata.get("annotations") or {}
    service = services.get((namespace, service_name))
    if service is None:
        return NotAWorker(
            "ServiceUnknown",
            f"Pod {namespace}/{name} names the InferenceService {service_name}, which does not exist in its namespace.",
        )
    uid = service["metadata"]["uid"]
    if annotations.get(SERVICE_UID_ANNOTATION) != uid:
        return NotAWorker(
            "ServiceReplaced",
            f"Pod {namespace}/{name} belongs to another InferenceService {service_name} than the one that exists now.",
        )
    devices = str(annotations.get(DEVICES_ANNOTATION, ""))
    # Four digits at most are ever read as a number: Python refuses a very long one with an exception.
    if not re.fullmatch(r"[0-9]{1,4}", devices) or not 1 <= int(devices) <= MAX_DEVICES:
        return NotAWorker(
            "DevicesInvalid",
            f"Pod {namespace}/{name} has the annotation {DEVICES_ANNOTATION}={devices!r:.40}; it must be a number "
            f"from 1 to {MAX_DEVICES}.",
        )
    return Worker(
        worker_uid=metadata["uid"],
        namespace=namespace,
        service=service_name,
        service_uid=uid,
        model=str(service.get("spec", {}).get("model", {}).get("name") or service_name),
        gpu_class=str(annotations.get(GPU_CLASS_ANNOTATION, "")),
        devices=int(devices),
        pod=name,
    )


def runs_a_notebook(pod: Manifest) -> bool:
    """Whether no worker is in a pod but whatever its user runs, which must get no usage token and tell of no use."""
    return (pod["metadata"].get("annotations") or {}).get(DEVELOPMENT_ANNOTATION) == "true"


def events_of(pod: Manifest, now_ns: int) -> tuple[ContainerEvent, ...]:
    """What a pod's status says of its worker container: starts and ends, of this life and the one before.

    A pod that has run to its end for good (Succeeded, Failed) is gone: none of its containers starts again. A container
    that ended without anyone having seen when (a node that died) has vanished now, or when the next one started.
    """
    events: list[ContainerEvent] = []
    status = pod.get("status") or {}
    over = status.get("phase") in ("Succeeded", "Failed")
    for container in status.get("containerStatuses") or []:
        if container.get("name") != MAIN_CONTAINER:
            continue
        current = container.get("state") or {}
        running, over_now = current.get("running") or {}, current.get("terminated") or {}
        # A pod runs one of them at a time: whatever was before is over when the next one starts.
        next_ns = _time_ns((running or over_now).get("startedAt")) or now_ns
        events += _ended((container.get("lastState") or {}).get("terminated") or {}, min(next_ns, now_ns))
        events += _ended(over_now, now_ns)
        container_id = container.get("containerID") or ""
        started_ns = _time_ns(running.get("startedAt"))
        if container_id and started_ns:
            events.append(ContainerEvent(container_id, "started", started_ns))
            if over:
                events.append(ContainerEvent(container_id, "vanished", now_ns))
    if over:
        events.append(ContainerEvent("", "gone", now_ns))
    return tuple(events)


def events_of_removed(pod: Manifest, now_ns: int) -> tuple[ContainerEvent, ...]:
    """What the last state of a removed pod says; a container that still ran in it vanished with the pod."""
    events = [event for event in events_of(pod, now_ns) if event.event != "gone"]
    ended = {event.container_id for event in events if event.event in ("ended", "vanished")}
    vanished = [
        ContainerEvent(event.container_id, "vanished", max(now_ns, event.at_ns))
        for event in events
        if event.event == "started" and event.container_id not in ended
    ]
    return (*events, *vanished, ContainerEvent("", "gone", now_ns))


def running_of(events: Iterable[ContainerEvent]) -> tuple[ContainerEvent, ...]:
    """The starts of those containers of which nothing says that they are over."""
    kept = tuple(events)
    over = {event.container_id for event in kept if event.event in ("ended", "vanished", "gone")}
    return tuple(event for event in kept if event.event == "started" and event.container_id not in over)


def is_overdue(pod: Manifest, now_ns: int) -> bool:
    """Whether a pod should have ended long ago: Kubernetes writes the end of its grace into deletionTimestamp, and only
    its node can say that it is over. A node that is lost says nothing, and the pod stays."""
    ends_ns = _time_ns(pod["metadata"].get("deletionTimestamp"))
    return 0 < ends_ns < now_ns - LOST_AFTER_NS


def last_sign_ns(pod: Pod, final_ns: int, now_ns: int) -> int:
    """When a pod was known to live last: its worker was heard, or a period was closed in which it ran."""
    # A container without an end ran through every period that is Final: the pod was still there when they were closed,
    # however long ago its worker had fallen silent.
    signs = (pod.settled_ns, *(boot.sealed_ns for boot in pod.boots), *(boot.started_ns for boot in pod.boots))
    return min(now_ns, max(final_ns, *signs))


def at_last_sign(events: Iterable[ContainerEvent], pod: Pod, sign_ns: int) -> tuple[ContainerEvent, ...]:
    """The same events, with whatever vanished having done so at the last sign of life, and not before its start.

    One that was over before that sign, which the next container gave, stays over.
    """
    started_ns = {span.container_id: span.started_ns for span in pod.spans}
    return tuple(
        replace(event, at_ns=max(min(sign_ns, event.at_ns), started_ns.get(event.container_id, 0)))
        if event.event == "vanished"
        else event
        for event in events
    )


def with_missed_ends(events: Iterable[ContainerEvent], pod: Pod, now_ns: int) -> tuple[ContainerEvent, ...]:
    """The same events, after the ends of containers that the ledger has running and the pod's status does not name.

    A status names the present life and the one before. Where nobody looked between two restarts (a collector that was
    away), or a node lost what it knew, nobody is ever told the end of an older life: it was over when the next one
    started, because a pod runs one worker container at a time, or else when the pod itself was. Without this a dead
    container would count as allocated beside the one that runs.
    """
    kept = tuple(events)
    named = {event.container_id for event in kept}
    gone_ns = [now_ns] if any(event.event == "gone" for event in kept) else []
    starts_ns = {span.container_id: span.started_ns for span in pod.spans}
    starts_ns |= {event.container_id: event.at_ns for event in kept if event.event == "started"}
    ends = []
    for span in pod.spans:
        others_ns = [at_ns for container_id, at_ns in starts_ns.items() if container_id != span.container_id]
        later_ns = [at_ns for at_ns in (*others_ns, *gone_ns) if at_ns >= span.started_ns]
        if span.ended_ns is None and span.container_id not in named and later_ns:
            ends.append(ContainerEvent(span.container_id, "vanished", min(later_ns)))
    return (*ends, *kept)


def _ended(terminated: Manifest, latest_ns: int) -> list[ContainerEvent]:
    """What a container's last state says; one that ended without anyone having seen when did so at `latest_ns`."""
    container_id = terminated.get("containerID") or ""
    if not container_id:
        return []
    events = []
    started_ns, finished_ns = _time_ns(terminated.get("startedAt")), _time_ns(terminated.get("finishedAt"))
    if started_ns:
        events.append(ContainerEvent(container_id, "started", started_ns))
    if finished_ns:
        # containerd finds no trace of what died with its node, and writes its own restart as the end (loadContainer in
        # its CRI server: code 255, reason Unknown). It counts where nothing better is known, and takes back nothing.
        guessed = terminated.get("reason") == "Unknown" and terminated.get("exitCode") == 255
        events.append(ContainerEvent(container_id, "vanished" if guessed else "ended", max(started_ns, finished_ns)))
    else:
        events.append(ContainerEvent(container_id, "vanished", max(started_ns, latest_ns)))
    return events


def _time_ns(text: str | None) -> int:
    """0 where there is none: the kubelet writes null, or the year 1970 or 1, for what it does not know."""
    if not text:
        return 0
    try:
        return max(0, from_rfc3339(text))
    except ValueError:
        return 0
