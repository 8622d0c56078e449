"""The pods of one service as the autoscaler counts them: ready, on a node, draining, and how loaded.

Owns the reading of those few facts from a pod, and what a load is. Does not decide and does not know where loads come
from; `decide.pods` puts a pod's troubles into words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumeter_operator.decide.names import (
    DELETION_COST_ANNOTATION,
    DEVELOPMENT_ANNOTATION,
    DRAINING_LABEL,
    DRAINING_SINCE_ANNOTATION,
    TEMPLATE_ANNOTATION,
)

COST_DRAINING = -1_000_000  # below what anybody else would set, so that the ReplicaSet takes this pod first
COST_LEAVING = -2_000_000  # it has finished: the next one to go


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker last told of itself, at `at_ms` of the reader's own clock.

    `gpu_percent` is None where no GPU tells. `ended` counts the sessions that ended since the worker began: it shows
    requests that came and went between two readings.
    """

    at_ms: int
    waiting: int
    running: int
    gpu_percent: int | None = None
    ended: int = 0


@dataclass(frozen=True, slots=True)
class Door:
    """What the gateways hold for a service: `waiting` requests have no worker yet, `inflight` have one.

    `known` is false while some gateway's answer is missing or too old: then the numbers are what at least is there.
    """

    waiting: int = 0
    inflight: int = 0
    known: bool = True


NOBODY = Door()


@dataclass(frozen=True, slots=True)
class Replica:
    """One pod that is not terminating."""

    name: str
    uid: str
    address: str
    ready: bool
    placed: bool  # on a node
    draining_since: str  # RFC 3339; empty while it gets requests
    leaving: bool  # it has finished, and the number of replicas was lowered for it
    created: str  # RFC 3339
    template: str = ""  # hash of the pod template that it was made from

    @property
    def draining(self) -> bool:
        """Whether it gets no new requests any more."""
        return bool(self.draining_since)


def is_former(replica: Replica, template: str) -> bool:
    """Whether a rollout to `template` (a hash; empty where it is not known) replaces this pod."""
    return bool(template) and replica.template != template


def is_marked(pod: Mapping[str, Any]) -> bool:
    """Whether a pod says of itself if it drains; those that a former version made do not."""
    return DRAINING_LABEL in (pod["metadata"].get("labels") or {})


def is_notebook(pod: Mapping[str, Any]) -> bool:
    """Whether a notebook runs in it in place of a worker: nobody may be led to it, so its mark stays."""
    return (pod["metadata"].get("annotations") or {}).get(DEVELOPMENT_ANNOTATION) == "true"


def replica_of(pod: Mapping[str, Any]) -> Replica | None:
    """What counts of a pod; None for one that is on its way out."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    if "deletionTimestamp" in metadata or status.get("phase") in ("Succeeded", "Failed"):
        return None
    annotations = metadata.get("annotations") or {}
    draining = (metadata.get("labels") or {}).get(DRAINING_LABEL) == "true"
    since = annotations.get(DRAINING_SINCE_ANNOTATION) or metadata.get("creationTimestamp", "")
    return Replica(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        address=status.get("podIP", ""),
        ready=any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions") or ()),
        placed=bool((pod.get("spec") or {}).get("nodeName")),
        draining_since=since if draining else "",
        leaving=draining and annotations.get(DELETION_COST_ANNOTATION) == str(COST_LEAVING),
        created=metadata.get("creationTimestamp", ""),
        template=annotations.get(TEMPLATE_ANNOTATION, ""),
    )
