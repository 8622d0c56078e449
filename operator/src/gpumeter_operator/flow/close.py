"""Closes periods: gathers the facts of each service's open periods, lets billing decide, keeps what is Final.

Owns the order in which facts are read and a Final report is kept, so that no fact can slip in between unseen. Blocks on
the ledger; the caller keeps it off the event loop. Does not publish.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from gpumeter_operator.adapters.ledger import corrections, rollups
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.store import Ledger, ServiceName
from gpumeter_operator.billing.accounts import horizon_ns
from gpumeter_operator.billing.close import Phase, Verdict, after_earlier, decide
from gpumeter_operator.billing.lineage import chained
from gpumeter_operator.billing.report import Manifest, ServicePeriod, reports
from gpumeter_operator.billing.schedule import Schedule
from gpumeter_operator.billing.tariff import PeriodPlan, Terms
from gpumeter_operator.flow.folds import Folds
from gpumeter_operator.flow.periods import Facts, Fold, facts_of, open_periods, pod_period
from gpumeter_operator.flow.pricing import open_with_plan, parts_of
from gpumeter_operator.flow.rollup import Roller
from gpumeter_usage.period import Period, rfc3339

log = logging.getLogger(__name__)

DEFAULT_PLAN = "default"


@dataclass(frozen=True, slots=True)
class Pricing:
    """Which price plan each service names now, the hash of each plan as it stands now, and how services are billed."""

    plan_names: Mapping[ServiceName, str]
    plan_hashes: Mapping[str, str]
    terms: Mapping[ServiceName, Terms] = field(default_factory=dict)


class Closer:
    """Brings every service's periods up to date, one call a round."""

    def __init__(self, ledger: Ledger, grace_ns: int) -> None:
        self._ledger = ledger
        self._grace_ns = grace_ns
        self._roller = Roller(ledger)
        self._folds = Folds(ledger)
        self._kept: dict[ServiceName, set[tuple[int, Phase]]] = {}
        self._failing: set[ServiceName] = set()

    def close_all(self, pricing: Pricing, now_ns: int) -> list[Manifest]:
        """The reports of every period that is not closed, and of those that this round closed."""
        schedule = self._ledger.schedule()
        manifests: list[Manifest] = []
        for service in self._ledger.services():
            try:
                manifests += self.close_service(service, schedule, pricing, now_ns)
            except LedgerUnavailable:
                raise
            except Exception as surprise:
                # Whatever it is, it is this service's: the others are closed and published all the same.
                self._tell_failure(service, surprise, now_ns)
            else:
                self._failing.discard(service)
        return manifests

    def _tell_failure(self, service: ServiceName, surprise: Exception, now_ns: int) -> None:
        name = "/".join(service)
        message = f"The periods of {name} cannot be closed: {type(surprise).__name__}: {surprise}"
        if service in self._failing:
            log.error("%s", message)
            return
        self._failing.add(service)
        log.exception("%s", message)
        self._ledger.raise_alarm("CloseFailed", name, message, now_ns)

    def close_service(self, service: ServiceName, schedule: Schedule, pricing: Pricing, now_ns: int) -> list[Manifest]:
        """The same for one service: its closing periods, then the days and months that they belong to."""
        manifests: list[Manifest] = []
        waiting: Period | None = None
        unclosed = open_periods(self._ledger, service, schedule, now_ns)
        for period in tuple(unclosed):
            plan = self._plan(service, period, pricing, now_ns)
            facts, verdict = self._judge(service, period, waiting, now_ns, self._folds.lines)
            if verdict.phase is Phase.FINAL:
                made_from = self._ledger.facts_version(*service, period.end_ns)  # read before anything that it counts
                if open_periods(self._ledger, service, schedule, now_ns)[:1] != [period]:
                    break  # something was booked in a period before this one meanwhile, which has its turn first
                plan = self._ledger.period_plan(*service, period.end_ns) or plan
                facts, verdict = self._judge(service, period, waiting, now_ns, None)
            pods, _, adjustments = facts
            final = verdict.phase is Phase.FINAL
            horizons = [horizon_ns(pod, period, now_ns, final=final) for pod in pods]
            of_pods = tuple(pod_period(pod, period, facts, horizons[index]) for index, pod in enumerate(pods))
            by_uid = {pod.worker.worker_uid: (pod, horizons[index]) for index, pod in enumerate(of_pods)}
            found = reports(
                ServicePeriod(
                    namespace=service[0],
                    service=service[1],
                    period=period,
                    verdict=verdict,
                    pods=of_pods,
                    plan=plan,
                    digests=self._ledger.digests(*service, period.end_ns) if final else {},
                    adjustments=tuple(adjustments),
                    parts=parts_of(self._ledger, service, period, plan, facts=facts, pods=by_uid),
                    corrections=corrections.of_service(self._ledger, *service, period.end_ns),
                )
            )
            if final:
                tenants = [each["spec"]["tenant"] for each in found]
                found = chained(found, rollups.previous_digests(self._ledger.engine, service, period, tenants))
                accounts = [(pod.worker.worker_uid, pod.booked.accounts) for pod in of_pods]
                kept = self._ledger.keep_final(
                    service, period, manifests=found, accounts=accounts, made_from=made_from, now_ns=now_ns
                )
                if not kept:
                    break  # a fact came in meanwhile: the next round folds it too
                self._kept.pop(service, None)
                self._folds.closed(service, period)
                unclosed.remove(period)
                log.info(
                    "%s/%s: the period that ended %s is Final: %s", *service, rfc3339(period.end_ns), verdict.message
                )
            else:
                waiting = waiting or period
                self._keep_phase(service, period, verdict, found, now_ns)
            manifests += found
        return manifests + self._roller.roll(service, schedule, unclosed, now_ns)

    def _judge(
        self, service: ServiceName, period: Period, waiting: Period | None, now_ns: int, fold: Fold | None
    ) -> tuple[Facts, Verdict]:
        pods, _, _ = facts = facts_of(self._ledger, service, period, fold)
        forks = self._ledger.forks([pod.worker.worker_uid for pod in pods], period.start_ns, period.end_ns)
        verdict = decide(period, pods, now_ns=now_ns, grace_ns=self._grace_ns, forks=forks)
        return facts, verdict if waiting is None else after_earlier(verdict, waiting)

    def _plan(self, service: ServiceName, period: Period, pricing: Pricing, now_ns: int) -> PeriodPlan:
        # A deleted service keeps plan and terms of its last period: its last usage is priced as the rest was.
        name = pricing.plan_names.get(service) or self._ledger.last_plan_name(*service) or DEFAULT_PLAN
        plan_hash, terms = pricing.plan_hashes.get(name, ""), pricing.terms.get(service)
        opened = open_with_plan(
            self._ledger, service, period, name=name, now_hash=plan_hash, terms=terms, now_ns=now_ns
        )
        return opened or PeriodPlan(DEFAULT_PLAN, None)

    def _keep_phase(
        self, service: ServiceName, period: Period, verdict: Verdict, found: tuple[Manifest, ...], now_ns: int
    ) -> None:
        kept = self._kept.setdefault(service, set())
        if (period.end_ns, verdict.phase) not in kept:
            self._ledger.keep_reports(found, period, now_ns)
            kept.add((period.end_ns, verdict.phase))
