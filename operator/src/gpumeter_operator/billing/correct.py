"""What may be corrected by hand, and at which price: the rules of `gpumeter adjust`.

Owns the refusals and the correction that is booked. Pure: takes the reports and the plan of the corrected period, and
the corrections that there are. Does not know how they are kept.

A correction moves GPU time of a closed period between a tenant and the platform: no report is changed, the difference
stands on the bills of the service's next open period. It is priced as what it corrects was: where the price of a class
of GPU changed within the period, a correction is of one part of it, and has the price of that part.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from hashlib import sha256
from itertools import product
from typing import Any

from gpumeter_operator.billing.corrected import PartPrice, left_amount, left_ns, parts_by_price, price_in
from gpumeter_operator.billing.facts import PLATFORM, Correction
from gpumeter_operator.billing.stretches import Stretch, corrected_stretch, stretches
from gpumeter_operator.billing.tariff import PeriodPlan, plain, rounded
from gpumeter_usage.canonical import canonical_json
from gpumeter_usage.period import Period, rfc3339

MAX_REASON_CHARS = 1024
MAX_ACTOR_CHARS = 253
MAX_ID_CHARS = 64
"""What a UsageReport shows and the ledger's columns hold."""


class CorrectionRefused(ValueError):
    """A correction that cannot be booked. `reason` is one CamelCase word, the message says in a sentence what to do."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody wants: `gpu_ns` more on the bill that the report `report` of a namespace was, or less.

    Without an `id` one is made of all the rest, so that the same wish twice is the same correction. Where the class of
    GPU is left out, `meant` says which it is, before the id is made. `part_start_ns` is the start of the part of the
    period that it is of; None where that has one price.
    """

    namespace: str
    report: str
    gpu_ns: int
    reason: str
    actor: str
    gpu_class: str = ""
    id: str = ""
    part_start_ns: int | None = None

    @property
    def own_id(self) -> str:
        """The id that it is booked under."""
        if self.id:
            return self.id
        part = () if self.part_start_ns is None else (str(self.part_start_ns),)
        told = (self.namespace, self.report, str(self.gpu_ns), self.gpu_class, self.reason, self.actor, *part)
        return "c-" + sha256(canonical_json(list(told))).hexdigest()[:16]

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids that the same wish may be booked under already: where the service had one class of GPU, versions
        before made the id without it unless it was typed; and they knew of no parts."""
        said = product((self.gpu_class, ""), (self.part_start_ns, None))
        return tuple(dict.fromkeys(replace(self, gpu_class=of, part_start_ns=part).own_id for of, part in said))


@dataclass(frozen=True, slots=True)
class Closed:
    """The closed period of a report: its tenant and its bytes' digest, the status of its and of the platform's report,
    its price plan, the classes of GPU of its pods, and the end of the period in which a correction is booked now, with
    the currency of that period's plan ("" where nobody knows it)."""

    service: str
    tenant: str
    report_digest: str
    status: Mapping[str, Any]
    platform: Mapping[str, Any]
    period: Period
    plan: PeriodPlan
    gpu_classes: Sequence[str]
    booked_end_ns: int
    booked_currency: str


@dataclass(frozen=True, slots=True)
class Priced:
    """A correction and what it comes to."""

    correction: Correction
    amount: Decimal
    currency: str

    @property
    def told(self) -> str:
        """All of it in a sentence."""
        each = self.correction
        plan = f"PricePlan {each.plan_name} (version {each.plan_version}, {each.plan_hash:.16}…)"
        plan += f" from {rfc3339(each.priced_ns)} on" if each.priced_ns != each.closed_start_ns else ""
        return (
            f"correction {each.id}: {each.gpu_ns:+d} ns ({plain(self.amount)} {self.currency}, at the rates of {plan}) "
            f"to {each.tenant}'s report {each.report} of {each.namespace}, booked in the period of the service until "
            f"{rfc3339(each.booked_end_ns)} for {each.actor}: {each.reason}"
        )


def refuse_wish(wanted: Wanted) -> None:
    """Raise CorrectionRefused for what is wrong whatever the report says."""
    for what, text, most in (
        ("reason", wanted.reason, MAX_REASON_CHARS),
        ("actor", wanted.actor, MAX_ACTOR_CHARS),
        ("id", wanted.own_id, MAX_ID_CHARS),
    ):
        if not text.strip() or len(text) > most or not text.isprintable():
            raise CorrectionRefused(
                "NotSaid", f"The {what} is {text!r:.60}; write 1 to {most} printable characters on one line."
            )
    if wanted.gpu_ns == 0:
        raise CorrectionRefused("NothingToCorrect", "A correction of 0 ns changes nothing; say by how much.")


def meant(wanted: Wanted, closed: Closed, earlier: Iterable[Correction]) -> Wanted:
    """The same wish with the class of GPU and the part that it is about, said or not. `earlier` are all corrections of
    the service. Raises CorrectionRefused."""
    if closed.tenant == PLATFORM:
        raise CorrectionRefused(
            "PlatformsReport",
            f"{wanted.report} is the platform's report, which has the other side of every correction; name the report "
            "of the tenant.",
        )
    wanted = replace(wanted, gpu_class=_gpu_class(wanted, closed))
    return replace(wanted, part_start_ns=_part_start_ns(wanted, closed, _of_period(closed, earlier)))


def refuse_booked(known: Iterable[Correction]) -> None:
    """Raise CorrectionRefused where the wish is booked already: `known` are those under one of its ids."""
    for each in known:
        raise CorrectionRefused(
            "BookedAlready",
            f"The correction {each.id} is booked already ({each.gpu_ns:+d} ns to {each.report}, by {each.actor} at "
            f"{rfc3339(each.made_ns)}); nothing was booked. Where a second one is meant, give it an id of its own.",
        )


def decide(wanted: Wanted, closed: Closed, earlier: Iterable[Correction], now_ns: int) -> Priced:
    """The correction that is to be kept, of a wish as it is `meant`. `earlier` are all of the service. Raises
    CorrectionRefused."""
    gpu_class, earlier = wanted.gpu_class, _of_period(closed, earlier)
    stretch = _part(wanted, closed, earlier)
    if stretch.by_tokens:
        raise CorrectionRefused(
            "BilledByTokens",
            f"{wanted.report} was billed by standardRate: its tenant pays for tokens, and GPU time has no price on its "
            "bill that a correction could have.",
        )
    plan = stretch.version.plan
    price = None if plan is None else plan.hour_price(gpu_class, stretch.start_ns)
    if plan is None or price is None:
        raise CorrectionRefused(
            "NoPrice",
            f"{wanted.report} has no price for gpuClass {gpu_class}, and a correction without one would leave the bill "
            "of the next period without an amount, too.",
        )
    if closed.booked_currency not in {"", plan.currency}:
        raise CorrectionRefused(
            "AnotherCurrency",
            f"{wanted.report} was billed in {plan.currency}, and the service is billed in {closed.booked_currency}. "
            "A bill has one currency, and a correction would take its amount away; settle it with an invoice.",
        )
    _refuse_too_much(wanted, closed, earlier, price_in(stretch, gpu_class))
    correction = Correction(
        id=wanted.own_id,
        namespace=wanted.namespace,
        service=closed.service,
        tenant=closed.tenant,
        report=wanted.report,
        report_digest=closed.report_digest,
        closed_start_ns=closed.period.start_ns,
        closed_end_ns=closed.period.end_ns,
        booked_end_ns=closed.booked_end_ns,
        gpu_class=gpu_class,
        gpu_ns=wanted.gpu_ns,
        plan_name=plan.name,
        plan_version=plan.version,
        plan_hash=plan.hash,
        reason=wanted.reason,
        actor=wanted.actor,
        made_ns=now_ns,
        part_start_ns=stretch.start_ns,
    )
    return Priced(correction, rounded(price.of_time(wanted.gpu_ns)), plan.currency)


def _gpu_class(wanted: Wanted, closed: Closed) -> str:
    classes = closed.gpu_classes
    if wanted.gpu_class in classes:
        return wanted.gpu_class
    if not wanted.gpu_class and len(classes) == 1:
        return classes[0]
    told = f"None of them is {wanted.gpu_class:.60}" if wanted.gpu_class else "Which of them was it"
    raise CorrectionRefused(
        "WhichGpuClass",
        f"The service's GPUs in that period were of the class {' and '.join(classes) or 'of no name'}. {told}; name "
        "the class with --gpu-class, for it says the price.",
    )


def _of_period(closed: Closed, earlier: Iterable[Correction]) -> tuple[Correction, ...]:
    return tuple(each for each in earlier if each.closed_end_ns == closed.period.end_ns)


def _parts(wanted: Wanted, closed: Closed, earlier: Sequence[Correction]) -> dict[PartPrice, list[Stretch]]:
    """The parts that a wish can be of, by price: what is given back was on the tenant's bill, what is billed on one of
    both."""
    statuses = [closed.status] if wanted.gpu_ns < 0 else [closed.status, closed.platform]
    to_tenant = [each for each in earlier if each.tenant == closed.tenant]
    cut = stretches(closed.plan, closed.period)
    return parts_by_price(cut, statuses, to_tenant, wanted.gpu_class, closed.period.start_ns)


def _part(wanted: Wanted, closed: Closed, earlier: Sequence[Correction]) -> Stretch:
    """The part of a wish as it is `meant`."""
    if wanted.part_start_ns is None:
        return next(iter(_parts(wanted, closed, earlier).values()))[0]
    return corrected_stretch(stretches(closed.plan, closed.period), wanted.part_start_ns)


def _part_start_ns(wanted: Wanted, closed: Closed, earlier: Sequence[Correction]) -> int | None:
    """The start of the first part with the price of the one that is said; None where all have one price."""
    by_price = _parts(wanted, closed, earlier)
    said = next((of for of in by_price.values() if wanted.part_start_ns in [each.start_ns for each in of]), None)
    if said is not None or (wanted.part_start_ns is None and len(by_price) == 1):
        return None if said is None or len(by_price) == 1 else said[0].start_ns
    told = [f"{rfc3339(stretch.start_ns)} ({_told_price(price)})" for price, of in by_price.items() for stretch in of]
    what = "its price changed within it" if wanted.part_start_ns is None else "none of them begins when --from says"
    raise CorrectionRefused(
        "WhichPart",
        f"{wanted.report} has time of gpuClass {wanted.gpu_class} in the parts from {', '.join(told)}, and {what}; "
        "name the start of one with --from, and correct each for itself.",
    )


def _told_price(price: PartPrice) -> str:
    if price.hour is None:
        return "without a price"
    part = "" if price.hour.fraction == 1 else f" x {price.hour.fraction}"
    return f"{plain(price.hour.whole)}{part} {price.currency} an hour"


def _refuse_too_much(wanted: Wanted, closed: Closed, earlier: Sequence[Correction], price: PartPrice) -> None:
    """Who gives may be left with nothing of a class of GPU at a price, and not with less, and no tenant gets more money
    back than he was billed. What came late may have left the platform with less than nothing: then nothing can be
    billed, and all the same be given back."""
    cut = stretches(closed.plan, closed.period)
    to_tenant = [(each, each.gpu_ns) for each in earlier if each.tenant == closed.tenant]
    to_platform = [(each, -each.gpu_ns) for each in earlier]
    of_class = f" of the class {wanted.gpu_class}" if len(closed.gpu_classes) > 1 else ""
    of_class += "" if wanted.part_start_ns is None else f" at {_told_price(price)}"
    billed_ns = left_ns(closed.status, cut, wanted.gpu_class, price, to_tenant)
    carried_ns = left_ns(closed.platform, cut, wanted.gpu_class, price, to_platform)
    if wanted.gpu_ns < 0 and billed_ns + wanted.gpu_ns < 0:
        raise CorrectionRefused(
            "MoreThanBilled",
            f"{wanted.report} holds {billed_ns} ns{of_class} with the corrections so far; {-wanted.gpu_ns} ns cannot "
            "be given back.",
        )
    if wanted.gpu_ns > 0 and carried_ns - wanted.gpu_ns < 0:
        raise CorrectionRefused(
            "MoreThanAllocated",
            f"The platform carries {carried_ns} ns{of_class} of that period with the corrections so far; "
            f"{wanted.gpu_ns} ns more than what was allocated cannot be billed.",
        )
    left = left_amount(closed.status, cut, to_tenant)
    back = price.hour.of_time(-wanted.gpu_ns) if price.hour is not None else Fraction(0)
    if wanted.gpu_ns < 0 and back > left:
        none = "" if "amount" in closed.status else " (it has no amount, and its condition Priced says why)"
        raise CorrectionRefused(
            "MoreThanBilled",
            f"{wanted.report} was billed {plain(rounded(left))} {price.currency}{none} with the corrections so far; "
            f"{plain(rounded(back))} {price.currency} cannot be given back.",
        )
