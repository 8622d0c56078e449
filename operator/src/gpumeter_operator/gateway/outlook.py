"""Whether a service without a ready worker may get one, as far as its own object tells.

Owns how an object is read for that; what a reason means says decide.reasons. Does not know who waits. What is not known
as lasting it takes for something that passes: a wait is bounded, and a refusal would be final.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumeter_operator.decide.names import STOP_ANNOTATION
from gpumeter_operator.decide.reasons import LASTING
from gpumeter_operator.decide.spec import is_stopped


@dataclass(frozen=True, slots=True)
class Outlook:
    """`comes`: waiting makes sense. Reason and message are the service's own, and may be empty."""

    comes: bool
    reason: str = ""
    message: str = ""

    @property
    def because(self) -> str:
        """The reason as the end of a sentence's paragraph; empty where none is told."""
        return f" {self.reason}: {self.message}" if self.reason else ""


def outlook(service: Mapping[str, Any]) -> Outlook:
    """Read an InferenceService."""
    metadata, spec, status = service.get("metadata") or {}, service.get("spec") or {}, service.get("status") or {}
    if is_stopped(service):
        return Outlook(
            False, "Stopped", f"Stopped by the annotation {STOP_ANNOTATION}; remove it to start the service."
        )
    if spec.get("replicas") == 0:
        return Outlook(False, "ScaledToZero", "spec.replicas is 0, so nothing answers; raise it to start workers.")
    conditions = {one.get("type"): one for one in status.get("conditions") or ()}
    ready = conditions.get("Ready") or {}
    if ready.get("status") == "True":
        return Outlook(True)
    told = ready.get("reason") or "", ready.get("message") or ""
    seen, current = status.get("observedGeneration"), metadata.get("generation")
    if seen is not None and current is not None and seen < current:
        return Outlook(True, *told)  # what is told is of a former spec
    failed = (status.get("modelStatus") or {}).get("state") == "FailedToLoad"
    if failed and not told[0]:
        last = status["modelStatus"].get("lastFailureInfo") or {}
        told = last.get("reason") or "FailedToLoad", last.get("message") or ""
    # The condition Stopped is not in the list: the annotation tells, and the condition may be of a moment ago.
    return Outlook(not failed and told[0] not in LASTING, *told)
