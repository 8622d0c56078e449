"""Closes periods: gathers the facts of each service's open periods, lets billing decide, keeps what is Final.

Owns the order in which facts are read and a Final report is kept, so that no fact can slip in between unseen. Blocks on
the ledger; the caller keeps it off the event loop. Does not publish.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from gpumeter_operator.adapters.ledger.store import Ledger, ServiceName
from gpumeter_operator.billing.accounts import fold, horizon_ns
from gpumeter_operator.billing.close import Phase, Verdict, after_earlier, decide, lived_in
from gpumeter_operator.billing.facts import Adjustment, Line, Pod
from gpumeter_operator.billing.report import Manifest, PodPeriod, ServicePeriod, reports
from gpumeter_operator.billing.schedule import Schedule
from gpumeter_operator.billing.tariff import PricePlan
from gpumeter_usage.period import Period, rfc3339

log = logging.getLogger(__name__)

DEFAULT_PLAN = "default"


@dataclass(frozen=True, slots=True)
class Pricing:
    """Which price plan each service names now, and the hash of each plan as it stands now."""

    plan_names: Mapping[ServiceName, str]
    plan_hashes: Mapping[str, str]


class Closer:
    """Brings every service's periods up to date, one call a round."""

    def __init__(self, ledger: Ledger, grace_ns: int) -> None:
        self._ledger = ledger
        self._grace_ns = grace_ns
        self._kept: dict[ServiceName, set[tuple[int, Phase]]] = {}

    def close_all(self, pricing: Pricing, now_ns: int) -> list[Manifest]:
        """The reports of every period that is not closed, and of those that this round closed."""
        schedule = self._ledger.schedule()
        manifests: list[Manifest] = []
        for service in self._ledger.services():
            manifests += self.close_service(service, schedule, pricing, now_ns)
        return manifests

    def close_service(self, service: ServiceName, schedule: Schedule, pricing: Pricing, now_ns: int) -> list[Manifest]:
        """The same for one service."""
        manifests: list[Manifest] = []
        waiting: Period | None = None
        for period in self._open_periods(service, schedule, now_ns):
            made_from = self._ledger.facts_version(*service, period.end_ns)  # read before anything that it counts
            plan_name, plan = self._plan(service, period, pricing, now_ns)
            pods, lines, adjustments = self._facts(service, period)
            forks = self._ledger.forks([pod.worker.worker_uid for pod in pods], period.start_ns, period.end_ns)
            verdict = decide(period, pods, now_ns=now_ns, grace_ns=self._grace_ns, forks=forks)
            if waiting is not None:
                verdict = after_earlier(verdict, waiting)
            final = verdict.phase is Phase.FINAL
            of_pods = tuple(
                _pod_period(pod, period, lines, adjustments, horizon_ns(pod, period, now_ns, final=final))
                for pod in pods
            )
            found = reports(
                ServicePeriod(
                    namespace=service[0],
                    service=service[1],
                    period=period,
                    verdict=verdict,
                    pods=of_pods,
                    plan=plan,
                    plan_name=plan_name,
                    digests=self._ledger.digests(*service, period.end_ns) if final else {},
                    late=tuple(adjustment.reason for adjustment in adjustments),
                )
            )
            if final:
                accounts = [(pod.worker.worker_uid, pod.booked.accounts) for pod in of_pods]
                kept = self._ledger.keep_final(
                    service, period, manifests=found, accounts=accounts, made_from=made_from, now_ns=now_ns
                )
                if not kept:
                    break  # a fact came in meanwhile: the next round folds it too
                self._kept.pop(service, None)
                log.info(
                    "%s/%s: the period that ended %s is Final: %s", *service, rfc3339(period.end_ns), verdict.message
                )
            else:
                waiting = waiting or period
                self._keep_phase(service, period, verdict, found, now_ns)
            manifests += found
        return manifests

    def _open_periods(self, service: ServiceName, schedule: Schedule, now_ns: int) -> list[Period]:
        """Every period after the last Final one that was opened, or in which a container ran or something is booked."""
        final_ns = self._ledger.last_final_ns(*service)
        found: set[Period] = set()
        for pod in self._ledger.pods(*service, final_ns):
            for span in pod.spans:
                end_ns = now_ns if span.ended_ns is None else span.ended_ns
                found |= set(schedule.between(max(final_ns, span.started_ns), end_ns))
        booked, opened = (ends(*service, final_ns) for ends in (self._ledger.booked_ends, self._ledger.opened_ends))
        # A container may turn out to have ended in the second in which it started. The period that was opened for it
        # holds nothing then, and must be closed all the same.
        found |= {schedule.period_of(end_ns) for end_ns in (*booked, *opened)}
        return sorted(found)

    def _facts(self, service: ServiceName, period: Period) -> tuple[list[Pod], list[Line], list[Adjustment]]:
        # The pods first: that a pod is settled must be older than the records that are read after it.
        candidates = self._ledger.pods(*service, period.start_ns)
        lines = list(self._ledger.lines(*service, period.end_ns))
        adjustments = self._ledger.adjustments(*service, period.end_ns)
        booked = {line.worker_uid for line in lines} | {adjustment.worker_uid for adjustment in adjustments}
        pods = [pod for pod in candidates if pod.worker.worker_uid in booked or lived_in(pod, period)]
        return pods, lines, adjustments

    def _plan(
        self, service: ServiceName, period: Period, pricing: Pricing, now_ns: int
    ) -> tuple[str, PricePlan | None]:
        opened = self._ledger.period_plan(*service, period.end_ns)
        if opened is None:
            # A deleted service keeps the plan of its last period: its last usage is priced as the rest was.
            name = pricing.plan_names.get(service) or self._ledger.last_plan_name(*service) or DEFAULT_PLAN
            self._ledger.open_period(service, period, name, pricing.plan_hashes.get(name, ""), now_ns)
            opened = self._ledger.period_plan(*service, period.end_ns)
        return opened or (DEFAULT_PLAN, None)

    def _keep_phase(
        self, service: ServiceName, period: Period, verdict: Verdict, found: tuple[Manifest, ...], now_ns: int
    ) -> None:
        kept = self._kept.setdefault(service, set())
        if (period.end_ns, verdict.phase) not in kept:
            self._ledger.keep_reports(found, period, now_ns)
            kept.add((period.end_ns, verdict.phase))


def _pod_period(pod: Pod, period: Period, lines: list[Line], adjustments: list[Adjustment], until_ns: int) -> PodPeriod:
    uid = pod.worker.worker_uid
    own = tuple(line for line in lines if line.worker_uid == uid)
    adjusted_ns = sum(adjustment.allocated_ns for adjustment in adjustments if adjustment.worker_uid == uid)
    return PodPeriod(pod.worker, fold(pod, period, own, until_ns=until_ns, adjusted_ns=adjusted_ns), own)
