"""Whether this worker may take work, and why not.

Pure. Owns the order of reasons: the first that holds is the one that is told. Does not know how anything is repaired.
"""

from dataclasses import dataclass

from gpumeter_worker.failure import ENGINE_HUNG, JOURNAL_UNUSABLE
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.lease import Lease

RESTARTING = "EngineRestarting"
HUNG = ENGINE_HUNG


@dataclass(frozen=True, slots=True)
class Loss:
    """Why there is no engine where there was one: a reason, and the start of a sentence."""

    reason: str
    how: str


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer of /readyz, unchanged in refusals, log and metrics."""

    ready: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Condition:
    """What readiness depends on."""

    phase: Phase
    draining: bool
    clock_problem: str
    engine_ready: bool
    engine_loss: Loss | None
    journal_open: bool
    journal_problem: str
    journal_full: str
    lease: Lease
    loading: str = ""
    """How far fetching or loading the model is; empty where nobody knows."""


_STARTING = {
    Phase.INIT: ("Starting", "the engine process is starting"),
    Phase.LOAD: ("Loading", "the model is being loaded"),
    Phase.WARMUP: ("WarmingUp", "the engine is warming up"),
}


def readiness(condition: Condition) -> Readiness:
    """The first thing that stands against serving."""
    if condition.clock_problem:  # told while it drains, because it is why
        return Readiness(False, "ClockJumped", condition.clock_problem)
    if condition.draining:
        return Readiness(False, "Draining", "the worker is stopping and admits nothing new")
    if condition.journal_problem:
        return Readiness(False, JOURNAL_UNUSABLE, condition.journal_problem)
    if not condition.journal_open:
        return Readiness(False, "Starting", "the journal is not open yet")
    if condition.engine_loss is not None:
        return Readiness(False, condition.engine_loss.reason, f"{condition.engine_loss.how}; it is being started again")
    if not condition.engine_ready:
        reason, message = _STARTING.get(condition.phase, ("Starting", "the engine is starting"))
        return Readiness(False, reason, condition.loading or message if condition.phase is Phase.LOAD else message)
    if condition.journal_full:
        return Readiness(False, "JournalFull", condition.journal_full)
    if not condition.lease.held:
        return Readiness(False, "LeaseExpired", condition.lease.message)
    return Readiness(True, "Ready", "")
