"""Days and months: keeps the sums of each service's Final periods, and closes those that are over.

Owns what is remembered between rounds, so that a round adds only what became Final since the last one. What is kept is
folded anew from the ledger, never from memory. Blocks on the ledger; decides nothing.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

from gpumeter_operator.adapters.ledger import rollups
from gpumeter_operator.adapters.ledger.audit import final_ends
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.store import Ledger, ServiceName
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.lineage import chained, lineage
from gpumeter_operator.billing.report import Manifest, canonical_report
from gpumeter_operator.billing.rollup import Part, RollUp, add, decide_rollup, part_of, rolled_up
from gpumeter_operator.billing.schedule import Schedule
from gpumeter_operator.flow.periods import open_periods
from gpumeter_usage.period import Granularity, Period, day_of, month_of, rfc3339

log = logging.getLogger(__name__)

Parts = dict[str, Part]
"""By tenant."""


@dataclass(slots=True)
class _Running:
    """A day or month that is not Final: its sum so far, and its reports as they were made last."""

    period: Period
    parts: Parts = field(default_factory=dict)
    made: tuple[RollUp, list[Manifest]] | None = None

    def add(self, parts: Parts) -> None:
        self.parts = added((self.parts, parts))
        self.made = None


@dataclass(slots=True)
class _Service:
    until_ns: int  # closing periods that ended by then are in the sums
    days: dict[int, _Running] = field(default_factory=dict)
    months: dict[int, _Running] = field(default_factory=dict)


class Roller:
    """Brings every service's days and months up to date, one call a round."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._engine = ledger.engine
        self._services: dict[ServiceName, _Service] = {}

    def roll(self, service: ServiceName, schedule: Schedule, unclosed: Sequence[Period], now_ns: int) -> list[Manifest]:
        """The reports of every day and month that is not Final, and of those that this call closed.

        `unclosed` are the service's periods that are not Final.
        """
        state = self._services.get(service)
        if state is None:
            state = self._services[service] = self._load(service)
        if self._ledger.last_final_ns(*service) > state.until_ns:
            self._take_in(service, state)
        manifests: list[Manifest] = []
        for running in [state.days[end_ns] for end_ns in sorted(state.days)]:
            found = self._reports(service, schedule, running, unclosed, now_ns=now_ns)
            manifests += found
            if self._services.get(service) is not state:
                return manifests  # it could not be kept, and is read anew: what comes after it waits for it
            if _is_final(found):
                del state.days[running.period.end_ns]
                month = month_of(running.period.end_ns)
                self._running(state.months, month).add(_parts(found))
        for running in [state.months[end_ns] for end_ns in sorted(state.months)]:
            open_days = [day for day in state.days.values() if month_of(day.period.end_ns) == running.period]
            waiting = [*unclosed, *(day.period for day in open_days if day.period not in unclosed)]
            found = self._reports(service, schedule, running, waiting, now_ns=now_ns, open_days=open_days)
            manifests += found
            if self._services.get(service) is not state:
                return manifests
            if _is_final(found):
                del state.months[running.period.end_ns]
        return manifests

    def _load(self, service: ServiceName) -> _Service:
        day_ns = rollups.last_rollup_ns(self._engine, service, Granularity.DAY)
        month_ns = rollups.last_rollup_ns(self._engine, service, Granularity.MONTH)
        state = _Service(day_ns)
        for end_ns, _, body in rollups.rollup_bodies(self._engine, service, Granularity.DAY, month_ns):
            self._running(state.months, month_of(end_ns)).add(_parts([json.loads(body)]))
        return state

    def _take_in(self, service: ServiceName, state: _Service) -> None:
        for end_ns, _, body in rollups.final_bodies(self._engine, service, state.until_ns, 2**62):
            self._running(state.days, day_of(end_ns)).add(_parts([json.loads(body)]))
            self._running(state.months, month_of(end_ns)).made = None
            state.until_ns = max(state.until_ns, end_ns)

    def _running(self, of: dict[int, _Running], period: Period) -> _Running:
        return of.setdefault(period.end_ns, _Running(period))

    def _reports(
        self,
        service: ServiceName,
        schedule: Schedule,
        running: _Running,
        unclosed: Sequence[Period],
        *,
        now_ns: int,
        open_days: Sequence[_Running] = (),
    ) -> list[Manifest]:
        period = running.period
        verdict = decide_rollup(period, [each for each in unclosed if each.end_ns <= period.end_ns], now_ns=now_ns)
        if verdict.phase is Phase.FINAL:
            return self._close(service, schedule, period, verdict, now_ns) or (running.made or (verdict, []))[1]
        if running.made is None or running.made[0] != verdict:
            parts = added((running.parts, *(day.parts for day in open_days)))
            running.made = verdict, _manifests(service, period, parts, verdict)
        return running.made[1]

    def _close(
        self, service: ServiceName, schedule: Schedule, period: Period, verdict: RollUp, now_ns: int
    ) -> list[Manifest]:
        made_from = rollups.facts_before(self._engine, service, period.end_ns)  # read before anything that it counts
        waiting = open_periods(self._ledger, service, schedule, now_ns)
        if any(each.end_ns <= period.end_ns for each in waiting):
            self._services.pop(service, None)
            return []  # a fact came in meanwhile: its period comes first
        manifests = folded(self._ledger, service, period, verdict)
        tenants = [each["spec"]["tenant"] for each in manifests]
        manifests = list(chained(manifests, rollups.previous_digests(self._engine, service, period, tenants)))
        if not rollups.keep_rollup(self._engine, service, period, manifests, made_from=made_from, now_ns=now_ns):
            self._services.pop(service, None)  # a fact came in, or another collector was faster: read it anew
            return []
        what = period.granularity.value.lower()
        log.info("%s/%s: the %s that ended %s is Final.", *service, what, rfc3339(period.end_ns))
        return manifests


def folded(reader: Reader, service: ServiceName, period: Period, verdict: RollUp) -> list[Manifest]:
    """The reports of a day or month, from what the ledger keeps of its periods."""
    engine, after_ns, until_ns = reader.engine, period.start_ns, period.end_ns
    if period.granularity is Granularity.DAY:
        bodies = rollups.final_bodies(engine, service, after_ns, until_ns)
    else:
        bodies = rollups.rollup_bodies(engine, service, Granularity.DAY, after_ns, until_ns)
    parts = _parts(json.loads(body) for _, _, body in bodies)
    pods = rollups.pod_sums(engine, service, period)
    return [
        rolled_up(service, tenant, period, parts[tenant], parts[PLATFORM], verdict=verdict, pods=pods)
        for tenant in sorted(parts)
    ]


def check_sums(reader: Reader, service: ServiceName) -> Iterator[tuple[int, str]]:
    """Every Final day and month of a service that is not, to the byte, the sum of what it is made of, and each that is
    not there though a later one is: its end, and a sentence.

    One whose closing periods have left the ledger (retention removes them in whole) can be summed no more, and is left.
    """
    parts = [end_ns for end_ns, _ in final_ends(reader.engine, *service)]
    for granularity, period_of in ((Granularity.DAY, day_of), (Granularity.MONTH, month_of)):
        kept: dict[int, dict[str, bytes]] = {}
        bodies = rollups.rollup_bodies(reader.engine, service, granularity, 0)
        chain = lineage(bodies)
        yield from ((end_ns, f"of the {granularity.value.lower()}s, {told}") for end_ns, told in chain.breaks)
        for end_ns, tenant, body in bodies:
            kept.setdefault(end_ns, {})[tenant] = body
        for end_ns in sorted({period_of(each).end_ns for each in parts} - kept.keys()):
            if kept and end_ns < max(kept):
                which = f"the {granularity.value.lower()} that ended {rfc3339(end_ns)}"
                yield end_ns, f"{which}: it has no report, though periods of it and a later one are Final"
        parts = sorted(kept)
        for end_ns, reports in sorted(kept.items()):
            period = period_of(end_ns)
            if _is_retired(reader, service, period, reports):
                continue
            summed = folded(reader, service, period, decide_rollup(period, (), now_ns=2**62))
            again = chain.chained(summed, end_ns)
            expected = {each["spec"]["tenant"]: canonical_report(each) for each in again}
            for tenant in sorted(expected.keys() | reports.keys()):
                if expected.get(tenant) != reports.get(tenant):
                    which = f"the {granularity.value.lower()} that ended {rfc3339(end_ns)}"
                    yield end_ns, f"{which}: {tenant}'s report is not the sum of its periods' reports"


def _is_retired(reader: Reader, service: ServiceName, period: Period, reports: Mapping[str, bytes]) -> bool:
    there = rollups.final_count(reader.engine, service, period)
    if period.granularity is Granularity.DAY or PLATFORM not in reports:
        return there == 0
    return bool(there < json.loads(reports[PLATFORM])["status"]["completeness"]["periods"])


def added(of: Iterable[Parts]) -> Parts:
    """All of them together, tenant by tenant."""
    found: Parts = {}
    for parts in of:
        for tenant, part in parts.items():
            found[tenant] = add(found[tenant], part) if tenant in found else part
    return found


def _parts(manifests: Iterable[Manifest]) -> Parts:
    return reduce(lambda found, each: added((found, {each["spec"]["tenant"]: part_of(each)})), manifests, {})


def _manifests(service: ServiceName, period: Period, parts: Parts, verdict: RollUp) -> list[Manifest]:
    return [
        rolled_up(service, tenant, period, parts[tenant], parts[PLATFORM], verdict=verdict) for tenant in sorted(parts)
    ]


def _is_final(manifests: Sequence[Manifest]) -> bool:
    return bool(manifests) and manifests[0]["status"]["phase"] == Phase.FINAL.value
