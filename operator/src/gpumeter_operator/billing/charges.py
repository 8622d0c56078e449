"""Charges: whose time of a period stands on which bill, and what each piece of it costs.

Owns the way from (pod, stretch) to the charges of every tenant and of the platform, and their exact sum. Pure. Does not
know how a report looks, or where facts come from.

Per stretch and class of GPU, in integer nanoseconds:

    allocated = sum over tenants of (used + idle charged) + platform

so the charges of all reports of a service add up to what was allocated to it. Who carries recorded idle time is the
stretch's `idlePayer`: `platform`; `tenant` (split among the tenants that used this class in this stretch, in
proportion to their time, by largest remainders; the platform's where nobody did); `owner` (the tenant that the service
is dedicated to). Start, load, warm-up, drain, non-billable and unaccounted time stay the platform's under every plan.

A correction moves time of a closed period between a tenant and the platform, at the price of the part of that period
that it is of: the sum of all bills stays what was allocated. Of what was billed by tokens it moves their price alone.

Under `standardRate` a tenant pays for tokens, and its measured cost less that amount is the platform's `Difference`: so
the amounts of all reports still add up to the price of the allocated time.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction

from gpumeter_operator.billing.facts import PLATFORM, Correction, Line, Tokens, Worker
from gpumeter_operator.billing.stretches import Stretch, corrected_stretch, stretches
from gpumeter_operator.billing.tariff import HourPrice, IdlePayer, PeriodPlan, StandardRate, rounded
from gpumeter_usage.apportion import largest_remainder
from gpumeter_usage.period import Period, rfc3339
from gpumeter_usage.record import Account, Kind

_IDLE = (Account.IDLE, Account.HOST_GAP)


@dataclass(frozen=True, slots=True)
class PodStretch:
    """What one pod was allocated in a stretch, in GPU-nanoseconds, and the sums of its records that ended in it."""

    worker: Worker
    stretch: Stretch
    allocated_ns: int
    lines: tuple[Line, ...]


class ChargeKind(StrEnum):
    """What a charge is for."""

    USAGE = "Usage"  # a tenant's shares of measured steps
    IDLE = "Idle"  # idle time that the plan charges to a tenant
    PLATFORM = "Platform"  # what was allocated and is on no tenant's bill
    TOKENS = "Tokens"  # a model's tokens at standard rates, in the place of the price of usage
    DIFFERENCE = "Difference"  # the platform's: what tenants' usage cost, less what they pay for its tokens
    CORRECTION = "Correction"  # booked by hand for a closed period; the platform has the other side of it


@dataclass(frozen=True, slots=True)
class Charge:
    """One piece of a bill. `gpu_ns` and `price` of time, `tokens` and `rate` of tokens; `exact` is None where there is
    no price. `of` is the class of GPU or the model. A charge that is not `counted` is shown, and not in the amount."""

    kind: ChargeKind
    stretch: Stretch
    of: str
    exact: Fraction | None
    gpu_ns: int = 0
    price: HourPrice | None = None
    tokens: Tokens = field(default_factory=Tokens)
    rate: StandardRate | None = None
    counted: bool = True

    @property
    def corrects_tokens(self) -> bool:
        """It is a correction of what standard rates billed."""
        return self.kind is ChargeKind.CORRECTION and self.tokens != Tokens()


@dataclass(frozen=True, slots=True)
class Bill:
    """The charges of one tenant, or of the platform, in the order of stretch, kind and class."""

    charges: tuple[Charge, ...] = ()

    @property
    def gpu_ns(self) -> int:
        """The time that stands on this bill."""
        return sum(charge.gpu_ns for charge in self.charges)

    @property
    def idle_ns(self) -> int:
        """The part of it that is idle time."""
        return sum(charge.gpu_ns for charge in self.charges if charge.kind is ChargeKind.IDLE)

    @property
    def corrected_ns(self) -> int:
        """The part of it that corrects closed periods; negative where they held too much."""
        return sum(charge.gpu_ns for charge in self.charges if charge.kind is ChargeKind.CORRECTION)


@dataclass(frozen=True, slots=True)
class Priced:
    """An amount, or None with the reason and the sentence why there is none. `measured` is what the GPU time on the
    bill costs, where the tenant pays for tokens instead; `difference` the platform's part of that."""

    amount: Decimal | None
    reason: str
    message: str
    currency: str = ""
    measured: Decimal | None = None
    difference: Decimal | None = None


def bills(
    parts: Iterable[PodStretch], plan: PeriodPlan, period: Period, corrections: Iterable[Correction] = ()
) -> dict[str, Bill]:
    """The bill of everybody who used anything, pays for idle time or is corrected, and the platform's."""
    at: dict[int, Stretch] = {}
    left: dict[tuple[int, str], int] = defaultdict(int)  # by the stretch's start and the class of GPU
    idle: dict[tuple[int, str], int] = defaultdict(int)
    used: dict[tuple[int, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    tokens: dict[tuple[int, str], dict[str, Tokens]] = defaultdict(lambda: defaultdict(Tokens))  # start, model
    for part in parts:
        start_ns = part.stretch.start_ns
        at[start_ns] = part.stretch
        key = (start_ns, part.worker.gpu_class)
        left[key] += part.allocated_ns
        for line in part.lines:
            if line.kind is Kind.ACCOUNT and line.account in _IDLE:
                idle[key] += line.gpu_ns
            elif line.kind is Kind.SESSION and line.account == Account.ATTRIBUTED and line.owner != PLATFORM:
                used[key][line.owner] += line.gpu_ns
                left[key] -= line.gpu_ns
                count = Tokens(line.prompt_tokens, line.cached_tokens, line.completion_tokens)
                if part.stretch.by_tokens:
                    tokens[start_ns, part.worker.model][line.owner] += count
    found: dict[str, list[Charge]] = {PLATFORM: []}
    for start_ns, gpu_class in sorted(left):
        key, stretch = (start_ns, gpu_class), at[start_ns]
        for tenant, gpu_ns in used[key].items():
            usage = _of_time(ChargeKind.USAGE, stretch, gpu_class, gpu_ns, counted=not stretch.by_tokens)
            found.setdefault(tenant, []).append(usage)
        # A price of tokens is the whole price: who pays by it pays for no idle time besides.
        charged = {} if stretch.by_tokens else _idle_shares(stretch, idle[key], used[key], period)
        for tenant, gpu_ns in charged.items():
            found.setdefault(tenant, []).append(_of_time(ChargeKind.IDLE, stretch, gpu_class, gpu_ns))
        rest_ns = left[key] - sum(charged.values())
        found[PLATFORM].append(_of_time(ChargeKind.PLATFORM, stretch, gpu_class, rest_ns))
    for (start_ns, model), of_tenants in tokens.items():
        for tenant, count in of_tenants.items():
            found.setdefault(tenant, []).append(_of_tokens(at[start_ns], model, count))
    found[PLATFORM] += _differences(at, [charge for tenant in found for charge in found[tenant]])
    cut = stretches(plan, period)
    for each in corrections:
        stretch = corrected_stretch(cut, each.priced_ns)
        for owner, charge in zip((each.tenant, PLATFORM), _of_correction(each, stretch), strict=True):
            found.setdefault(owner, []).append(charge)
    return {owner: Bill(tuple(sorted(charges, key=_in_order))) for owner, charges in found.items()}


def whole_parts(
    pods: Iterable[tuple[Worker, int, tuple[Line, ...]]], plan: PeriodPlan, period: Period
) -> tuple[PodStretch, ...]:
    """The parts of a period in which nothing changes: one a pod. Raises ValueError where something does."""
    (whole,) = stretches(plan, period)
    return tuple(PodStretch(worker, whole, allocated_ns, lines) for worker, allocated_ns, lines in pods)


def price(bill: Bill, plan: PeriodPlan, period: Period) -> Priced:
    """What a bill costs: its charges at the rates of their stretches, added up exactly and rounded once.

    Where one of them has no price the whole has none: a bill is left unpriced rather than mispriced.
    """
    counted = [charge for charge in bill.charges if charge.counted]
    versions = [stretch.version for stretch in stretches(plan, period)]
    if all(version.plan is None for version in versions):
        return Priced(None, *_no_plan(plan.name, versions[0].problem))
    for charge in counted:
        if charge.exact is None:
            return Priced(None, *_no_price(charge, plan.name))
    plans = [version.plan for version in versions if version.plan is not None]
    in_use = [charge.stretch.version.plan for charge in counted if charge.exact]
    currencies = sorted({each.currency for each in in_use or plans[-1:] if each is not None})
    if len(currencies) > 1:
        return Priced(None, "CurrencyChanged", _two_currencies(counted, currencies, plan.name))
    measured = difference = None
    for_time = (ChargeKind.USAGE, ChargeKind.IDLE, ChargeKind.PLATFORM, ChargeKind.CORRECTION)
    of_time = [charge.exact for charge in bill.charges if charge.kind in for_time and not charge.corrects_tokens]
    if len(counted) < len(bill.charges) or any(charge.corrects_tokens for charge in bill.charges):
        measured = _sum(of_time)
    if any(charge.kind is ChargeKind.DIFFERENCE for charge in counted):
        difference = _sum(charge.exact for charge in counted if charge.kind is ChargeKind.DIFFERENCE)
    amount = _sum(charge.exact for charge in counted)
    return Priced(amount, "Priced", _told(bill, plan, period), currencies[0], measured, difference)


def _sum(exact: Iterable[Fraction | None]) -> Decimal | None:
    total = Fraction(0)
    for each in exact:
        if each is None:
            return None
        total += each
    return rounded(total)


def _of_time(kind: ChargeKind, stretch: Stretch, gpu_class: str, gpu_ns: int, *, counted: bool = True) -> Charge:
    plan = stretch.version.plan
    found = None if plan is None else plan.hour_price(gpu_class, stretch.start_ns)
    exact = found.of_time(gpu_ns) if found is not None else None if gpu_ns else Fraction(0)
    return Charge(kind, stretch, gpu_class, exact, gpu_ns, found, counted=counted)


def _of_correction(of: Correction, stretch: Stretch) -> tuple[Charge, Charge]:
    """The tenant's side and the platform's."""
    count = of.tokens
    if count is None:
        of_time = [_of_time(ChargeKind.CORRECTION, stretch, of.gpu_class, gpu_ns) for gpu_ns in (of.gpu_ns, -of.gpu_ns)]
        return of_time[0], of_time[1]
    plan, model = stretch.version.plan, of.model or ""
    rate = None if plan is None else plan.standard_rate(model, stretch.start_ns)
    exact = None if rate is None else rate.of_tokens(count.prompt, count.cached, count.completion)
    own = Charge(ChargeKind.CORRECTION, stretch, model, exact, tokens=count, rate=rate)
    return own, replace(own, exact=None if exact is None else -exact, tokens=-count)


def _idle_shares(stretch: Stretch, idle_ns: int, used: Mapping[str, int], period: Period) -> dict[str, int]:
    """Who of the tenants carries how much of the idle time of one class in one stretch; the rest is the platform's."""
    payer = IdlePayer.PLATFORM if stretch.version.plan is None else stretch.version.plan.idle_payer
    if payer is IdlePayer.OWNER and stretch.terms.owner and idle_ns:
        return {stretch.terms.owner: idle_ns}
    # What came late is not shared out again: most of those who used that stretch were billed for it in its own period.
    late = stretch.end_ns <= period.start_ns
    if payer is not IdlePayer.TENANT or late or idle_ns <= 0 or not any(used.values()):
        return {}
    tenants = sorted(tenant for tenant, gpu_ns in used.items() if gpu_ns > 0)
    shares = largest_remainder(idle_ns, [used[tenant] for tenant in tenants])
    return {tenant: share_ns for tenant, share_ns in zip(tenants, shares, strict=True) if share_ns}


def _of_tokens(stretch: Stretch, model: str, count: Tokens) -> Charge:
    plan = stretch.version.plan
    rate = None if plan is None else plan.standard_rate(model, stretch.start_ns)
    exact = None if count != Tokens() else Fraction(0)
    if rate is not None:
        # More found than sent cannot be, and is refused; where an older ledger has it, it is not paid for twice.
        exact = rate.of_tokens(count.prompt, min(count.cached, count.prompt), count.completion)
    return Charge(ChargeKind.TOKENS, stretch, model, exact, tokens=count, rate=rate)


def _differences(at: Mapping[int, Stretch], charges: Iterable[Charge]) -> Iterable[Charge]:
    """By stretch that is billed by tokens, what the time of tenants costs less what they pay for its tokens; None where
    either has no price."""
    found: dict[int, Fraction | None] = {}
    for charge in charges:
        if charge.stretch.by_tokens and charge.kind in (ChargeKind.USAGE, ChargeKind.TOKENS):
            so_far, exact = found.get(charge.stretch.start_ns, Fraction(0)), charge.exact
            if so_far is None or exact is None:
                found[charge.stretch.start_ns] = None
            else:
                found[charge.stretch.start_ns] = so_far + (exact if charge.kind is ChargeKind.USAGE else -exact)
    return [Charge(ChargeKind.DIFFERENCE, at[start_ns], "", exact) for start_ns, exact in found.items()]


def _no_plan(name: str, problem: str) -> tuple[str, str]:
    if problem:
        return "PlanInvalid", problem
    return (
        "NoPricePlan",
        f"There was no usable PricePlan named {name} when the period was opened; usage is reported without "
        f"amounts. Create it, and amounts begin with the next period.",
    )


def _no_price(charge: Charge, name: str) -> tuple[str, str]:
    version, since = charge.stretch.version, rfc3339(charge.stretch.start_ns)
    plan = version.plan
    if plan is None:
        reason, why = ("PlanInvalid", version.problem) if version.problem else ("NoPricePlan", "")
        why = why or f"There was no usable PricePlan named {name}."
        until = rfc3339(charge.stretch.end_ns)
        return reason, f"From {since} to {until}: {why} Where a part of a bill has no price the whole has none."
    of_plan = f"PricePlan {plan.name} (version {plan.version})"
    if charge.kind is ChargeKind.TOKENS:
        return "NoStandardRate", (
            f"{of_plan} has no standard rate for the model {charge.of} at {since}, and the service is billed by "
            f"standardRate; add one."
        )
    if charge.kind is ChargeKind.DIFFERENCE:
        return "NoStandardRate", (
            f"{of_plan} does not price all that tenants used at {since}, by standardRate and by GPU time, so what the "
            f"platform carries of it cannot be told; add the rates that are missing."
        )
    return "NoRate", f"{of_plan} has no rate for gpuClass {charge.of} at {since}; add one."


def _two_currencies(counted: Iterable[Charge], currencies: Iterable[str], name: str) -> str:
    """Why a bill has charges in these currencies. A correction is refused where the service is billed in another one by
    then, but the plan may be changed between that and the beginning of the period in which it is booked."""
    by_hand: dict[bool, set[str]] = {True: set(), False: set()}
    for charge in counted:
        if charge.exact and charge.stretch.version.plan is not None:
            by_hand[charge.kind is ChargeKind.CORRECTION].add(charge.stretch.version.plan.currency)
    own, corrected = (" and ".join(sorted(by_hand[which])) for which in (False, True))
    if len(by_hand[False]) > 1:
        return (
            f"PricePlan {name} changed its currency within the period ({' and '.join(currencies)}), and amounts "
            f"of two currencies do not add up; make a new plan for another currency."
        )
    beside = f", and everything else in {own}" if own else ""
    return (
        f"What corrects earlier periods here is priced in {corrected}{beside}; amounts of two currencies do not add "
        "up, so this bill has none, and its charges show what each part costs. Settle the corrections with an invoice."
    )


def _told(bill: Bill, plan: PeriodPlan, period: Period) -> str:
    versions = {charge.stretch.version.plan for charge in bill.charges if charge.exact} - {None}
    numbers = sorted({each.version for each in versions if each is not None})
    cuts = sorted({charge.stretch.start_ns for charge in bill.charges if charge.stretch.start_ns > period.start_ns})
    late = any(charge.stretch.end_ns <= period.start_ns for charge in bill.charges)
    if not cuts and not late and len(numbers) <= 1:
        # An older version may have been in force before, but nobody saw it.
        when = (
            "when the period began" if plan.as_of_ns <= period.start_ns else f"as it stood at {rfc3339(plan.as_of_ns)}"
        )
        number = numbers[0] if numbers else plan.plan.version if plan.plan else 0
        told = f"At the rates of PricePlan {plan.name} (version {number}) {when}."
    else:
        told = f"At the rates of PricePlan {plan.name} (version {', '.join(map(str, numbers)) or 'none'}), each part "
        told += "at those of its time"
        told += f"; prices or versions changed at {', '.join(map(rfc3339, cuts))}" if cuts else ""
        told += "; what became known late is priced by when it was used" if late else ""
        told += "."
    unowned = [charge.stretch.version.plan for charge in bill.charges if not charge.stretch.terms.owner]
    if IdlePayer.OWNER in {each.idle_payer for each in unowned if each is not None}:
        told += (
            " The plan charges idle time to the service's owner; spec.pricing.owner names none, so the platform pays."
        )
    return told


def _in_order(charge: Charge) -> tuple[int, int, str]:
    return charge.stretch.start_ns, list(ChargeKind).index(charge.kind), charge.of
