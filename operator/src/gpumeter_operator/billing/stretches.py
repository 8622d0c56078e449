"""The stretches of a period: pieces of time in which nothing changes, neither the plan's version nor a price.

Owns where a period is cut. Pure; does not know what was used.

A version of a plan holds from the whole minute after it was first seen, never before: no edit changes what earlier
usage costs, whatever its rates' effectiveFrom say. Facts that were booked late are priced by the stretch in which they
happened and by the terms of that period, so the stretches may begin before the period.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from gpumeter_operator.billing.tariff import BillingMode, PeriodPlan, Terms, Version
from gpumeter_usage.period import MINUTE_NS, Period


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of time with one version, no change of price and one set of terms; like a period it holds what ends
    after its start."""

    start_ns: int
    end_ns: int
    version: Version
    terms: Terms

    @property
    def by_tokens(self) -> bool:
        """Tenants pay for tokens, and not for time."""
        return self.terms.billing_mode is BillingMode.STANDARD_RATE


def stretches(of: PeriodPlan, period: Period) -> tuple[Stretch, ...]:
    """The period, cut where a version or a price changes; first come the closed periods of late facts, if any."""
    versions = of.versions or (Version(period.start_ns, of.plan),)
    edges = {period.end_ns, *(version.from_ns for version in versions)}
    for version, end_ns in zip(versions, [*(each.from_ns for each in versions[1:]), period.end_ns], strict=True):
        if version.plan is not None:
            edges |= {edge_ns for edge_ns in version.plan.edges_ns if version.from_ns < edge_ns < end_ns}
    if versions[0].from_ns < period.start_ns:
        edges.add(period.start_ns)
    cut = [(start, end, version_at(versions, end)) for start, end in pairwise(sorted(edges))]
    return tuple(Stretch(start, end, version, version.terms or of.terms) for start, end, version in cut)


def version_at(versions: Iterable[Version], ended_ns: int) -> Version:
    """The version that prices what ended at a time; before all of them, the first."""
    first, *later = versions
    for version in later:
        if version.from_ns < ended_ns:
            first = version
    return first


def stretch_at(cut: tuple[Stretch, ...], ended_ns: int) -> Stretch:
    """The stretch of what ended at a time; before all of them the first, after them the last."""
    return next((stretch for stretch in cut if ended_ns <= stretch.end_ns), cut[-1])


def corrected_stretch(cut: tuple[Stretch, ...], part_start_ns: int) -> Stretch:
    """The stretch whose price a correction of a closed period has: the one that begins with the part that it is of."""
    return stretch_at(cut, part_start_ns + 1)


def holds_from_ns(observed_ns: int) -> int:
    """From when a version holds that was seen at a time: the next whole minute, where records are cut."""
    return -(-observed_ns // MINUTE_NS) * MINUTE_NS
