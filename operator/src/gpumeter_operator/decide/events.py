"""Events: one per (service, reason, message), however often it is told.

Owns the shape and the name of an event. The name is made from what the event says, so telling it again only renews it.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from gpumeter_operator.decide.conditions import timestamp
from gpumeter_operator.decide.names import API_VERSION, SERVICE_KIND
from gpumeter_operator.decide.owned import fingerprint

MESSAGE_MAX = 1_024  # the API server's limit for an event
COMPONENT = "gpumeter-operator"


def event(service: Mapping[str, Any], kind: str, reason: str, message: str, now: datetime) -> dict[str, Any]:
    """A manifest for server-side apply; `kind` is Normal or Warning.

    It is of the last time that this was told: `kubectl describe` takes an event's age from its first time and count.
    """
    metadata = service["metadata"]
    told = {"uid": metadata["uid"], "kind": kind, "reason": reason, "message": message}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{fingerprint(told)[:16]}", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": SERVICE_KIND,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "type": kind,
        "reason": reason,
        "message": message if len(message) <= MESSAGE_MAX else message[: MESSAGE_MAX - 3] + "...",
        "firstTimestamp": timestamp(now),
        "lastTimestamp": timestamp(now),
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
    }
