"""What is written on a worker's pod when it drains, when it may leave, and when it serves again.

Owns these merge patches, and that a deletion cost of somebody else's is kept and comes back. Does not know who drains.
"""

from collections.abc import Mapping
from typing import Any

from gpumeter_operator.decide.crew import COST_DRAINING, COST_LEAVING
from gpumeter_operator.decide.names import (
    DELETION_COST_ANNOTATION,
    DRAINING_LABEL,
    DRAINING_SINCE_ANNOTATION,
    FORMER_COST_ANNOTATION,
)

_OURS = (str(COST_DRAINING), str(COST_LEAVING))


def draining(pod: Mapping[str, Any], since: str) -> dict[str, Any]:
    """It gets no new requests from now on (`since`, RFC 3339), and goes before others."""
    return _patch("true", {**_cost(pod, COST_DRAINING), DRAINING_SINCE_ANNOTATION: since})


def leaving(pod: Mapping[str, Any]) -> dict[str, Any]:
    """It has finished and is the next one to go. Since when it drained stays as it is."""
    return _patch("true", _cost(pod, COST_LEAVING))


def serving(pod: Mapping[str, Any]) -> dict[str, Any]:
    """It gets requests as before, and has the deletion cost that somebody else gave it, if any."""
    notes = _notes(pod)
    cost = notes.get(DELETION_COST_ANNOTATION)
    former = notes.get(FORMER_COST_ANNOTATION, None if cost in _OURS else cost)
    none = dict.fromkeys((DRAINING_SINCE_ANNOTATION, FORMER_COST_ANNOTATION))
    return _patch("false", {**none, DELETION_COST_ANNOTATION: former})


def _cost(pod: Mapping[str, Any], ours: int) -> dict[str, Any]:
    cost = _notes(pod).get(DELETION_COST_ANNOTATION)
    kept = {} if cost is None or cost in _OURS else {FORMER_COST_ANNOTATION: cost}
    return {**kept, DELETION_COST_ANNOTATION: str(ours)}


def _notes(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    return pod["metadata"].get("annotations") or {}


def _patch(mark: str, annotations: Mapping[str, Any]) -> dict[str, Any]:
    return {"metadata": {"labels": {DRAINING_LABEL: mark}, "annotations": dict(annotations)}}
