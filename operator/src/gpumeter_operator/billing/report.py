"""UsageReports: what each tenant used of a service in a period, as manifests.

Owns the fold of a (service, period) into one report a tenant and the platform's own, and the names of reports. Pure:
the same facts give the same bytes, in whatever order they come. Does not know how reports are kept or published.

What a report's gpuNanoseconds is: for a tenant, the sum of its sessions' shares of measured steps. For `_platform`,
`allocated - attributed`: everything that Kubernetes gave and no tenant used (start, load, warm-up, idle, drain, and
what is unaccounted). So the reports of a service for a period add up to what was allocated to it, to the nanosecond.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from hashlib import sha256
from typing import Any

from gpumeter_operator.billing.accounts import Accounts, PodAccounts
from gpumeter_operator.billing.charges import Bill, PodStretch, Priced, bills, price, whole_parts
from gpumeter_operator.billing.close import Phase, Verdict
from gpumeter_operator.billing.energy import energy_mj
from gpumeter_operator.billing.facts import PLATFORM, Adjustment, Correction, Line, Worker, sum_of_stated
from gpumeter_operator.billing.statement import counted, statement
from gpumeter_operator.billing.tariff import PeriodPlan, plain
from gpumeter_operator.decide.names import (
    API_VERSION,
    GRANULARITY_LABEL,
    MANAGED_BY,
    MANAGED_BY_LABEL,
    PHASE_LABEL,
    SERVICE_LABEL,
    TENANT_LABEL,
)
from gpumeter_usage.canonical import canonical_json
from gpumeter_usage.period import SECOND_NS, Granularity, Period, rfc3339
from gpumeter_usage.record import Account, Kind
from gpumeter_usage.tenant import RESERVED_TENANT

MAX_RANGES = 4096
MAX_MISSING = 1024
"""What the UsageReport's schema holds; the ledger holds the rest."""

RECONCILED_PER_MILLE = 1
"""|unaccounted| may be up to one thousandth of what was allocated."""

MAX_ADJUSTMENTS = 256
ACCOUNT_FIELDS = {name: name for name in Accounts.__dataclass_fields__} | {"host_gap": "hostGap"}

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PodPeriod:
    """One pod's share of a period: its accounts and the sums of its records."""

    worker: Worker
    booked: PodAccounts
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class ServicePeriod:
    """All that the reports of a service for a period are made of.

    `digests` holds, by owner, the digest of its records (see `digest_of`); empty while the period runs. `adjustments`
    are what of earlier, closed periods is booked here, `corrections` what somebody found wrong with their reports.
    `parts` are the pods by stretch of one price; None where the whole period is one.
    """

    namespace: str
    service: str
    period: Period
    verdict: Verdict
    pods: tuple[PodPeriod, ...]
    plan: PeriodPlan
    digests: Mapping[str, str]
    adjustments: tuple[Adjustment, ...] = ()
    parts: tuple[PodStretch, ...] | None = None
    corrections: tuple[Correction, ...] = ()


def reports(of: ServicePeriod) -> tuple[Manifest, ...]:
    """One report a tenant that used anything, pays for idle time or is corrected, and the platform's; ordered by
    tenant."""
    parts = of.parts
    if parts is None:
        whole = ((pod.worker, pod.booked.accounts.allocated, pod.lines) for pod in of.pods)
        parts = whole_parts(whole, of.plan, of.period)
    found = bills(parts, of.plan, of.period, of.corrections)
    energy = energy_mj(pod.lines for pod in of.pods)
    tenants = {line.owner for pod in of.pods for line in pod.lines} | found.keys()
    return tuple(_report(of, tenant, found.get(tenant, Bill()), energy.get(tenant)) for tenant in sorted(tenants))


def report_name(service: str, tenant: str, period: Period) -> str:
    """The name of a report. Dashes in the tenant are doubled, so no two (service, tenant) pairs can share a name:
    read from the right, the first single dash before the period is the separator."""
    written = RESERVED_TENANT if tenant == PLATFORM else tenant.replace("-", "--")
    return f"{service}-{written}-{period.label}"


def digest_of(hashes: Iterable[str]) -> str:
    """SHA-256 over the records' hashes (hex, in the order of their keys), without separators."""
    digest = sha256()
    for each in hashes:
        digest.update(each.encode())
    return digest.hexdigest()


def canonical_report(manifest: Manifest) -> bytes:
    """The bytes of a report as the ledger keeps them: sorted keys, no spaces."""
    return canonical_json(manifest)


def envelope(service: tuple[str, str], tenant: str, period: Period, phase: Phase, status: Manifest) -> Manifest:
    """A report of a service (namespace, name) with this status: its name, labels and spec."""
    namespace, name = service
    return {
        "apiVersion": API_VERSION,
        "kind": "UsageReport",
        "metadata": {
            "name": report_name(name, tenant, period),
            "namespace": namespace,
            "labels": {
                MANAGED_BY_LABEL: MANAGED_BY,
                SERVICE_LABEL: name,
                TENANT_LABEL: RESERVED_TENANT if tenant == PLATFORM else tenant,
                GRANULARITY_LABEL: period.granularity.value,
                PHASE_LABEL: phase.value,
            },
        },
        "spec": {
            "tenant": tenant,
            "serviceRef": {"name": name},
            "period": {
                "start": rfc3339(period.start_ns),
                "end": rfc3339(period.end_ns),
                "granularity": period.granularity.value,
            },
        },
        "status": {**status, "period": _shown(period)},
    }


def _shown(period: Period) -> str:
    lengths = {Granularity.DAY: len("2026-11-21"), Granularity.MONTH: len("2026-11")}
    return rfc3339(period.start_ns)[: lengths.get(period.granularity)]


def mean_batch(batch_ns: int, used_ns: int) -> str:
    """The mean number of sequences in the steps of which these nanoseconds are shares, to three decimals."""
    return plain((Decimal(batch_ns) / Decimal(used_ns)).quantize(Decimal("0.001"), ROUND_HALF_EVEN))


def joules(energy_mj: int) -> str:
    """Millijoules as a report says them."""
    return plain(Decimal(energy_mj).scaleb(-3))


def _report(of: ServicePeriod, tenant: str, bill: Bill, drawn_mj: int | None) -> Manifest:
    status = _status(of, tenant, bill)
    if drawn_mj is not None:
        status["energyJoules"] = joules(drawn_mj)
    found = envelope((of.namespace, of.service), tenant, of.period, of.verdict.phase, status)
    if (plan := of.plan.plan) is not None:
        found["spec"] |= {"pricePlanRef": {"name": plan.name, "version": plan.version}, "pricePlanHash": plan.hash}
    return found


def _status(of: ServicePeriod, tenant: str, bill: Bill) -> Manifest:
    own = [line for pod in of.pods for line in pod.lines if line.owner == tenant]
    used = [line for line in own if line.kind is Kind.SESSION and line.account == Account.ATTRIBUTED]
    total = sum((pod.booked.accounts for pod in of.pods), Accounts())
    gpu_ns = bill.gpu_ns
    prompt = sum(line.prompt_tokens for line in used)
    completion = sum(line.completion_tokens for line in used)
    priced = price(bill, of.plan, of.period)
    batch_ns = sum(line.batch_ns for line in used)
    status: Manifest = {
        "phase": of.verdict.phase.value,
        "gpuNanoseconds": str(gpu_ns),
        "gpuSeconds": plain(Decimal(gpu_ns) / SECOND_NS),
        "prefillGpuNanoseconds": str(sum(line.prefill_ns for line in used)),
        "decodeGpuNanoseconds": str(sum(line.decode_ns for line in used)),
        "batchNanoseconds": str(batch_ns),
        "sessions": sum(line.sessions for line in used),
        "tokens": {
            "prompt": prompt,
            "cached": sum(line.cached_tokens for line in used),
            "completion": completion,
            "total": prompt + completion,
        },
        "recordCount": sum(line.records for line in own),
        "seqRanges": _ranges(own),
        "completeness": _completeness(of.verdict),
        "conditions": _conditions(of, priced),
    }
    used_ns = sum(line.gpu_ns for line in used)
    if used_ns:
        status["meanBatchSize"] = mean_batch(batch_ns, used_ns)
    kv_byte_s = sum_of_stated(line.kv_byte_s for line in used)
    if kv_byte_s is not None:
        status["kvByteSeconds"] = str(kv_byte_s)
    # What became known late concerns whoever shares the service; of a correction only its two sides are told.
    corrected = [_correction(each) for each in of.corrections if tenant in (each.tenant, PLATFORM)]
    if booked := [*(_adjustment(each) for each in of.adjustments), *corrected]:
        status["adjustments"] = booked[:MAX_ADJUSTMENTS]
    if tenant == PLATFORM:
        status["accounts"] = {field: str(getattr(total, name)) for name, field in ACCOUNT_FIELDS.items()}
    status |= statement(of.plan, bill, priced, prompt + completion)
    if of.verdict.phase is Phase.FINAL:
        status["digest"] = of.digests.get(tenant, digest_of(()))
    return status


def _ranges(lines: Iterable[Line]) -> list[Manifest]:
    """First and last seq by boot. Between them stand records of others too; the digest tells which are its own."""
    ranges: dict[tuple[str, str], tuple[int, int]] = {}
    for line in lines:
        key = (line.worker_uid, line.boot_id)
        first, last = ranges.get(key, (line.first_seq, line.last_seq))
        ranges[key] = (min(first, line.first_seq), max(last, line.last_seq))
    return [
        {"workerUid": worker_uid, "bootId": boot_id, "first": first, "last": last}
        for (worker_uid, boot_id), (first, last) in sorted(ranges.items())
    ][:MAX_RANGES]


def _completeness(verdict: Verdict) -> Manifest:
    if verdict.phase is Phase.OPEN:
        return {"expectedWorkers": verdict.expected}
    missing = []
    for each in verdict.missing[:MAX_MISSING]:
        entry: Manifest = {
            "workerUid": each.worker_uid,
            "pod": each.pod,
            "reason": each.reason,
            "message": each.message[:1024],
        }
        if each.boot_id:
            entry["bootId"] = each.boot_id
        if each.since_ns:
            entry["since"] = rfc3339(each.since_ns)
        if each.first_seq:
            entry["first"] = each.first_seq
        if each.last_seq:
            entry["last"] = each.last_seq
        missing.append(entry)
    return {
        "expectedWorkers": verdict.expected,
        "reportedWorkers": verdict.expected - len(verdict.missing),
        "missing": missing,
    }


def _conditions(of: ServicePeriod, priced: Priced) -> list[Any]:
    # A transition time must be a fact, or the same ledger would give two reports: it is the edge of the period.
    at = rfc3339(of.period.start_ns if of.verdict.phase is Phase.OPEN else of.period.end_ns)

    def condition(kind: str, status: str, reason: str, message: str) -> Manifest:
        return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at}

    return [
        _complete(of, condition),
        _reconciled(of, condition),
        _measured(of, condition),
        condition("Priced", "False" if priced.amount is None else "True", priced.reason, priced.message),
    ]


def _complete(of: ServicePeriod, condition: Any) -> Any:
    verdict = of.verdict
    status = "Unknown" if verdict.phase is not Phase.FINAL else "True" if verdict.complete else "False"
    message = " ".join((verdict.message, *(each.reason for each in of.adjustments)))
    return condition("Complete", status, verdict.reason, message[:32_768])


def _reconciled(of: ServicePeriod, condition: Any) -> Any:
    problems = [problem for pod in of.pods for problem in pod.booked.problems]
    if problems and of.verdict.phase is not Phase.OPEN:  # in a running period a flush may be half here
        return condition("Reconciled", "False", "SlicesDisagree", "; ".join(problems)[:32_000] + ".")
    return condition("Reconciled", *reconciled([pod.booked.accounts for pod in of.pods]))


def reconciled(of_pods: Iterable[Accounts]) -> tuple[str, str, str]:
    """Status, reason and message of Reconciled, from the accounts of each pod: too much must not hide too little."""
    accounts = list(of_pods)
    total = sum(accounts, Accounts())
    residual_ns = sum(abs(pod.unaccounted) for pod in accounts)
    bound_ns = total.allocated * RECONCILED_PER_MILLE // 1000
    signed_ns = total.unaccounted
    in_sum = "" if signed_ns == residual_ns else f" without regard to sign, {signed_ns} ns in sum"
    bound = f"up to {bound_ns} ns (0.1 % of {total.allocated} ns allocated) may be."
    message = f"{residual_ns} ns are unaccounted{in_sum}; {bound}"
    if residual_ns <= bound_ns:
        return "True", "WithinBound", message
    return (
        "False",
        "UnaccountedTime",
        message + " Kubernetes states container times in whole seconds, so a start or an end leaves up to a second. "
        "A step that crosses the period's edge belongs to the period in which it ends: what it leaves in one, the "
        "next gives back.",
    )


def _adjustment(each: Adjustment) -> Manifest:
    entry: Manifest = {
        "originalPeriodEnd": rfc3339(each.closed_end_ns),
        "workerUid": each.worker_uid,
        "reason": each.word,
        "message": each.reason[:1024],
        "actor": each.actor,
        "allocatedNanoseconds": str(each.allocated_ns),
    }
    if each.first_seq:
        entry |= {"bootId": each.boot_id, "first": each.first_seq, "last": each.last_seq}
    return entry


def _correction(each: Correction) -> Manifest:
    of_time: Manifest = {"gpuNanoseconds": str(each.gpu_ns)}
    moved = of_time if each.tokens is None else {"model": each.model, "tokens": counted(each.tokens)}
    return {
        "originalPeriodEnd": rfc3339(each.closed_end_ns),
        "id": each.id,
        "tenant": each.tenant,
        "report": each.report,
        "reason": "Correction",
        "message": each.reason[:1024],
        "actor": each.actor,
        **moved,
        "pricePlan": {"name": each.plan_name, "version": each.plan_version, "hash": each.plan_hash},
    }


def _measured(of: ServicePeriod, condition: Any) -> Any:
    clocks = {line.clock for pod in of.pods for line in pod.lines}
    if "host" in clocks:
        return condition(
            "Measured",
            "False",
            "HostClock",
            "Steps were timed by the host's clock, because there is no GPU to time them.",
        )
    return condition("Measured", "True", "DeviceClock", "Steps were timed on the device.")
