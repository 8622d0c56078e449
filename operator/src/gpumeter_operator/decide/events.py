"""Events: one per (object, reason, message), however often it is told.

Owns the shape and the name of an event. The name is made from what the event says, so telling it again only renews it.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from gpumeter_operator.decide.conditions import timestamp
from gpumeter_operator.decide.names import API_VERSION, SERVICE_KIND
from gpumeter_operator.decide.owned import fingerprint

MESSAGE_MAX = 1_024  # the API server's limit for an event
NAME_MAX = 253  # of any object; a Secret's may be as long as that
SERVICE, SECRET = (API_VERSION, SERVICE_KIND), ("v1", "Secret")  # what events are about
OPERATOR, GATEWAY = "gpumeter-operator", "gpumeter-gateway"  # who tells them


def event(
    about: Mapping[str, Any],
    kind: str,
    reason: str,
    message: str,
    now: datetime,
    *,
    of: tuple[str, str] = SERVICE,
    source: str = OPERATOR,
) -> dict[str, Any]:
    """A manifest; `about` has the metadata of an object `of` this apiVersion and kind, `kind` is Normal or Warning.

    It is of the last time that this was told: `kubectl describe` takes an event's age from its first time and count.
    """
    metadata = about["metadata"]
    told = {"uid": metadata["uid"], "kind": kind, "reason": reason, "message": message}
    key = f".{fingerprint(told)[:16]}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": metadata["name"][: NAME_MAX - len(key)].rstrip("-.") + key,
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": of[0],
            "kind": of[1],
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
        "source": {"component": source},
        "reportingComponent": source,
    }
