"""What is told of a price plan: whether it can be used, and from when its newest version holds.

Owns those sentences. Pure; does not know how they are written to the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gpumeter_operator.billing.stretches import holds_from_ns
from gpumeter_operator.billing.tariff import PlanInvalid, PricePlan, plan_from
from gpumeter_usage.period import rfc3339


@dataclass(frozen=True, slots=True)
class SeenVersion:
    """A version of a plan as the ledger keeps it, and when it was seen to be in force."""

    version: int
    hash: str
    spec: bytes
    observed_ns: int


@dataclass(frozen=True, slots=True)
class PlanStatus:
    """The condition Ready of a plan, and which of its versions it is about."""

    version: int
    hash: str
    ready: bool
    reason: str
    message: str


def status_of(name: str, seen: Sequence[SeenVersion]) -> PlanStatus:
    """What to tell of a plan whose versions were seen in this order; there is one at least."""
    newest, former = seen[-1], seen[-2] if len(seen) > 1 else None
    try:
        plan = plan_from(name, newest.version, newest.spec)
    except PlanInvalid as problem:
        message = f"{problem} What is used while this version is in force has no amount."
        return PlanStatus(newest.version, newest.hash, False, "PlanInvalid", message)
    from_ns = holds_from_ns(newest.observed_ns)
    told = f"Version {newest.version} holds from {rfc3339(from_ns)}."
    if former is None:
        return PlanStatus(newest.version, newest.hash, True, "InForce", f"Version {newest.version} is in force.")
    before = _rates(name, former)
    past = sorted({since_ns for what, since_ns in _begins(plan) - before if 0 < since_ns < from_ns})
    if past:
        told += (
            f" It has rates that were to begin at {', '.join(map(rfc3339, past))}, before it was seen; they begin with "
            f"it, and what was used before keeps its price."
        )
        return PlanStatus(newest.version, newest.hash, True, "NotRetroactive", told)
    return PlanStatus(newest.version, newest.hash, True, "InForce", told)


def _rates(name: str, version: SeenVersion) -> frozenset[tuple[object, int]]:
    try:
        return _begins(plan_from(name, version.version, version.spec))
    except PlanInvalid:
        return frozenset()


def _begins(plan: PricePlan) -> frozenset[tuple[object, int]]:
    of_time = {(rate, rate.effective_from_ns) for rate in plan.rates}
    return frozenset(of_time | {(rate, rate.effective_from_ns) for rate in plan.standard_rates})
