"""Prices: what a price plan asks for GPU time and for tokens, and from when.

Owns the reading of a PricePlan, its hash, the look-up of a rate at a time, and the one rounding of an amount. Prices
are decimals and amounts exact fractions until they are rounded; no float comes near money. Does not know who used what,
and reads no clock.

A rate holds for what ends after its `effectiveFrom`, as a period holds what ends after its start. `effectiveFrom` lies
on a whole UTC minute, where workers cut their records: so no record spans a change of price and none has to be split by
a guess. A step belongs to the side on which it ends.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation, localcontext
from enum import StrEnum
from fractions import Fraction
from typing import Any

from gpumeter_usage.canonical import canonical_json
from gpumeter_usage.period import MINUTE_NS, from_rfc3339

HOUR_NS = Decimal(3_600 * 10**9)
AMOUNT_STEP = Decimal("0.000000000001")
"""A report's amounts keep 12 decimals: one GPU-microsecond at 0.01 an hour still shows. Invoices round once, later."""
STEPS_PER_UNIT = 10**12
PRECISION = 60
_FRACTION = re.compile(r"([1-9][0-9]{0,2})/([1-9][0-9]{0,2})")
_CURRENCY = re.compile(r"[A-Z]{3}")


class PlanInvalid(ValueError):
    """A price plan that cannot be used; the message is a sentence."""


class IdlePayer(StrEnum):
    """Who carries the idle time of a service; start, drain and unaccounted time are always the platform's."""

    PLATFORM = "platform"
    TENANT = "tenant"
    OWNER = "owner"


@dataclass(frozen=True, slots=True)
class Rate:
    """The price of one GPU of a class for one hour, from a time on.

    Either `per_gpu_hour` is the price, or `fraction` of the price of the class `of` is: a MIG profile's.
    """

    gpu_class: str
    per_gpu_hour: Decimal
    effective_from_ns: int
    of: str = ""
    fraction: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class StandardRate:
    """The prices of 1,000 tokens of a model, from a time on."""

    model: str
    prompt: Decimal
    cached: Decimal
    completion: Decimal
    effective_from_ns: int

    def of_tokens(self, prompt: int, cached: int, completion: int) -> Fraction:
        """Tokens at these prices, exactly; `cached` is a part of `prompt`. All may be negative."""
        prices = (prompt - cached, self.prompt), (cached, self.cached), (completion, self.completion)
        return sum((number * Fraction(each) for number, each in prices), Fraction(0)) / 1000


@dataclass(frozen=True, slots=True)
class HourPrice:
    """What an hour of one GPU of a class costs: `whole`, or `fraction` of it where the class is a slice."""

    whole: Decimal
    fraction: Fraction = Fraction(1)

    def of_time(self, gpu_ns: int) -> Fraction:
        """GPU time at this price, exactly; `gpu_ns` may be negative."""
        return gpu_ns * Fraction(self.whole) * self.fraction / Fraction(HOUR_NS)


@dataclass(frozen=True, slots=True)
class PricePlan:
    """One version of a price plan; `hash` is the SHA-256 of the canonical JSON of its spec."""

    name: str
    version: int
    currency: str
    rates: tuple[Rate, ...]
    hash: str
    standard_rates: tuple[StandardRate, ...] = ()
    idle_payer: IdlePayer = IdlePayer.PLATFORM

    def rate(self, gpu_class: str, at_ns: int) -> Rate | None:
        """The rate of a class for what ends right after a time: of those whose effectiveFrom is past, the last."""
        in_force = [rate for rate in self.rates if rate.gpu_class == gpu_class and rate.effective_from_ns <= at_ns]
        return max(in_force, key=lambda rate: rate.effective_from_ns, default=None)

    def hour_price(self, gpu_class: str, at_ns: int) -> HourPrice | None:
        """The price of an hour of one GPU of a class at a time. A slice never falls back to the price of a whole."""
        rate = self.rate(gpu_class, at_ns)
        if rate is None or not rate.of:
            return None if rate is None else HourPrice(rate.per_gpu_hour)
        whole = self.rate(rate.of, at_ns)
        return None if whole is None else HourPrice(whole.per_gpu_hour, rate.fraction)

    def standard_rate(self, model: str, at_ns: int) -> StandardRate | None:
        """The prices of a model's tokens at a time."""
        in_force = [rate for rate in self.standard_rates if rate.model == model and rate.effective_from_ns <= at_ns]
        return max(in_force, key=lambda rate: rate.effective_from_ns, default=None)

    @property
    def edges_ns(self) -> frozenset[int]:
        """When any price of this version changes."""
        of_time = {rate.effective_from_ns for rate in self.rates}
        return frozenset(of_time | {rate.effective_from_ns for rate in self.standard_rates})


class BillingMode(StrEnum):
    """What a tenant's amount is reckoned from."""

    MEASURED = "measured"
    STANDARD_RATE = "standardRate"


@dataclass(frozen=True, slots=True)
class Terms:
    """How a service is billed, as its InferenceService said when the period was opened. `owner` is the tenant to whom
    it is dedicated ("" for none)."""

    billing_mode: BillingMode = BillingMode.MEASURED
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Version:
    """What was known of a price plan from a time on: a plan, or a sentence why there is none that can be used.

    `terms` are those of the closed period to which a late fact belongs; None: those of the period itself.
    """

    from_ns: int
    plan: PricePlan | None
    problem: str = ""
    terms: Terms | None = None


@dataclass(frozen=True, slots=True)
class PeriodPlan:
    """The price plan of one period: `plan` is its version when the period was opened (None where there was no usable
    one), as it stood at `as_of_ns`: the period's start, or later where nothing was known of the plan by then.

    `versions` are all that matter for what is booked in the period, ascending, the first since the period's start or,
    where late facts are booked in it, since the start of the earliest period that they belong to. Empty: `plan` alone.
    """

    name: str
    plan: PricePlan | None
    as_of_ns: int = 0
    versions: tuple[Version, ...] = ()
    terms: Terms = Terms()


def canonical_spec(spec: Mapping[str, Any]) -> bytes:
    """The bytes that are hashed and kept: sorted keys, no spaces."""
    return canonical_json(spec)


def plan_from(name: str, version: int, spec_bytes: bytes) -> PricePlan:
    """Read a plan from the canonical bytes of its spec. Raises PlanInvalid with all that is wrong."""
    problems: list[str] = []
    spec = json.loads(spec_bytes)
    rates = _read_each(spec, "rates", _rate, problems)
    standard_rates = _read_each(spec, "standardRates", _standard_rate, problems)
    problems += _contradictions(rates, standard_rates)
    idle_payer = spec.get("idlePayer", IdlePayer.PLATFORM.value)
    if idle_payer not in IdlePayer.__members__.values():
        problems.append(f"spec.idlePayer is {idle_payer!r:.40}; write platform, tenant or owner")
    if not _CURRENCY.fullmatch(str(spec.get("currency", ""))):
        problems.append(f"spec.currency is {spec.get('currency', '')!r:.40}; write three capital letters, such as USD")
    if not rates and not problems:
        problems.append("spec.rates is empty")
    if problems:
        raise PlanInvalid(f"The price plan {name} cannot be used: {'; '.join(problems)}.")
    return PricePlan(
        name=name,
        version=version,
        currency=str(spec["currency"]),
        rates=tuple(sorted(rates, key=lambda rate: (rate.gpu_class, rate.effective_from_ns))),
        hash=hashlib.sha256(spec_bytes).hexdigest(),
        standard_rates=tuple(sorted(standard_rates, key=lambda rate: (rate.model, rate.effective_from_ns))),
        idle_payer=IdlePayer(idle_payer),
    )


def rounded(exact: Fraction) -> Decimal:
    """The one rounding: to 12 decimals, half to even."""
    with localcontext() as context:
        context.prec = PRECISION  # the default of 28 digits would round a second time
        return Decimal(round(exact * STEPS_PER_UNIT)).scaleb(-12)


def sum_of_amounts(amounts: Iterable[Decimal]) -> Decimal:
    """Add up published amounts exactly: what a day costs is the sum of what its hours were published to cost.

    An hour's amount is rounded once, when it is made; nothing is rounded again above it. So an accountant who adds up
    the published amounts of the hours gets the day's, and of the days the month's, to the last digit.
    """
    with localcontext() as context:
        context.prec = PRECISION
        return sum(amounts, Decimal(0))


def per_thousand(amount: Decimal, tokens: int) -> Decimal:
    """The price of 1,000 tokens, as measured."""
    with localcontext() as context:
        context.prec = PRECISION
        return (amount * 1000 / tokens).quantize(AMOUNT_STEP, ROUND_HALF_EVEN)


def plain(value: Decimal) -> str:
    """A decimal as reports write it: no exponent, no trailing zeros, never -0."""
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _read_each(spec: Mapping[str, Any], name: str, read: Any, problems: list[str]) -> list[Any]:
    found = []
    for index, item in enumerate(spec.get(name) or []):
        where = f"spec.{name}[{index}]"
        try:
            found.append(read(item, where, problems))
        except (KeyError, TypeError, ValueError, InvalidOperation) as error:
            problems.append(f"{where} cannot be read ({error!r})")
    return found


def _rate(item: Mapping[str, Any], where: str, problems: list[str]) -> Rate:
    effective_from_ns = _effective_from(item, where, problems)
    gpu_class = str(item["gpuClass"])
    if "perGpuHour" in item and ("of" in item or "fraction" in item):
        problems.append(f"{where} has perGpuHour and a fraction of another class; keep one of them")
    if "perGpuHour" in item:
        return Rate(gpu_class, _price(item, "perGpuHour", where, problems), effective_from_ns)
    parts = _FRACTION.fullmatch(str(item["fraction"]))
    if parts is None or int(parts[1]) >= int(parts[2]):
        problems.append(f"{where}.fraction is {item['fraction']!r:.40}; write a part of one GPU, such as 1/7")
        return Rate(gpu_class, Decimal(0), effective_from_ns, str(item["of"]))
    return Rate(gpu_class, Decimal(0), effective_from_ns, str(item["of"]), Fraction(int(parts[1]), int(parts[2])))


def _standard_rate(item: Mapping[str, Any], where: str, problems: list[str]) -> StandardRate:
    prompt = _price(item, "perThousandPromptTokens", where, problems)
    cached = _price(item, "perThousandCachedTokens", where, problems) if "perThousandCachedTokens" in item else prompt
    completion = _price(item, "perThousandCompletionTokens", where, problems)
    return StandardRate(str(item["model"]), prompt, cached, completion, _effective_from(item, where, problems))


def _price(item: Mapping[str, Any], name: str, where: str, problems: list[str]) -> Decimal:
    if not isinstance(item[name], str):
        problems.append(f"{where}.{name} is the number {item[name]}; write a price as text, for a number loses digits")
        return Decimal(0)
    price = Decimal(item[name])
    if not price.is_finite() or price < 0:
        problems.append(f"{where}.{name} is {item[name]}; a price is not negative")
    return price


def _effective_from(item: Mapping[str, Any], where: str, problems: list[str]) -> int:
    text = item.get("effectiveFrom", "1970-01-01T00:00:00Z")
    at_ns = from_rfc3339(text)
    if at_ns % MINUTE_NS:
        problems.append(f"{where}.effectiveFrom is {text}; records are cut at whole minutes, so write one")
    return at_ns


def _contradictions(rates: list[Rate], standard_rates: list[StandardRate]) -> list[str]:
    problems = []
    if len({(rate.gpu_class, rate.effective_from_ns) for rate in rates}) != len(rates):
        problems.append("two rates of one gpuClass begin at the same time")
    if len({(rate.model, rate.effective_from_ns) for rate in standard_rates}) != len(standard_rates):
        problems.append("two standard rates of one model begin at the same time")
    for rate in rates:
        wholes = [other for other in rates if rate.of and other.gpu_class == rate.of]
        if rate.of and (not wholes or any(whole.of for whole in wholes)):
            problems.append(f"{rate.gpu_class} costs a fraction of {rate.of}, which has no perGpuHour of its own")
    return problems
