"""What tenants are billed over a span of periods, and what measured time costs by itself.

Owns the two ways to an amount: of a tenant and a service all figures are those of the reports, as they are kept, or as
those of periods that are not Final would be made now; of anything finer, which no report knows, the amount is the price
of each slice at the version and the rate of its stretch. Reads, changes nothing.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from gpumeter_operator.adapters.ledger import corrections
from gpumeter_operator.adapters.ledger import usage as kept
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.usage import Asked, Sum
from gpumeter_operator.billing.accounts import horizon_ns
from gpumeter_operator.billing.close import Phase, Verdict
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.report import Manifest, ServicePeriod, reports
from gpumeter_operator.billing.stretches import Stretch, stretch_at, stretches
from gpumeter_operator.billing.tariff import IdlePayer, PeriodPlan, rounded
from gpumeter_operator.flow.close import DEFAULT_PLAN
from gpumeter_operator.flow.figures import Cost, Total, figures_of
from gpumeter_operator.flow.periods import facts_of, open_periods, pod_period
from gpumeter_operator.flow.pricing import parts_of
from gpumeter_usage.period import Period

_NO_PLAN = PeriodPlan(DEFAULT_PLAN, None)
_AS_FAR_AS_KNOWN = Verdict(Phase.OPEN, "PeriodRunning", "")


class Plans:
    """The price plans of periods, each read once."""

    def __init__(self, reader: Reader, asked: Asked) -> None:
        self._reader = reader
        self._asked = asked
        self._schedule = reader.schedule()
        self._known: dict[tuple[str, int], tuple[PeriodPlan, tuple[Stretch, ...]]] = {}

    def of(self, service: str, end_ns: int) -> tuple[PeriodPlan, tuple[Stretch, ...]]:
        """The plan of one period of a service ("namespace/name"), and the stretches into which it cuts it."""
        known = self._known.get((service, end_ns))
        if known is None:
            namespace, _, name = service.partition("/")
            plan = self._reader.period_plan(namespace, name, end_ns) or _NO_PLAN
            known = self._known[service, end_ns] = plan, stretches(plan, self._schedule.period_of(end_ns))
        return known

    def opened(self) -> Iterator[tuple[str, PeriodPlan, tuple[Stretch, ...]]]:
        """Service, plan and stretches of every period of the span that was opened."""
        for service, end_ns in kept.opened(self._reader.engine, self._asked):
            yield service, *self.of(service, end_ns)

    def looked_at(self) -> Iterator[tuple[str, PeriodPlan, tuple[Stretch, ...]]]:
        """The same of those that were asked for so far."""
        return ((service, *known) for (service, _), known in self._known.items())

    def edges_ns(self) -> list[int]:
        """When any price changed, ascending: between two of them nothing that is asked for did."""
        return sorted({edge_ns for _, _, cut in self.opened() for edge_ns in _changes_ns(cut)})

    def cost(self, service: str, end_ns: int, used: Sequence[tuple[int, str, int]]) -> Cost:
        """What measured time of one period costs: `used` is (when it ended, class of GPU, nanoseconds)."""
        _, cut = self.of(service, end_ns)
        exact: dict[str, Fraction] = defaultdict(Fraction)
        cost = Cost()
        for ended_ns, gpu_class, gpu_ns in used:
            stretch = stretch_at(cut, ended_ns)
            plan = stretch.version.plan
            price = None if plan is None else plan.hour_price(gpu_class, stretch.start_ns)
            if plan is None or price is None:
                cost.unpriced_ns += gpu_ns
            else:
                exact[plan.currency] += price.of_time(gpu_ns)
        cost.amounts = {currency: rounded(amount) for currency, amount in exact.items()}
        return cost


def billed(reader: Reader, by: Sequence[str], asked: Asked, now_ns: int) -> dict[tuple[str, ...], Total]:
    """What the reports of tenants say together, by a key of tenant and service: figures and amounts.

    Final ones as they are kept, whether their records are there or were removed by retention. A period that becomes
    Final meanwhile is folded once more, and says the same.
    """
    schedule = reader.schedule()
    unclosed: dict[tuple[str, int], tuple[tuple[str, str], Period]] = {}
    for service in reader.services():
        if asked.namespace in (None, service[0]) and asked.service in (None, service[1]):
            for period in open_periods(reader, service, schedule, now_ns):
                if asked.since_ns < period.end_ns <= asked.until_ns:
                    unclosed["/".join(service), period.end_ns] = service, period
    found: dict[tuple[str, ...], Total] = {}

    def add(service: str, tenant: str, status: Mapping[str, Any]) -> None:
        names = {"tenant": tenant, "service": service}
        key = tuple(names[name] for name in by)
        found.setdefault(key, Total(key)).add(figures_of(key, status))

    for service_key, tenant, end_ns, body in kept.tenant_reports(reader.engine, asked):
        unclosed.pop((service_key, end_ns), None)
        add(service_key, tenant, json.loads(body)["status"])
    for service, period in unclosed.values():
        for report in unfinished(reader, service, period, now_ns):
            tenant = report["spec"]["tenant"]
            if tenant != PLATFORM and asked.tenant in (None, tenant):
                add("/".join(service), tenant, report["status"])
    return found


def unfinished(reader: Reader, service: tuple[str, str], period: Period, now_ns: int) -> tuple[Manifest, ...]:
    """The reports of a period that is not Final, from what is known of it now."""
    plan = reader.period_plan(*service, period.end_ns) or _NO_PLAN
    pods, _, adjustments = facts = facts_of(reader, service, period)
    horizons = [horizon_ns(pod, period, now_ns, final=False) for pod in pods]
    of_pods = tuple(pod_period(pod, period, facts, until_ns) for pod, until_ns in zip(pods, horizons, strict=True))
    by_uid = {pod.worker.worker_uid: (pod, until_ns) for pod, until_ns in zip(of_pods, horizons, strict=True)}
    return reports(
        ServicePeriod(
            namespace=service[0],
            service=service[1],
            period=period,
            verdict=_AS_FAR_AS_KNOWN,
            pods=of_pods,
            plan=plan,
            digests={},
            adjustments=tuple(adjustments),
            parts=parts_of(reader, service, period, plan, facts=facts, pods=by_uid),
            corrections=corrections.of_service(reader, *service, period.end_ns),
        )
    )


def measured(plans: Plans, service: str, end_ns: int, of: Sequence[Sum]) -> Cost:
    """What the sums of one key in one period cost as measured."""
    return plans.cost(service, end_ns, [(each.until_ns, each.gpu_class, each.gpu_ns) for each in of])


def bills_that_differ(periods: Iterable[tuple[str, PeriodPlan, tuple[Stretch, ...]]]) -> Iterator[str]:
    """A sentence for every service whose tenants are billed other sums than the price of what they used."""
    idle: dict[str, int] = defaultdict(int)
    by_tokens: dict[str, int] = defaultdict(int)
    for service, _, cut in periods:
        if any(each.by_tokens for each in cut):
            by_tokens[service] += 1
        elif any(each.version.plan and each.version.plan.idle_payer is not IdlePayer.PLATFORM for each in cut):
            idle[service] += 1
    besides = "AMOUNT is the measured price of what was used; see --by tenant for the bill."
    for service in sorted(idle.keys() | by_tokens.keys()):
        if count := by_tokens.get(service):
            yield f"{service}: {count} of its periods billed by standard rates of tokens. {besides}"
        if count := idle.get(service):
            yield f"{service}: idle time of {count} of its periods charged to tenants. {besides}"


def _changes_ns(cut: Sequence[Stretch]) -> Iterator[int]:
    for before, after in pairwise(cut):
        plan = after.version.plan
        if before.version.plan != plan or (plan is not None and after.start_ns in plan.edges_ns):
            yield after.start_ns
