"""Prices: what a price plan asks for GPU time.

Owns the reading of a PricePlan, its hash, and the one multiplication of GPU time by a price. Decimal all through; no
float comes near money. Does not know who used the time, and reads no clock.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation, localcontext
from typing import Any

from gpumeter_usage.period import from_rfc3339, rfc3339

HOUR_NS = Decimal(3_600 * 10**9)
AMOUNT_STEP = Decimal("0.000000000001")
"""A report's amounts keep 12 decimals: one GPU-microsecond at 0.01 an hour still shows. Invoices round once, later."""
PRECISION = 60


class PlanInvalid(ValueError):
    """A price plan that cannot be used; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Rate:
    """The price of one GPU of a class for one hour, from a time on."""

    gpu_class: str
    per_gpu_hour: Decimal
    effective_from_ns: int


@dataclass(frozen=True, slots=True)
class PricePlan:
    """One version of a price plan; `hash` is the SHA-256 of the canonical JSON of its spec."""

    name: str
    version: int
    currency: str
    rates: tuple[Rate, ...]
    hash: str

    def rate(self, gpu_class: str, at_ns: int) -> Rate | None:
        """The rate of a class in force at a time: of those whose effectiveFrom is past, the last."""
        in_force = [rate for rate in self.rates if rate.gpu_class == gpu_class and rate.effective_from_ns <= at_ns]
        return max(in_force, key=lambda rate: rate.effective_from_ns, default=None)


@dataclass(frozen=True, slots=True)
class PeriodPlan:
    """The price plan of one period: None where there was no usable one. It is as it stood at `as_of_ns`, which is the
    period's start, or later where nothing was known of the plan by then."""

    name: str
    plan: PricePlan | None
    as_of_ns: int = 0


def canonical_spec(spec: Mapping[str, Any]) -> bytes:
    """The bytes that are hashed and kept: sorted keys, no spaces."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def plan_from(name: str, version: int, spec_bytes: bytes) -> PricePlan:
    """Read a plan from the canonical bytes of its spec. Raises PlanInvalid with all that is wrong."""
    problems: list[str] = []
    rates: list[Rate] = []
    spec = json.loads(spec_bytes)
    for index, item in enumerate(spec.get("rates") or []):
        try:
            price = Decimal(item["perGpuHour"])
            effective_from_ns = from_rfc3339(item.get("effectiveFrom", "1970-01-01T00:00:00Z"))
        except (KeyError, TypeError, ValueError, InvalidOperation) as error:
            problems.append(f"spec.rates[{index}] cannot be read ({error!r})")
            continue
        if not price.is_finite() or price < 0:
            problems.append(f"spec.rates[{index}].perGpuHour is {item['perGpuHour']}; a price is not negative")
        rates.append(Rate(str(item.get("gpuClass", "")), price, effective_from_ns))
    if len({(rate.gpu_class, rate.effective_from_ns) for rate in rates}) != len(rates):
        problems.append("two rates of one gpuClass begin at the same time")
    if not rates and not problems:
        problems.append("spec.rates is empty")
    if problems:
        raise PlanInvalid(f"The price plan {name} cannot be used: {'; '.join(problems)}.")
    return PricePlan(
        name=name,
        version=version,
        currency=str(spec.get("currency", "")),
        rates=tuple(sorted(rates, key=lambda rate: (rate.gpu_class, rate.effective_from_ns))),
        hash=hashlib.sha256(spec_bytes).hexdigest(),
    )


@dataclass(frozen=True, slots=True)
class Priced:
    """An amount, or None with the reason and the sentence why there is none."""

    amount: Decimal | None
    reason: str
    message: str


def price(of: PeriodPlan, gpu_ns_by_class: Mapping[str, int], at_ns: int) -> Priced:
    """What GPU time costs at the rates in force at `at_ns`, to 12 decimals, half-even."""
    plan = of.plan
    if plan is None:
        return Priced(
            None,
            "NoPricePlan",
            f"There was no usable PricePlan named {of.name} when the period was opened; usage is reported without "
            f"amounts. Create it, and amounts begin with the next period.",
        )
    total = Decimal(0)
    with localcontext() as context:
        context.prec = PRECISION
        for gpu_class, gpu_ns in sorted(gpu_ns_by_class.items()):
            rate = plan.rate(gpu_class, at_ns)
            if rate is None:
                return Priced(
                    None,
                    "NoRate",
                    f"PricePlan {plan.name} (version {plan.version}) has no rate for gpuClass {gpu_class}; add one.",
                )
            total += gpu_ns * rate.per_gpu_hour / HOUR_NS
        amount = total.quantize(AMOUNT_STEP, ROUND_HALF_EVEN)
    # An older version may have been in force before, but nobody saw it.
    when = "when the period began" if of.as_of_ns <= at_ns else f"as it stood at {rfc3339(of.as_of_ns)}"
    return Priced(amount, "Priced", f"At the rates of PricePlan {plan.name} (version {plan.version}) {when}.")


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
