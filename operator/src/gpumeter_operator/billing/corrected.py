"""What of a closed period a correction can be of: its parts of one price, and how much each side has left of them.

Owns what the charges of a report tell of that. Pure. Does not know what a correction is allowed to do.

A period is cut where a price changes, and the two bills that a correction is about have a charge for each part. Time or
tokens of one part are never given back at the price of another: so who gets all of his back gets all of his money back,
and nobody more.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

from gpumeter_operator.billing.charges import ChargeKind
from gpumeter_operator.billing.facts import Correction, Tokens
from gpumeter_operator.billing.statement import MAX_CHARGES
from gpumeter_operator.billing.stretches import Stretch, corrected_stretch
from gpumeter_operator.billing.tariff import HourPrice, StandardRate
from gpumeter_usage.period import from_rfc3339

Status = Mapping[str, Any]
"""Of a Final UsageReport."""

Cut = tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """What a correction counts: GPU time of a class, or tokens of a model."""

    name: str
    of_tokens: bool = False

    def is_of(self, each: Correction) -> bool:
        """Whether a correction counts the same."""
        return self == measure_of(each)

    def is_charged_by(self, charge: Mapping[str, Any]) -> bool:
        """Whether a charge of a report's own period does."""
        return charge["kind"] != ChargeKind.CORRECTION and charge.get(_NAME[self.of_tokens]) == self.name


_NAME = {False: "gpuClass", True: "model"}


def measure_of(each: Correction) -> Measure:
    """What a correction counts."""
    return Measure(each.gpu_class) if each.model is None else Measure(each.model, of_tokens=True)


@dataclass(frozen=True, slots=True)
class PartPrice:
    """What an hour of a class of GPU or the tokens of a model cost in a part, and in what currency; both are None where
    there is no price. `by_tokens` says by which of them the part was billed."""

    by_tokens: bool
    currency: str
    hour: HourPrice | None = None
    rate: StandardRate | None = None

    def of(self, each: Correction) -> Fraction:
        """What is corrected, at this price."""
        if each.tokens is None:
            return Fraction(0) if self.hour is None else self.hour.of_time(each.gpu_ns)
        of = each.tokens
        return Fraction(0) if self.rate is None else self.rate.of_tokens(of.prompt, of.cached, of.completion)


def price_in(stretch: Stretch, measure: Measure) -> PartPrice:
    """The price of what is counted in a part. Whether a price was new with that part makes it no other one."""
    plan, name = stretch.version.plan, measure.name
    if plan is None:
        return PartPrice(stretch.by_tokens, "")
    if not measure.of_tokens:
        return PartPrice(stretch.by_tokens, plan.currency, hour=plan.hour_price(name, stretch.start_ns))
    rate = plan.standard_rate(name, stretch.start_ns)
    since_ever = None if rate is None else replace(rate, effective_from_ns=0)
    return PartPrice(stretch.by_tokens, plan.currency, rate=since_ever)


def parts_with(
    measure: Measure, cut: Cut, statuses: Iterable[Status], corrections: Iterable[Correction]
) -> list[Stretch]:
    """The parts in which any of these reports has what is counted, or that were corrected since."""
    charges = [each for status in statuses for each in status.get("charges", ()) if measure.is_charged_by(each)]
    of_parts = [_stretch_of(each, cut) for each in charges]
    return of_parts + [corrected_stretch(cut, each.priced_ns) for each in corrections if measure.is_of(each)]


def by_price(measure: Measure, cut: Cut, parts: Iterable[Stretch], start_ns: int) -> dict[PartPrice, list[Stretch]]:
    """These parts by price, each once; those of the period that begins at `start_ns` come before those of late facts.
    Where there is none it is the first of the period."""
    found = {stretch.start_ns: stretch for stretch in parts}
    first = corrected_stretch(cut, start_ns)
    prices: dict[PartPrice, list[Stretch]] = {}
    for stretch in sorted(found.values() or [first], key=lambda each: (each.start_ns < start_ns, each.start_ns)):
        prices.setdefault(price_in(stretch, measure), []).append(stretch)
    return prices


def left_ns(status: Status, cut: Cut, measure: Measure, of: PartPrice, moved: Iterable[tuple[Correction, int]]) -> int:
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
    of_class = [charge for charge in charges if measure.is_charged_by(charge)]
    moved = tuple((each, gpu_ns) for each, gpu_ns in moved if measure.is_of(each))
    at_price = [each for each in of_class if price_in(_stretch_of(each, cut), measure) == of]
    moved_at_price = [
        gpu_ns for each, gpu_ns in moved if price_in(corrected_stretch(cut, each.priced_ns), measure) == of
    ]
    # Corrections of versions before had the price of the period's beginning, whatever they were of: so neither of the
    # two alone is the bound.
    return min(
        sum(int(each["gpuNanoseconds"]) for each in of_class) + sum(gpu_ns for _, gpu_ns in moved),
        sum(int(each["gpuNanoseconds"]) for each in at_price) + sum(moved_at_price),
    )


def left_tokens(status: Status, cut: Cut, measure: Measure, of: PartPrice, moved: Iterable[Correction]) -> Tokens:
    """What a tenant was billed of a model's tokens at a price, with what was `moved` to him by the corrections so far.

    Where the report shows not all of its charges it is all of its tokens, of whatever model and price.
    """
    shown = status.get("charges", ())
    if len(shown) >= MAX_CHARGES:
        return sum((each.tokens for each in moved if each.tokens is not None), _tokens(status["tokens"]))
    charges = [each for each in shown if measure.is_charged_by(each)]
    found = [_tokens(each["tokens"]) for each in charges if price_in(_stretch_of(each, cut), measure) == of]
    for each in moved:
        if each.tokens is not None and measure.is_of(each):
            found += [each.tokens] if price_in(corrected_stretch(cut, each.priced_ns), measure) == of else []
    return sum(found, Tokens())


def left_amount(status: Status, cut: Cut, moved: Iterable[Correction]) -> Fraction:
    """What a report was billed for its own period, with what the corrections so far moved to it; up to the rounding of
    its amounts too much. Without an amount it was billed nothing."""
    corrected = [each for each in status.get("charges", ()) if each["kind"] == ChargeKind.CORRECTION.value]
    amounts = [Decimal(each.get("amount", "0")) for each in corrected]
    own = Fraction(Decimal(status.get("amount", "0"))) if "amount" in status else Fraction(0)
    if "amount" in status:
        own += Fraction(1 + len(amounts), 2 * 10**12) - sum(Fraction(amount) for amount in amounts)
    for each in moved:
        own += price_in(corrected_stretch(cut, each.priced_ns), measure_of(each)).of(each)
    return own


def _tokens(stated: Mapping[str, int]) -> Tokens:
    return Tokens(stated["prompt"], stated["cached"], stated["completion"])


def _charges(status: Status) -> Iterator[Mapping[str, Any]]:
    """Those of time of the report's own period."""
    for charge in status.get("charges", ()):
        if "gpuClass" in charge and charge["kind"] != ChargeKind.CORRECTION.value:
            yield charge


def _stretch_of(charge: Mapping[str, Any], cut: Cut) -> Stretch:
    return corrected_stretch(cut, from_rfc3339(charge["from"]))
