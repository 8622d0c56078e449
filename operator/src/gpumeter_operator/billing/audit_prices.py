"""What every bill of a period must come to, reckoned from raw records by the minute.

Owns a second way to an amount: no charge, sum or share of the collector's is used, only the stretches and the plan's
own rates. Records end in one minute, and prices change at its edges, so a minute has one price.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from gpumeter_operator.billing.facts import PLATFORM, Adjustment, Correction, Pod
from gpumeter_operator.billing.stretches import Stretch, corrected_stretch, stretch_at, stretches
from gpumeter_operator.billing.tariff import HOUR_NS, BillingMode, IdlePayer, PeriodPlan
from gpumeter_usage.period import MINUTE_NS, Period

Used = tuple[int, int, int, int]
"""GPU-nanoseconds, and prompt, cached and completion tokens."""


@dataclass(frozen=True, slots=True)
class RawMinute:
    """What one pod's raw records of one minute say: whom it worked for, and how long it was idle."""

    end_ns: int
    gpu_class: str
    model: str
    used: Mapping[str, Used]  # by tenant
    idle_ns: int


@dataclass(slots=True)
class Owed:
    """What a report must say. `amount` is None where something on the bill has no price."""

    gpu_ns: int = 0
    idle_ns: int = 0
    adjusted_ns: int = 0
    amount: Fraction | None = Fraction(0)
    currencies: set[str] = field(default_factory=set)

    def add(self, exact: Fraction | None, stretch: Stretch) -> None:
        """One more piece of the amount."""
        self.amount = None if self.amount is None or exact is None else self.amount + exact
        if exact and stretch.version.plan is not None:
            self.currencies.add(stretch.version.plan.currency)


def bills_due(
    plan: PeriodPlan,
    period: Period,
    minutes: Iterable[RawMinute],
    allocated_ns: Mapping[tuple[int, str], int],
    corrections: Iterable[Correction] = (),
) -> dict[str, Owed]:
    """By tenant, what is due. `allocated_ns` is by the start of a stretch and the class of GPU."""
    due: dict[str, Owed] = defaultdict(Owed)
    cut = stretches(plan, period)
    at = {stretch.start_ns: stretch for stretch in cut}
    used: dict[tuple[int, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    idle: dict[tuple[int, str], int] = defaultdict(int)
    for minute in minutes:
        stretch = stretch_at(cut, minute.end_ns)
        key = stretch.start_ns, minute.gpu_class
        by_tokens = stretch.terms.billing_mode is BillingMode.STANDARD_RATE
        idle[key] += minute.idle_ns
        for tenant, (gpu_ns, *tokens) in minute.used.items():
            if tenant == PLATFORM:
                continue
            used[key][tenant] += gpu_ns
            due[tenant].gpu_ns += gpu_ns
            of_time = _of_time(stretch, minute.gpu_class, gpu_ns)
            paid = _of_tokens(stretch, minute.model, *tokens) if by_tokens else of_time
            due[tenant].add(paid, stretch)
            if by_tokens:
                gap = None if of_time is None or paid is None else of_time - paid
                due[PLATFORM].add(gap, stretch)
    for key in sorted(allocated_ns.keys() | used.keys() | idle.keys()):
        stretch, gpu_class = at[key[0]], key[1]
        shares = _idle_due(stretch, idle[key], used[key], period)
        for tenant, gpu_ns in shares.items():
            due[tenant].gpu_ns += gpu_ns
            due[tenant].idle_ns += gpu_ns
            due[tenant].add(_of_time(stretch, gpu_class, gpu_ns), stretch)
        rest_ns = allocated_ns.get(key, 0) - sum(used[key].values()) - sum(shares.values())
        due[PLATFORM].gpu_ns += rest_ns
        due[PLATFORM].add(_of_time(stretch, gpu_class, rest_ns), stretch)
    for each in corrections:
        stretch = corrected_stretch(cut, each.priced_ns)
        for owner, gpu_ns in ((each.tenant, each.gpu_ns), (PLATFORM, -each.gpu_ns)):
            due[owner].gpu_ns += gpu_ns
            due[owner].adjusted_ns += gpu_ns
            moved = _of_time(stretch, each.gpu_class, gpu_ns)
            if each.model is not None:
                moved = _of_corrected(each, stretch, 1 if owner == each.tenant else -1)
            due[owner].add(moved, stretch)
    return due


def corrections_that_differ(corrections: Iterable[Correction], plan: PeriodPlan, period: Period) -> Iterable[str]:
    """A sentence for each correction that names another version of the price plan than the one that prices it."""
    cut = stretches(plan, period)
    for each in corrections:
        known = corrected_stretch(cut, each.priced_ns).version.plan
        if known is None or (known.name, known.hash) != (each.plan_name, each.plan_hash):
            yield f"correction {each.id} names another price plan than that of the period that it corrects"


def allocated_in(
    pods: Iterable[tuple[Pod, int]], adjustments: Iterable[Adjustment], plan: PeriodPlan, period: Period
) -> dict[tuple[int, str], int]:
    """GPU-nanoseconds allocated in a closed period, by the start of the stretch and the class of GPU.

    `pods` are as they were known when it was closed, and come with what their frozen accounts say was allocated to them
    in it, which is the total. Raises ValueError with a sentence where a pod's containers do not come to that.
    """
    cut = stretches(plan, period)
    found: dict[tuple[int, str], int] = defaultdict(int)
    booked = [each for each in adjustments if each.booked_end_ns == period.end_ns]
    for pod, frozen_ns in pods:
        own = [each for each in booked if each.worker_uid == pod.worker.worker_uid]
        for each in own:
            start_ns = stretch_at(cut, each.closed_end_ns).start_ns
            found[start_ns, pod.worker.gpu_class] += each.allocated_ns
        ran_ns = frozen_ns - sum(each.allocated_ns for each in own)
        for stretch, gpu_ns in _as_it_was_known(pod, cut, period, ran_ns):
            found[stretch.start_ns, pod.worker.gpu_class] += gpu_ns
    return {key: gpu_ns for key, gpu_ns in found.items() if gpu_ns}


def _as_it_was_known(pod: Pod, cut: tuple[Stretch, ...], period: Period, total_ns: int) -> list[tuple[Stretch, int]]:
    """A pod's allocation by stretch, from its containers as they were known when the period was closed: that one ended
    in it, or ran at all, may have become known later, and is an adjustment of another period then."""
    own = [stretch for stretch in cut if stretch.end_ns > period.start_ns]  # others are of what is booked late
    if len(own) == 1:
        return [(own[0], total_ns)]
    lives = [(span.started_ns, period.end_ns if span.ended_ns is None else span.ended_ns) for span in pod.spans]
    by_stretch = []
    for stretch in own:
        lived_ns = sum(max(0, min(stretch.end_ns, end) - max(stretch.start_ns, start)) for start, end in lives)
        by_stretch.append((stretch, pod.worker.devices * lived_ns))
    if sum(gpu_ns for _, gpu_ns in by_stretch) != total_ns:
        raise ValueError(f"{pod.worker.pod}: its containers do not come to the {total_ns} ns of its accounts")
    return by_stretch


def minute_end_ns(ended_ns: int) -> int:
    """The end of the minute in which something ended."""
    return -(-ended_ns // MINUTE_NS) * MINUTE_NS


def _of_time(stretch: Stretch, gpu_class: str, gpu_ns: int) -> Fraction | None:
    """In fractions of whole numbers, so that a fault of decimals shows."""
    plan = stretch.version.plan
    rate = None if plan is None else plan.rate(gpu_class, stretch.start_ns)
    if not gpu_ns or plan is None or rate is None:
        return None if gpu_ns else Fraction(0)
    whole = plan.rate(rate.of, stretch.start_ns) if rate.of else rate
    if whole is None:
        return None
    return Fraction(gpu_ns, int(HOUR_NS)) * Fraction(str(whole.per_gpu_hour)) * rate.fraction


def _of_tokens(stretch: Stretch, model: str, prompt: int, cached: int, completion: int) -> Fraction | None:
    plan = stretch.version.plan
    rate = None if plan is None else plan.standard_rate(model, stretch.start_ns)
    if rate is None:
        return None if prompt or cached or completion else Fraction(0)
    prices = (Fraction(str(price)) for price in (rate.prompt, rate.cached, rate.completion))
    counts = (max(0, prompt - cached), min(prompt, cached), completion)
    return sum((count * price / 1000 for count, price in zip(counts, prices, strict=True)), Fraction(0))


def _of_corrected(each: Correction, stretch: Stretch, sign: int) -> Fraction | None:
    """All of its tokens are given back, or all of them billed."""
    counts = each.prompt_tokens or 0, each.cached_tokens or 0, each.completion_tokens or 0
    paid = _of_tokens(stretch, each.model or "", *map(abs, counts))
    return None if paid is None else sign * (-paid if min(counts) < 0 else paid)


def _idle_due(stretch: Stretch, idle_ns: int, used: Mapping[str, int], period: Period) -> dict[str, int]:
    if stretch.terms.billing_mode is BillingMode.STANDARD_RATE:
        return {}
    owner = stretch.terms.owner
    payer = IdlePayer.PLATFORM if stretch.version.plan is None else stretch.version.plan.idle_payer
    if payer is IdlePayer.OWNER:
        return {owner: idle_ns} if owner and idle_ns else {}
    total_ns = sum(gpu_ns for gpu_ns in used.values() if gpu_ns > 0)
    if payer is IdlePayer.PLATFORM or stretch.end_ns <= period.start_ns or idle_ns <= 0 or not total_ns:
        return {}
    exact = {tenant: Fraction(idle_ns * used[tenant], total_ns) for tenant in sorted(used) if used[tenant] > 0}
    shares = {tenant: share.numerator // share.denominator for tenant, share in exact.items()}
    left = idle_ns - sum(shares.values())
    for tenant in sorted(exact, key=lambda each: shares[each] - exact[each])[:left]:  # a sort is stable
        shares[tenant] += 1
    return {tenant: share_ns for tenant, share_ns in shares.items() if share_ns}
