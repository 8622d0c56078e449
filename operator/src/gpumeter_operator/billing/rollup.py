"""Days and months: the reports of shorter periods, added up.

Owns what becomes of each field when reports are added, and when such a sum is closed. A day is made of the service's
closing periods, a month of its days. Pure: the same reports give the same bytes, in whatever order they come. Never
reads a record: what a day says is what its hours say, so that they add up exactly, amounts included.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from gpumeter_operator.billing.accounts import Accounts
from gpumeter_operator.billing.close import SETTLE_NS, Phase
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.report import (
    ACCOUNT_FIELDS,
    MAX_ADJUSTMENTS,
    MAX_MISSING,
    MAX_RANGES,
    Manifest,
    digest_of,
    envelope,
    joules,
    mean_batch,
    reconciled,
)
from gpumeter_operator.billing.tariff import per_thousand, plain, sum_of_amounts
from gpumeter_usage.period import SECOND_NS, Period, from_rfc3339, rfc3339

MAX_PLANS = 64
_COUNTS = ("gpuNanoseconds", "prefillGpuNanoseconds", "decodeGpuNanoseconds", "batchNanoseconds")
_AMOUNTS = ("amount", "packageDeduction", "amountDue", "standardRateDifference")
_ENERGY, _HELD = "energyJoules", "kvByteSeconds"
_IDLE = "idleGpuNanoseconds"
_ADJUSTED = "adjustedGpuNanoseconds"
_MEASURED = "measuredAmount"

Keyed = tuple[str, str, Manifest]
"""An entry of a list, behind what orders it: the period that it is about, and all that it says."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one tenant's reports of some periods say together. Adding parts in any order gives the same."""

    periods: int = 0
    complete: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    stated: Mapping[str, int] = field(default_factory=dict)  # millijoules and byte-seconds, where a period states them
    tokens: Mapping[str, int] = field(default_factory=dict)
    sessions: int = 0
    records: int = 0
    accounts: Mapping[str, int] = field(default_factory=dict)
    amounts: Mapping[str, Decimal] = field(default_factory=dict)
    standard: bool = False  # whether a period was billed by standard rates, so that its measured amount is another
    currencies: frozenset[str] = frozenset()
    unpriced: int = 0
    unpriced_first: tuple[int, str, str] | None = None  # start, reason and message of the first without an amount
    plans: frozenset[tuple[str, int, str]] = frozenset()
    ranges: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    digests: tuple[tuple[int, str], ...] = ()
    missing: tuple[Keyed, ...] = ()
    adjustments: tuple[Keyed, ...] = ()
    disagree: tuple[int, str] | None = None  # start and message of the first whose cross-checks failed
    unmeasured: tuple[int, str, str] | None = None  # start, reason, message


@dataclass(frozen=True, slots=True)
class RollUp:
    """When a day or month is closed: `phase`, and why in a word and a sentence."""

    phase: Phase
    reason: str
    message: str


def decide_rollup(period: Period, unclosed: Sequence[Period], *, now_ns: int) -> RollUp:
    """Decide the phase of a day or month of which these shorter periods are not Final yet."""
    what = period.granularity.value.lower()
    if now_ns < period.end_ns + SETTLE_NS:
        message = f"The {what} runs until {rfc3339(period.end_ns)}; it holds the periods that are Final so far."
        return RollUp(Phase.OPEN, "PeriodRunning", message)
    if unclosed:
        first = min(unclosed)
        count = "1 period" if len(unclosed) == 1 else f"{len(unclosed)} periods"
        message = f"Waiting for {count} of the {what}, first for that which ended {rfc3339(first.end_ns)}."
        return RollUp(Phase.CLOSING, "WaitingForPeriods", message)
    return RollUp(Phase.FINAL, "AllPeriodsFinal", f"All periods of the {what} are Final.")


def part_of(report: Manifest) -> Part:
    """One report as a sum of one."""
    spec, status = report["spec"], report["status"]
    start_ns = from_rfc3339(spec["period"]["start"])
    conditions = {each["type"]: each for each in status["conditions"]}
    completeness, priced = status.get("completeness") or {}, conditions["Priced"]
    periods = completeness.get("periods", 1)
    # What used nothing costs nothing, under whatever plan: an hour before the first plan must not hide a day's amount.
    free = "amount" not in status and status["gpuNanoseconds"] == "0"
    unpriced = "amount" not in status and not free
    plans = {(each["name"], each.get("version", 0), each.get("hash", "")) for each in status.get("pricePlans") or ()}
    versions = status.get("pricePlanVersions") or ()
    plans |= {(each["name"], each.get("version", 0), each.get("hash", "")) for each in versions}
    if (plan := spec.get("pricePlanRef")) is not None:
        plans.add((plan["name"], plan.get("version", 0), spec.get("pricePlanHash", "")))
    reconciled_, measured = conditions["Reconciled"], conditions["Measured"]
    return Part(
        periods=periods,
        complete=completeness.get("completePeriods", int(conditions["Complete"]["status"] == "True")),
        counts={name: int(status.get(name, "0")) for name in (*_COUNTS, _IDLE, _ADJUSTED)},
        stated=_stated(status),
        tokens=status["tokens"],
        sessions=status["sessions"],
        records=status["recordCount"],
        accounts={name: int(text) for name, text in (status.get("accounts") or {}).items()},
        amounts=_amounts(status),
        standard=_MEASURED in status,
        currencies=frozenset({status["currency"]} if "amount" in status else ()),
        unpriced=int(unpriced),
        unpriced_first=(start_ns, priced["reason"], priced["message"]) if unpriced else None,
        plans=frozenset(plans),
        ranges={(each["workerUid"], each["bootId"]): (each["first"], each["last"]) for each in status["seqRanges"]},
        digests=((start_ns, status["digest"]),) if "digest" in status else (),
        missing=_keyed({"period": spec["period"]["start"], **each} for each in completeness.get("missing") or ()),
        adjustments=_keyed(status.get("adjustments") or ()),
        disagree=(start_ns, reconciled_["message"]) if reconciled_["reason"] == "SlicesDisagree" else None,
        unmeasured=(start_ns, measured["reason"], measured["message"]) if measured["status"] != "True" else None,
    )


def add(one: Part, other: Part) -> Part:
    """Both together."""
    return Part(
        periods=one.periods + other.periods,
        complete=one.complete + other.complete,
        counts=_added(one.counts, other.counts),
        stated=_added(one.stated, other.stated),
        tokens=_added(one.tokens, other.tokens),
        sessions=one.sessions + other.sessions,
        records=one.records + other.records,
        accounts=_added(one.accounts, other.accounts),
        amounts=_sums(one.amounts, other.amounts),
        standard=one.standard or other.standard,
        currencies=one.currencies | other.currencies,
        unpriced=one.unpriced + other.unpriced,
        unpriced_first=_first(one.unpriced_first, other.unpriced_first),
        plans=one.plans | other.plans,
        ranges=_spanned(one.ranges, other.ranges),
        digests=tuple(sorted((*one.digests, *other.digests))),
        missing=_least((*one.missing, *other.missing), MAX_MISSING),
        adjustments=_least((*one.adjustments, *other.adjustments), MAX_ADJUSTMENTS),
        disagree=_first(one.disagree, other.disagree),
        unmeasured=_first(one.unmeasured, other.unmeasured),
    )


def rolled_up(
    service: tuple[str, str],
    tenant: str,
    period: Period,
    of: Part,
    whole: Part,
    *,
    verdict: RollUp,
    pods: Mapping[str, Accounts] | None = None,
) -> Manifest:
    """The report of a tenant for a day or month, from its own reports `of` and the platform's `whole`.

    The platform has one in every period, so what holds for all (who is missing, how time was measured) is read there: a
    tenant whose only records are the lost ones must not be told that its day is complete. `pods` are the accounts of
    each of the service's pods over the whole period; they are needed once it is Final.
    """
    counts = of.counts
    gpu_ns, prompt_and_completion = counts.get("gpuNanoseconds", 0), of.tokens.get("total", 0)
    status: Manifest = {
        "phase": verdict.phase.value,
        **{name: str(counts.get(name, 0)) for name in _COUNTS},
        "gpuSeconds": plain(Decimal(gpu_ns) / SECOND_NS),
        "sessions": of.sessions,
        "tokens": {name: of.tokens.get(name, 0) for name in ("prompt", "cached", "completion", "total")},
        "recordCount": of.records,
        "seqRanges": [
            {"workerUid": uid, "bootId": boot_id, "first": first, "last": last}
            for (uid, boot_id), (first, last) in sorted(of.ranges.items())[:MAX_RANGES]
        ],
        "pricePlans": [
            {"name": name, **({"version": version} if version else {}), **({"hash": digest} if digest else {})}
            for name, version, digest in sorted(of.plans)[:MAX_PLANS]
        ],
        "completeness": _completeness(whole, verdict, pods),
        "conditions": _conditions(of, whole, period, verdict, pods),
    }
    if booked := _booked(tenant, of, whole):
        status["adjustments"] = [each for *_, each in booked]
    adjusted_ns = counts.get(_ADJUSTED, 0)
    # Of a tenant: the share of its time; of the platform: of what its own sessions used.
    used_ns = gpu_ns - adjusted_ns if tenant != PLATFORM else sum(counts.get(name, 0) for name in _COUNTS[1:3])
    if used_ns and counts.get("batchNanoseconds"):
        status["meanBatchSize"] = mean_batch(counts["batchNanoseconds"], used_ns)
    if tenant == PLATFORM:
        status["accounts"] = {name: str(of.accounts.get(name, 0)) for name in ACCOUNT_FIELDS.values()}
    if _ENERGY in of.stated:
        status[_ENERGY] = joules(of.stated[_ENERGY])
    if _HELD in of.stated:
        status[_HELD] = str(of.stated[_HELD])
    if idle_ns := counts.get(_IDLE, 0):
        status[_IDLE] = str(idle_ns)
    if adjusted_ns:
        status[_ADJUSTED] = str(adjusted_ns)
    if _priced(of)[0]:
        shown = {name: amount for name, amount in of.amounts.items() if of.standard or name != _MEASURED}
        status |= {name: plain(amount) for name, amount in shown.items()}
        status["currency"] = min(of.currencies)
        if prompt_and_completion:
            status["pricePerThousandTokens"] = plain(per_thousand(of.amounts[_MEASURED], prompt_and_completion))
    if verdict.phase is Phase.FINAL:
        status["digest"] = digest_of(digest for _, digest in of.digests)
    return envelope(service, tenant, period, verdict.phase, status)


def _booked(tenant: str, of: Part, whole: Part) -> tuple[Keyed, ...]:
    """What of earlier periods is booked: late facts stand in every report, a correction in those of its two sides."""
    if tenant == PLATFORM:
        return whole.adjustments
    late = [each for each in whole.adjustments if "tenant" not in each[2]]
    return _least((*late, *(each for each in of.adjustments if "tenant" in each[2])), MAX_ADJUSTMENTS)


def _stated(status: Manifest) -> dict[str, int]:
    found = {_ENERGY: int(Decimal(status[_ENERGY]).scaleb(3))} if _ENERGY in status else {}
    return found | ({_HELD: int(status[_HELD])} if _HELD in status else {})


def _amounts(status: Manifest) -> dict[str, Decimal]:
    """What was measured is the amount wherever standard rates did not make it another."""
    found = {name: Decimal(status[name]) for name in _AMOUNTS if name in status}
    if "amount" in found:
        found[_MEASURED] = Decimal(str(status.get(_MEASURED, status["amount"])))
    return found


def _completeness(whole: Part, verdict: RollUp, pods: Mapping[str, Accounts] | None) -> Manifest:
    found: Manifest = {"periods": whole.periods, "completePeriods": whole.complete}
    missing = [each for *_, each in whole.missing]
    if verdict.phase is Phase.FINAL and pods is not None:
        silent = {each["workerUid"] for each in missing}
        found |= {"expectedWorkers": len(pods), "reportedWorkers": len(pods.keys() - silent)}
    return found | {"missing": missing}


def _conditions(
    of: Part, whole: Part, period: Period, verdict: RollUp, pods: Mapping[str, Accounts] | None
) -> list[Manifest]:
    at = rfc3339(period.start_ns if verdict.phase is Phase.OPEN else period.end_ns)

    def condition(kind: str, status: str, reason: str, message: str) -> Manifest:
        return {"type": kind, "status": status, "reason": reason, "message": message[:32_768], "lastTransitionTime": at}

    priced, reason, message = _priced(of)
    return [
        condition("Complete", *_complete(whole, verdict)),
        condition("Reconciled", *_reconciled(whole, period, verdict, pods)),
        condition("Measured", *_measured(whole)),
        condition("Priced", str(priced), reason, message),
    ]


def _complete(of: Part, verdict: RollUp) -> tuple[str, str, str]:
    if verdict.phase is not Phase.FINAL:
        return "Unknown", verdict.reason, verdict.message
    if of.complete == of.periods:
        return "True", "AllPeriodsComplete", f"All {of.periods} periods are Final and complete."
    first = of.missing[0][2] if of.missing else {}
    reason = first.get("reason", "PeriodsIncomplete")
    message = (
        f"{of.periods - of.complete} of {of.periods} periods were closed without records of a worker; what is missing "
        "is unaccounted and billed to nobody."
    )
    if first:
        message += f" The first: {first.get('pod', first['workerUid'])} in the period from {first['period']}."
    return "False", reason, message


def _reconciled(of: Part, period: Period, verdict: RollUp, pods: Mapping[str, Accounts] | None) -> tuple[str, str, str]:
    if of.disagree is not None:
        start_ns, message = of.disagree
        return "False", "SlicesDisagree", f"In the period from {rfc3339(start_ns)}: {message}"
    if verdict.phase is not Phase.FINAL or pods is None:
        return "Unknown", verdict.reason, f"It is reckoned when the {period.granularity.value.lower()} is Final."
    return reconciled(pods.values())


def _measured(of: Part) -> tuple[str, str, str]:
    if of.unmeasured is None:
        return "True", "DeviceClock", "Steps were timed on the device."
    start_ns, reason, message = of.unmeasured
    return "False", reason, f"{message} So it was at least in the period from {rfc3339(start_ns)}."


def _priced(of: Part) -> tuple[bool, str, str]:
    if of.unpriced_first is not None:
        start_ns, reason, message = of.unpriced_first
        count = f"{of.unpriced} of the reports that it is the sum of {'has' if of.unpriced == 1 else 'have'}"
        told = f"{count} no amount, first that of the period from {rfc3339(start_ns)}, so there is no sum: {message}"
        return False, reason, told
    if len(of.currencies) > 1:
        names = " and ".join(sorted(of.currencies))
        return False, "CurrenciesDiffer", f"Its periods are priced in {names}; see their own reports."
    if not of.currencies:
        return False, "NothingPriced", "Nothing was used in it, and no price plan was there."
    return True, "Priced", "The sum of the amounts of its periods, each at the rates that held for it."


def _added(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted(one.keys() | other.keys())}


def _sums(one: Mapping[str, Decimal], other: Mapping[str, Decimal]) -> dict[str, Decimal]:
    nothing = Decimal(0)
    names = sorted(one.keys() | other.keys())
    return {name: sum_of_amounts((one.get(name, nothing), other.get(name, nothing))) for name in names}


def _spanned(
    one: Mapping[tuple[str, str], tuple[int, int]], other: Mapping[tuple[str, str], tuple[int, int]]
) -> dict[tuple[str, str], tuple[int, int]]:
    found = dict(one)
    for key, (first, last) in other.items():
        known = found.get(key, (first, last))
        found[key] = (min(known[0], first), max(known[1], last))
    return found


def _first(one: Any, other: Any) -> Any:
    return min((each for each in (one, other) if each is not None), default=None)


def _keyed(entries: Iterable[Manifest]) -> tuple[Keyed, ...]:
    return _least(((each.get("period", ""), json.dumps(each, sort_keys=True), each) for each in entries), MAX_MISSING)


def _least(entries: Iterable[Keyed], most: int) -> tuple[Keyed, ...]:
    # The least by what they say, so that it does not matter in which order more than fit were added.
    return tuple(sorted(entries, key=lambda keyed: keyed[:2])[:most])
