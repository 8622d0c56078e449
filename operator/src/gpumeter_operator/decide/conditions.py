"""Conditions: how they are written and how new ones follow old ones.

Owns the rule that a condition's time changes only with its status. Does not know what the conditions say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

MESSAGE_MAX = 32_768  # of the CRD and of Kubernetes' own conditions


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition as decided now."""

    type: str
    status: str  # True, False or Unknown
    reason: str
    message: str


def timestamp(now: datetime) -> str:
    """UTC to the second, as Kubernetes writes times."""
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


def follow(
    former: Sequence[Mapping[str, Any]], decided: Sequence[Condition], generation: int, now: datetime
) -> list[dict[str, Any]]:
    """The list to write: `decided` in its order, each with the time at which its status last changed."""
    before = {one.get("type"): one for one in former}
    return [_entry(before.get(condition.type), condition, generation, now) for condition in decided]


def _entry(before: Mapping[str, Any] | None, condition: Condition, generation: int, now: datetime) -> dict[str, Any]:
    unchanged = before is not None and before.get("status") == condition.status
    since = before.get("lastTransitionTime") if before is not None and unchanged else None
    return {
        "type": condition.type,
        "status": condition.status,
        "observedGeneration": generation,
        "lastTransitionTime": since or timestamp(now),
        "reason": condition.reason,
        "message": condition.message[:MESSAGE_MAX],
    }
