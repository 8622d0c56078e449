"""What kopf's handlers have dealt with of each InferenceService: in memory, so that kopf writes no notes into them.

Owns that memory. kopf's own is an annotation with the whole spec, which is a write for each service that is created and
for each edit. Nothing is lost with the memory: who begins looks at every service anyway, as created, edited or resumed
by the same function, and writes what differs from what the cluster has. Does not know what a handler does.
"""

from collections.abc import Iterable
from typing import Any

import kopf

from gpumeter_operator.decide.names import STOP_ANNOTATION


class HandledInMemory(kopf.DiffBaseStorage):  # type: ignore[misc]  # kopf's classes are Any to mypy
    """An essence is what an edit changes: the generation, and the one annotation that counts."""

    def __init__(self) -> None:
        super().__init__()
        self._handled: dict[str, Any] = {}

    def build(self, *, body: kopf.Body, extra_fields: Iterable[Any] | None = None) -> Any:
        """The essence of an object as it is."""
        metadata = body["metadata"]
        stop = (metadata.get("annotations") or {}).get(STOP_ANNOTATION)
        noted = {} if stop is None else {"annotations": {STOP_ANNOTATION: stop}}
        return {"metadata": {"generation": int(metadata.get("generation", 0)), **noted}}

    def fetch(self, *, body: kopf.Body) -> Any:
        """The essence that was dealt with last; None of an object that this process has not dealt with."""
        return self._handled.get(body["metadata"]["uid"])

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: Any) -> None:
        """It is dealt with; nothing is written into the object."""
        self._handled[body["metadata"]["uid"]] = essence

    def forget(self, uid: str) -> None:
        """An object is no more."""
        self._handled.pop(uid, None)


class OnlyRetries(kopf.AnnotationsProgressStorage):  # type: ignore[misc]
    """Notes in annotations, for handlers that are to be tried again; kopf wakes for those by its own write.

    A handler that is done has nothing to note: kopf takes the note back before it writes, but leaves a mark beside it,
    and that would be written. Where a cause had several handlers, those that are done would have to be noted; each of
    ours has one.
    """

    def store(self, *, key: Any, record: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        """Note how far a handler is, unless it is done."""
        if not record.get("success"):
            super().store(key=key, record=record, body=body, patch=patch)
