"""Finds the price plan of a service's period, and cuts what was booked in it into stretches of one price.

Owns the moment at which a period's plan and terms are fixed: when it is opened. Reads and keeps; what a stretch costs
is billing's.
"""

from collections.abc import Mapping
from typing import Any

from gpumeter_operator.adapters.ledger import prices
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.accounts import overlap_ns
from gpumeter_operator.billing.charges import PodStretch
from gpumeter_operator.billing.report import PodPeriod
from gpumeter_operator.billing.stretches import stretch_at, stretches
from gpumeter_operator.billing.tariff import BillingMode, PeriodPlan, Terms
from gpumeter_operator.flow.periods import Facts
from gpumeter_usage.period import Period

Service = tuple[str, str]


def open_with_plan(
    ledger: Ledger, service: Service, period: Period, *, name: str, now_hash: str, terms: Terms | None, now_ns: int
) -> PeriodPlan | None:
    """The plan of a period; the first call fixes it. `now_hash` is the plan's version now ("" for none), `terms` are
    those that the service states now (None where it is not there any more: those of its last period hold on)."""
    opened = ledger.period_plan(*service, period.end_ns)
    if opened is None:
        # After an outage a period is opened long after it began, and the plan may have changed since.
        seen = ledger.plan_in_force(name, period.start_ns, now_ns)
        prices.keep_terms(ledger.engine, service, period, terms or prices.last_terms(ledger.engine, service))
        ledger.open_period(service, period, name, now_hash if seen is None else seen, now_ns)
        opened = ledger.period_plan(*service, period.end_ns)
    return opened


def terms_of(service: Mapping[str, Any]) -> Terms:
    """How an InferenceService says that it is billed."""
    spec = service.get("spec") or {}
    modes = {mode.value: mode for mode in BillingMode}
    mode = modes.get(str((spec.get("metering") or {}).get("billingMode")), BillingMode.MEASURED)
    return Terms(mode, str((spec.get("pricing") or {}).get("owner") or ""))


def parts_of(
    reader: Reader,
    service: Service,
    period: Period,
    plan: PeriodPlan,
    *,
    facts: Facts,
    pods: Mapping[str, tuple[PodPeriod, int]],
) -> tuple[PodStretch, ...] | None:
    """The pods of a period by stretch, where it has several. `pods` holds, by uid, a pod's period and the time up to
    which its allocation is reckoned. None where the period is one stretch."""
    cut = stretches(plan, period)
    if len(cut) == 1:
        return None
    allocated_ns: dict[tuple[str, int], int] = {}
    candidates, _, adjustments = facts
    for pod in candidates:
        uid = pod.worker.worker_uid
        for stretch in cut:
            start_ns, end_ns = max(stretch.start_ns, period.start_ns), min(stretch.end_ns, pods[uid][1])
            in_it = overlap_ns(pod.spans, pod.worker.devices, start_ns, end_ns) if start_ns < end_ns else 0
            allocated_ns[uid, stretch.start_ns] = in_it
    for each in adjustments:
        if each.worker_uid in pods:
            allocated_ns[each.worker_uid, stretch_at(cut, each.closed_end_ns).start_ns] += each.allocated_ns
    parts = []
    for index, stretch in enumerate(cut):
        after_ns = None if index == 0 else stretch.start_ns
        until_ns = None if index == len(cut) - 1 else stretch.end_ns
        lines = reader.lines(*service, period.end_ns, after_ns=after_ns, until_ns=until_ns)
        for uid, (of_pod, _) in pods.items():
            own = tuple(line for line in lines if line.worker_uid == uid)
            parts.append(PodStretch(of_pod.worker, stretch, allocated_ns[uid, stretch.start_ns], own))
    return tuple(parts)
