"""What of a closed period a correction can be of: its parts of one price, and how much each side has left of them.

Owns what the charges of a report tell of that. Pure. Does not know what a correction is allowed to do.

A period is cut where a price changes, and the two bills that a correction is about have a charge for each part. Time of
one part is never given back at the price of another: so who gets all of his time back gets all of his money back, and
nobody more.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from gpumeter_operator.billing.charges import ChargeKind
from gpumeter_operator.billing.facts import Correction
from gpumeter_operator.billing.stretches import Stretch, corrected_stretch
from gpumeter_operator.billing.tariff import HourPrice
from gpumeter_usage.period import from_rfc3339

Status = Mapping[str, Any]
"""Of a Final UsageReport."""

Cut = tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class PartPrice:
    """What an hour of a class of GPU costs in a part, and in what currency; `hour` is None where it has no price."""

    by_tokens: bool
    currency: str
    hour: HourPrice | None


def price_in(stretch: Stretch, gpu_class: str) -> PartPrice:
    """The price of a class of GPU in a part."""
    plan = stretch.version.plan
    if plan is None:
        return PartPrice(stretch.by_tokens, "", None)
    return PartPrice(stretch.by_tokens, plan.currency, plan.hour_price(gpu_class, stretch.start_ns))


def parts_by_price(
    cut: Cut, statuses: Iterable[Status], corrections: Iterable[Correction], gpu_class: str, start_ns: int
) -> dict[PartPrice, list[Stretch]]:
    """The parts in which any of these reports has time of a class of GPU, or that were corrected since, by price; those
    of the period that begins at `start_ns` come before those of late facts. Where there is none it is the first."""
    of_class = [each for status in statuses for each in _charges(status) if each["gpuClass"] == gpu_class]
    of_parts = [_stretch_of(each, cut) for each in of_class]
    of_parts += [corrected_stretch(cut, each.priced_ns) for each in corrections if each.gpu_class == gpu_class]
    found = {stretch.start_ns: stretch for stretch in of_parts}
    first = corrected_stretch(cut, start_ns)
    by_price: dict[PartPrice, list[Stretch]] = {}
    for stretch in sorted(found.values() or [first], key=lambda each: (each.start_ns < start_ns, each.start_ns)):
        by_price.setdefault(price_in(stretch, gpu_class), []).append(stretch)
    return by_price


def left_ns(status: Status, cut: Cut, gpu_class: str, of: PartPrice, moved: Iterable[tuple[Correction, int]]) -> int:
    """What a side has of a class of GPU at a price, with what was `moved` to it by the corrections so far.

    Where the charges do not tell of all of its time (there was no plan for a part of it, or there are more than a
    report shows) it is all of its time, of whatever class and price.
    """
    # Without the corrections of earlier periods that are booked in it.
    total_ns = int(status["gpuNanoseconds"]) - int(status.get("adjustedGpuNanoseconds", 0))
    moved = tuple(moved)
    charges = list(_charges(status))
    if sum(int(charge["gpuNanoseconds"]) for charge in charges) != total_ns:
        return total_ns + sum(gpu_ns for _, gpu_ns in moved)
    of_class = [charge for charge in charges if charge["gpuClass"] == gpu_class]
    moved = tuple((each, gpu_ns) for each, gpu_ns in moved if each.gpu_class == gpu_class)
    at_price = [each for each in of_class if price_in(_stretch_of(each, cut), gpu_class) == of]
    moved_at_price = [
        gpu_ns for each, gpu_ns in moved if price_in(corrected_stretch(cut, each.priced_ns), gpu_class) == of
    ]
    # Corrections of versions before had the price of the period's beginning, whatever they were of: so neither of the
    # two alone is the bound.
    return min(
        sum(int(each["gpuNanoseconds"]) for each in of_class) + sum(gpu_ns for _, gpu_ns in moved),
        sum(int(each["gpuNanoseconds"]) for each in at_price) + sum(moved_at_price),
    )


def left_amount(status: Status, cut: Cut, moved: Iterable[tuple[Correction, int]]) -> Fraction:
    """What a report was billed for its own period, with what the corrections so far moved to it; up to the rounding of
    its amounts too much. Without an amount it was billed nothing."""
    corrected = [each for each in status.get("charges", ()) if each["kind"] == ChargeKind.CORRECTION.value]
    amounts = [Decimal(each.get("amount", "0")) for each in corrected]
    own = Fraction(Decimal(status.get("amount", "0"))) if "amount" in status else Fraction(0)
    if "amount" in status:
        own += Fraction(1 + len(amounts), 2 * 10**12) - sum(Fraction(amount) for amount in amounts)
    for each, gpu_ns in moved:
        hour = price_in(corrected_stretch(cut, each.priced_ns), each.gpu_class).hour
        own += Fraction(0) if hour is None else hour.of_time(gpu_ns)
    return own


def _charges(status: Status) -> Iterator[Mapping[str, Any]]:
    """Those of time of the report's own period."""
    for charge in status.get("charges", ()):
        if "gpuClass" in charge and charge["kind"] != ChargeKind.CORRECTION.value:
            yield charge


def _stretch_of(charge: Mapping[str, Any], cut: Cut) -> Stretch:
    return corrected_stretch(cut, from_rfc3339(charge["from"]))
