"""What may be corrected by hand, and at which price: the rules of `gpumeter adjust`.

Owns the refusals and the correction that is booked. Pure: takes the reports and the plan of the corrected period, and
the corrections that there are. Does not know how they are kept.

A correction moves GPU time of a closed period between a tenant and the platform, or, where standard rates billed it,
the price of tokens: no report is changed, the difference stands on the bills of the service's next open period. It is
priced as what it corrects was: where the price changed within the period, a correction is of one part of it, and has
the price of that part.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from hashlib import sha256
from itertools import product
from typing import Any

from gpumeter_operator.billing.corrected import (
    Measure,
    PartPrice,
    by_price,
    left_amount,
    left_ns,
    left_tokens,
    parts_with,
    price_in,
)
from gpumeter_operator.billing.counts import TOKEN_NS
from gpumeter_operator.billing.facts import PLATFORM, Correction, Tokens
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
    """What somebody wants: `gpu_ns` more on the bill that the report `report` of a namespace was, or less; or, where
    they are said, `tokens` of a model.

    Without an `id` one is made of all the rest, so that the same wish twice is the same correction. Where the class of
    GPU is left out, `meant` says which it is, before the id is made. `part_start_ns` is the start of the part of the
    period that it is of; None where that has one price. A `tenant` is said where he has no report of the period: then
    `report` is the platform's, which carries what he is billed.
    """

    namespace: str
    report: str
    gpu_ns: int
    reason: str
    actor: str
    gpu_class: str = ""
    id: str = ""
    part_start_ns: int | None = None
    model: str = ""
    tokens: Tokens | None = None
    tenant: str = ""

    @property
    def measure(self) -> Measure:
        """What it counts, once it is said."""
        return Measure(self.gpu_class) if self.tokens is None else Measure(self.model, of_tokens=True)

    @property
    def bill(self) -> str:
        """What it corrects."""
        return f"the bill of {self.tenant}, beside {self.report}," if self.tenant else self.report

    @property
    def is_credit(self) -> bool:
        """Whether it gives back."""
        of = self.tokens
        return self.gpu_ns < 0 if of is None else min(of.prompt, of.cached, of.completion) < 0

    @property
    def own_id(self) -> str:
        """The id that it is booked under."""
        if self.id:
            return self.id
        part = () if self.part_start_ns is None else (str(self.part_start_ns),)
        of = self.tokens
        tokens = () if of is None else (self.model, *map(str, (of.prompt, of.cached, of.completion)))
        who = (f"tenant {self.tenant}",) if self.tenant else ()
        told = (self.namespace, self.report, str(self.gpu_ns), self.gpu_class, self.reason, self.actor)
        told += (*part, *tokens, *who)
        return "c-" + sha256(canonical_json(list(told))).hexdigest()[:16]

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids that the same wish may be booked under already: where the service had one class of GPU, versions
        before made the id without it unless it was typed; and they knew of no parts."""
        said = product((self.gpu_class, ""), (self.part_start_ns, None))
        return tuple(dict.fromkeys(replace(self, gpu_class=of, part_start_ns=part).own_id for of, part in said))


@dataclass(frozen=True, slots=True)
class Closed:
    """The closed period of a report: the tenant whose bill is corrected, the digest of the report's bytes, the status
    of his and of the platform's report, its price plan, the classes of GPU and the models of its pods, and the end of
    the period in which a correction is booked now, with the currency of that period's plan ("" where nobody knows it).
    """

    service: str
    tenant: str
    report_digest: str
    status: Mapping[str, Any]
    platform: Mapping[str, Any]
    period: Period
    plan: PeriodPlan
    gpu_classes: Sequence[str]
    models: Sequence[str]
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
            f"correction {each.id}: {each.told} ({plain(self.amount)} {self.currency}, at the rates of {plan}) "
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
    of = wanted.tokens or Tokens()
    if wanted.gpu_ns == 0 and of == Tokens():
        raise CorrectionRefused("NothingToCorrect", "A correction of 0 ns or tokens changes nothing; say by how much.")
    if wanted.gpu_ns != 0 and wanted.tokens is not None:
        raise CorrectionRefused("TimeAndTokens", "A correction is of GPU time or of tokens; book one of each.")
    numbers = sorted((of.prompt, of.cached, of.completion))
    if numbers[0] < 0 < numbers[-1] or abs(of.cached) > abs(of.prompt):
        raise CorrectionRefused(
            "TokensDisagree",
            "A correction gives tokens back or bills them, and cached tokens are a part of those of the prompt: "
            f"{of.prompt} prompt, {of.cached} cached and {of.completion} completion tokens are not; book two.",
        )


def meant(wanted: Wanted, closed: Closed, earlier: Iterable[Correction]) -> Wanted:
    """The same wish with the class of GPU or the model, and the part, that it is about, said or not. `earlier` are all
    corrections of the service. Raises CorrectionRefused."""
    if closed.tenant == PLATFORM:
        raise CorrectionRefused(
            "PlatformsReport",
            f"{wanted.report} is the platform's report, which has the other side of every correction; name the report "
            "of the tenant, or, where he has none of that period, the tenant with --tenant.",
        )
    if wanted.tokens is None:
        wanted = replace(wanted, gpu_class=_gpu_class(wanted, closed))
    else:
        wanted = replace(wanted, gpu_class="", model=_model(wanted, closed))
    return replace(wanted, part_start_ns=_part_start_ns(wanted, closed, _of_period(closed, earlier)))


def refuse_booked(known: Iterable[Correction]) -> None:
    """Raise CorrectionRefused where the wish is booked already: `known` are those under one of its ids."""
    for each in known:
        raise CorrectionRefused(
            "BookedAlready",
            f"The correction {each.id} is booked already ({each.told} to {each.report}, by {each.actor} at "
            f"{rfc3339(each.made_ns)}); nothing was booked. Where a second one is meant, give it an id of its own.",
        )


def decide(wanted: Wanted, closed: Closed, earlier: Iterable[Correction], now_ns: int) -> Priced:
    """The correction that is to be kept, of a wish as it is `meant`. `earlier` are all of the service. Raises
    CorrectionRefused."""
    earlier, of = _of_period(closed, earlier), wanted.tokens
    stretch = _part(wanted, closed, earlier)
    if stretch.by_tokens and of is None:
        raise CorrectionRefused(
            "BilledByTokens",
            f"{wanted.report} was billed by standardRate: its tenant pays for tokens, and GPU time has no price on its "
            "bill that a correction could have. Correct its tokens (--prompt-tokens, --completion-tokens).",
        )
    if not stretch.by_tokens and of is not None:
        raise CorrectionRefused(
            "BilledByTime",
            f"{wanted.report} was billed as measured: its tenant pays for GPU time, and tokens have no price on its "
            "bill that a correction could have. Correct its time (--gpu-ns).",
        )
    plan, price = stretch.version.plan, price_in(stretch, wanted.measure)
    if plan is None or (price.hour is None and price.rate is None):
        what = f"gpuClass {wanted.gpu_class}" if of is None else f"tokens of the model {wanted.model}"
        raise CorrectionRefused(
            "NoPrice",
            f"{wanted.report} has no price for {what}, and a correction without one would leave the bill "
            "of the next period without an amount, too.",
        )
    if closed.booked_currency not in {"", plan.currency}:
        raise CorrectionRefused(
            "AnotherCurrency",
            f"{wanted.report} was billed in {plan.currency}, and the service is billed in {closed.booked_currency}. "
            "A bill has one currency, and a correction would take its amount away; settle it with an invoice.",
        )
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
        gpu_class=wanted.gpu_class,
        gpu_ns=wanted.gpu_ns,
        plan_name=plan.name,
        plan_version=plan.version,
        plan_hash=plan.hash,
        reason=wanted.reason,
        actor=wanted.actor,
        made_ns=now_ns,
        part_start_ns=stretch.start_ns,
        model=None if of is None else wanted.model,
        prompt_tokens=None if of is None else of.prompt,
        cached_tokens=None if of is None else of.cached,
        completion_tokens=None if of is None else of.completion,
    )
    if of is None:
        _refuse_too_much(wanted, closed, earlier, price)
    else:
        _refuse_too_many(wanted, of, closed, earlier, price)
    _refuse_too_much_money(wanted, closed, earlier, price, back=-price.of(correction))
    return Priced(correction, rounded(price.of(correction)), plan.currency)


def _gpu_class(wanted: Wanted, closed: Closed) -> str:
    were = f"GPUs in that period were of the class {' and '.join(closed.gpu_classes) or 'of no name'}"
    return _which(wanted.gpu_class, closed.gpu_classes, "WhichGpuClass", were, "name the class with --gpu-class")


def _model(wanted: Wanted, closed: Closed) -> str:
    were = f"models in that period were {' and '.join(closed.models) or 'none'}"
    return _which(wanted.model, closed.models, "WhichModel", were, "name the model with --model")


def _which(said: str, known: Sequence[str], reason: str, were: str, to_do: str) -> str:
    """The one that is meant: it need not be said where there is only one. Raises CorrectionRefused."""
    if said in known:
        return said
    if not said and len(known) == 1:
        return known[0]
    told = f"None of them is {said:.60}" if said else "Which of them was it"
    raise CorrectionRefused(reason, f"The service's {were}. {told}; {to_do}, for it says the price.")


def _of_period(closed: Closed, earlier: Iterable[Correction]) -> tuple[Correction, ...]:
    return tuple(each for each in earlier if each.closed_end_ns == closed.period.end_ns)


def _parts(wanted: Wanted, closed: Closed, earlier: Sequence[Correction]) -> dict[PartPrice, list[Stretch]]:
    """The parts that a wish can be of, by price: what is given back was on the tenant's bill, what is billed on one of
    both; tokens are on no bill of the platform, and are billed for any part."""
    statuses = [closed.status] if wanted.is_credit else [closed.status, closed.platform]
    to_tenant = [each for each in earlier if each.tenant == closed.tenant]
    cut, start_ns = stretches(closed.plan, closed.period), closed.period.start_ns
    parts = parts_with(wanted.measure, cut, statuses, to_tenant)
    if wanted.tokens is not None and not wanted.is_credit:
        parts += [stretch for stretch in cut if stretch.start_ns >= start_ns]
    return by_price(wanted.measure, cut, parts, start_ns)


def _part(wanted: Wanted, closed: Closed, earlier: Sequence[Correction]) -> Stretch:
    """The part of a wish as it is `meant`."""
    if wanted.part_start_ns is None:
        return next(iter(_parts(wanted, closed, earlier).values()))[0]
    return corrected_stretch(stretches(closed.plan, closed.period), wanted.part_start_ns)


def _part_start_ns(wanted: Wanted, closed: Closed, earlier: Sequence[Correction]) -> int | None:
    """The start of the first part with the price of the one that is said; None where all have one price."""
    parts = _parts(wanted, closed, earlier)
    said = next((of for of in parts.values() if wanted.part_start_ns in [each.start_ns for each in of]), None)
    if said is not None or (wanted.part_start_ns is None and len(parts) == 1):
        return None if said is None or len(parts) == 1 else said[0].start_ns
    told = [f"{rfc3339(stretch.start_ns)} ({_told_price(price)})" for price, of in parts.items() for stretch in of]
    counts = f"time of gpuClass {wanted.gpu_class}" if wanted.tokens is None else f"tokens of the model {wanted.model}"
    what = "its price changed within it" if wanted.part_start_ns is None else "none of them begins when --from says"
    raise CorrectionRefused(
        "WhichPart",
        f"{wanted.report} has {counts} in the parts from {', '.join(told)}, and {what}; "
        "name the start of one with --from, and correct each for itself.",
    )


def _told_price(price: PartPrice) -> str:
    if price.rate is not None:
        each = (plain(one) for one in (price.rate.prompt, price.rate.cached, price.rate.completion))
        return f"{' / '.join(each)} {price.currency} for 1,000 prompt / cached / completion tokens"
    if price.hour is None:
        return "without a price"
    part = "" if price.hour.fraction == 1 else f" x {price.hour.fraction}"
    return f"{plain(price.hour.whole)}{part} {price.currency} an hour"


def _refuse_too_much(wanted: Wanted, closed: Closed, earlier: Sequence[Correction], price: PartPrice) -> None:
    """Who gives may be left with nothing of a class of GPU at a price, and not with less. What came late may have left
    the platform with less than nothing: then nothing can be billed, and all the same be given back."""
    cut = stretches(closed.plan, closed.period)
    to_tenant = [(each, each.gpu_ns) for each in earlier if each.tenant == closed.tenant]
    to_platform = [(each, -each.gpu_ns) for each in earlier]
    of_class = f" of the class {wanted.gpu_class}" if len(closed.gpu_classes) > 1 else ""
    of_class += "" if wanted.part_start_ns is None else f" at {_told_price(price)}"
    billed_ns = left_ns(closed.status, cut, wanted.measure, price, to_tenant)
    carried_ns = left_ns(closed.platform, cut, wanted.measure, price, to_platform)
    if wanted.gpu_ns < 0 and billed_ns + wanted.gpu_ns < 0:
        raise CorrectionRefused(
            "MoreThanBilled",
            f"{wanted.bill} holds {billed_ns} ns{of_class} with the corrections so far; {-wanted.gpu_ns} ns cannot "
            "be given back.",
        )
    if wanted.gpu_ns > 0 and carried_ns - wanted.gpu_ns < 0:
        raise CorrectionRefused(
            "MoreThanAllocated",
            f"The platform carries {carried_ns} ns{of_class} of that period with the corrections so far; "
            f"{wanted.gpu_ns} ns more than what was allocated cannot be billed.",
        )


def _refuse_too_many(
    wanted: Wanted, of: Tokens, closed: Closed, earlier: Sequence[Correction], price: PartPrice
) -> None:
    """A tenant may be left with none of each kind of tokens of a model at a price, and not with fewer. How many more he
    had nobody can say, but that the GPUs of the service computed them in that period."""
    to_tenant = [each for each in earlier if each.tenant == closed.tenant]
    left = left_tokens(closed.status, stretches(closed.plan, closed.period), wanted.measure, price, to_tenant) + of
    if wanted.is_credit and min(left.prompt - left.cached, left.cached, left.completion) < 0:
        had = left + -of
        raise CorrectionRefused(
            "MoreThanBilled",
            f"{wanted.bill} holds {had.prompt} prompt tokens ({had.cached} of them cached) and {had.completion} of "
            f"answers of the model {wanted.model} at that price with the corrections so far; {-of.prompt} "
            f"({-of.cached}) and {-of.completion} cannot be given back.",
        )
    most = int(closed.platform["accounts"]["allocated"]) // TOKEN_NS
    if not wanted.is_credit and left.prompt - left.cached + left.completion > most:
        raise CorrectionRefused(
            "MoreThanAllocated",
            f"With these {wanted.bill} would have more tokens than the {most} that any device computes in the time "
            "that the service was allocated in that period.",
        )


def _refuse_too_much_money(
    wanted: Wanted, closed: Closed, earlier: Sequence[Correction], price: PartPrice, *, back: Fraction
) -> None:
    """No tenant gets more money back than he was billed."""
    to_tenant = [each for each in earlier if each.tenant == closed.tenant]
    left = left_amount(closed.status, stretches(closed.plan, closed.period), to_tenant)
    if wanted.is_credit and back > left:
        none = "" if "amount" in closed.status else " (it has no amount, and its condition Priced says why)"
        raise CorrectionRefused(
            "MoreThanBilled",
            f"{wanted.bill} was billed {plain(rounded(left))} {price.currency}{none} with the corrections so far; "
            f"{plain(rounded(back))} {price.currency} cannot be given back.",
        )
