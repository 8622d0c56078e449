"""What the autoscaler keeps of one service between two looks, and what of a decision is news.

Owns that memory, what of it is read from the status after a restart, and when something is told. Does not look, and
does not know what is done with a decision.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from gpumeter_operator.decide.autoscale import AT_ZERO, SILENT, STEADY, Decision, Memory
from gpumeter_operator.decide.conditions import timestamp
from gpumeter_operator.decide.reasons import NOT_AUTOSCALED
from gpumeter_operator.decide.replicas import HINDERED
from gpumeter_operator.decide.spec import Problem, ServiceSpec
from gpumeter_operator.decide.status import Figures

HOLDS_MS = 10_000  # a reason that changes nothing is told when it has lasted: most pass with the next look
HISTORY_MAX = 5


@dataclass(slots=True)
class Held:
    """What is kept of one service between two looks; after a restart it is read from the cluster again."""

    generation: tuple[int, bool]
    spec: ServiceSpec
    problems: tuple[Problem, ...] = ()  # of the spec
    memory: Memory = field(default_factory=Memory)
    wanted: int | None = None  # workers that should serve; None while others say the number
    asked: int = 0  # replicas that the Deployment should have: those, and what still drains
    told: Problem | None = None
    able: bool = True
    words: Problem | None = None  # of the last decision that changed the number
    holding: tuple[str, int] | None = None  # a reason that changes nothing, and since when
    history: tuple[Mapping[str, Any], ...] = ()
    figures: Figures | None = None
    figures_ms: int = 0
    news: list[tuple[Problem, bool, datetime]] = field(default_factory=list)  # to be told; bounded by scaling's pace
    aside: bool = False  # somebody else said the number until now: a zero need not be the autoscaler's
    again: bool = False  # a look came while there was something to write; it is made up for when that has ended
    behind: bool = False  # the reconciler has still to write `asked`
    acting: asyncio.Task[None] | None = None

    @property
    def is_queue_known(self) -> bool:
        """Whether the status shows how many requests wait."""
        return self.figures is not None and self.figures.queue_length is not None

    @property
    def decided_zero(self) -> bool:
        """Whether the last number that was decided is 0, and nobody else has said one since."""
        return not self.aside and bool(self.history) and self.history[0].get("to") == 0


def recall(held: Held, status: Mapping[str, Any], now_ms: int) -> None:
    """What was told before a restart is told still, so that a restart rewrites no status."""
    held.history = tuple(status.get("scalingHistory") or ())[:HISTORY_MAX]
    if "queueLength" in status:
        held.figures = Figures(status["queueLength"], status.get("gpuUtilization"), held.history)
        held.figures_ms = now_ms
    if held.history:
        held.words = Problem(held.history[0]["reason"], held.history[0].get("message", ""))
    for condition in status.get("conditions") or ():
        if condition.get("type") != "ScalingReady":
            continue
        held.aside = condition.get("reason") in NOT_AUTOSCALED
        if not held.aside and condition.get("reason") != HINDERED:
            held.told = Problem(condition["reason"], condition.get("message", ""))
            held.able = condition.get("status") == "True"


def note(held: Held, decision: Decision, now: datetime, now_ms: int, silent_since_ms: int | None) -> Problem | None:
    """Take a decision over; what of it is news: a change, or that something keeps the autoscaler from one.

    The other reasons that change nothing stand in the condition alone. `silent_since_ms` is since when all that told no
    load were asked for it in vain; with None, for some had no chance to tell, what was told last is told still.
    """
    said = Problem(decision.reason, decision.message)
    if decision.changes:
        held.wanted = decision.replicas
        entry = {
            "time": timestamp(now),
            "from": decision.former,
            "to": decision.replicas,
            "reason": decision.reason,
            "message": decision.message,
        }
        held.history = (entry, *held.history)[:HISTORY_MAX]
        held.told, held.words, held.able, held.holding = said, said, True, None
        return said
    calm = decision.reason in (STEADY, AT_ZERO)
    if held.holding is None or held.holding[0] != decision.reason:
        held.holding = decision.reason, now_ms
    if calm and held.words is not None:
        said = held.words
    if silent_since_ms is None:
        return None
    since_ms = max(held.holding[1], silent_since_ms) if decision.reason == SILENT else held.holding[1]
    # The first words need not last, unless they are of trouble.
    lasts = now_ms - since_ms >= HOLDS_MS
    if said == held.told or not (lasts or (held.told is None and decision.able)):
        return None
    held.told, held.able = said, decision.able
    return None if decision.able else said
