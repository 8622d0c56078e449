"""The money of a report's status: its amounts, and the charges that they are the sum of.

Owns how charges are written. Reckons nothing that billing.charges did not.
"""

from typing import Any

from gpumeter_operator.billing.charges import Bill, Charge, ChargeKind, Priced
from gpumeter_operator.billing.facts import Tokens
from gpumeter_operator.billing.tariff import (
    BillingMode,
    PeriodPlan,
    PricePlan,
    per_thousand,
    plain,
    rounded,
)
from gpumeter_usage.period import rfc3339

MAX_CHARGES = 1024
MAX_VERSIONS = 64
"""What the UsageReport's schema holds; the ledger holds the rest."""


def statement(plan: PeriodPlan, bill: Bill, priced: Priced, tokens: int) -> dict[str, Any]:
    """The fields of a report's status that are about money; `tokens` is what its price per 1,000 is reckoned over."""
    found: dict[str, Any] = {}
    if bill.idle_ns:
        found["idleGpuNanoseconds"] = str(bill.idle_ns)
    if bill.corrected_ns:
        found["adjustedGpuNanoseconds"] = str(bill.corrected_ns)
    by_tokens = _by_tokens(bill, plan)
    if by_tokens:
        found["billingMode"] = BillingMode.STANDARD_RATE.value
    shown = [each for each in bill.charges if each.gpu_ns or each.kind not in _OF_TIME or each.corrects_tokens]
    charges = [_charge(charge, by_tokens=by_tokens) for charge in shown]
    if charges and any(charge.stretch.version.plan for charge in bill.charges):
        found["charges"] = charges[:MAX_CHARGES]
    if versions := _versions(bill, plan):
        found["pricePlanVersions"] = versions[:MAX_VERSIONS]
    if priced.amount is None:
        return found
    found["amount"] = found["amountDue"] = plain(priced.amount)
    found["currency"] = priced.currency
    if priced.measured is not None:
        found["measuredAmount"] = plain(priced.measured)
    if priced.difference is not None:
        found["standardRateDifference"] = plain(priced.difference)
    as_measured = priced.amount if priced.measured is None and not by_tokens else priced.measured
    if tokens and as_measured is not None:
        found["pricePerThousandTokens"] = plain(per_thousand(as_measured, tokens))
    return found


_OF_TIME = (ChargeKind.USAGE, ChargeKind.IDLE, ChargeKind.PLATFORM, ChargeKind.CORRECTION)


def _by_tokens(bill: Bill, plan: PeriodPlan) -> bool:
    """Whether anything on a bill is billed by tokens, but for corrections of other bills."""
    if not bill.charges:
        return plan.terms.billing_mode is BillingMode.STANDARD_RATE
    return any(charge.stretch.by_tokens for charge in bill.charges if not charge.corrects_tokens)


def _charge(charge: Charge, *, by_tokens: bool) -> dict[str, Any]:
    version = charge.stretch.version.plan
    found: dict[str, Any] = {"kind": charge.kind.value, "from": rfc3339(charge.stretch.start_ns)}
    if version is not None:
        found["planVersion"] = version.version
    # A service may have been billed otherwise when late time was used: this line is a part of the amount, too.
    if by_tokens and charge.kind is ChargeKind.USAGE and charge.counted:
        found["billingMode"] = BillingMode.MEASURED.value
    if charge.kind in _OF_TIME and not charge.corrects_tokens:
        found |= {"gpuClass": charge.of, "gpuNanoseconds": str(charge.gpu_ns)}
        if charge.price is not None:
            found["perGpuHour"] = plain(charge.price.whole)
            if charge.price.fraction != 1:
                found["fraction"] = str(charge.price.fraction)
    elif charge.kind is not ChargeKind.DIFFERENCE:
        found |= {"model": charge.of, "tokens": counted(charge.tokens)}
    if charge.exact is not None:
        found["amount"] = plain(rounded(charge.exact))
    return found


def counted(of: Tokens) -> dict[str, int]:
    """Tokens as a report states them."""
    total = of.prompt + of.completion
    return {"prompt": of.prompt, "cached": of.cached, "completion": of.completion, "total": total}


def _versions(bill: Bill, plan: PeriodPlan) -> list[dict[str, Any]]:
    """Which versions of which plans priced the bill, in the order of time; nothing where it is the one of the spec."""
    seen: dict[str, tuple[int, PricePlan]] = {}
    for charge in bill.charges:
        version = charge.stretch.version.plan
        if version is not None and version.hash not in seen:
            seen[version.hash] = (charge.stretch.start_ns, version)
    if not seen or (plan.plan is not None and seen.keys() == {plan.plan.hash}):
        return []
    return [
        {"name": version.name, "version": version.version, "hash": version.hash, "from": rfc3339(from_ns)}
        for from_ns, version in seen.values()
    ]
