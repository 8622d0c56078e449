"""Folds a Final period once more from what the ledger knew when it was closed, to compare the reports byte for byte.

Owns the way back to that moment: which events of containers and which boots were known then, and what was decided. What
came later is told by the adjustment that was booked for it. Changes nothing.

What cannot be told from facts is the verdict: up to where each worker had been heard at that moment. It is taken from
the report of the platform, in which it stands in full, and all reports of the period must agree with it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gpumeter_operator.adapters.ledger import audit, corrections
from gpumeter_operator.adapters.ledger.audit import Allocation, ContainerFact
from gpumeter_operator.adapters.ledger.read import Reader, span_of
from gpumeter_operator.billing.close import Missing, Phase, Verdict, lived_in
from gpumeter_operator.billing.facts import PLATFORM, Line, Pod
from gpumeter_operator.billing.lineage import Lineage
from gpumeter_operator.billing.report import ServicePeriod, canonical_report, reports
from gpumeter_operator.billing.tariff import PeriodPlan
from gpumeter_operator.flow.close import DEFAULT_PLAN
from gpumeter_operator.flow.periods import pod_period
from gpumeter_operator.flow.pricing import parts_of
from gpumeter_usage.period import Period, from_rfc3339
from gpumeter_usage.record import Status


@dataclass(frozen=True, slots=True)
class Known:
    """What of a service's pods is known, and since when."""

    pods: tuple[Pod, ...]
    events: tuple[ContainerFact, ...]
    allocations: tuple[Allocation, ...]
    bookings: Mapping[str, Mapping[str, tuple[int, int]]]


def known_of(reader: Reader, service: tuple[str, str], pods: Iterable[Pod]) -> Known:
    """Read it once for all periods of a service."""
    pods = tuple(pods)
    return Known(
        pods=pods,
        events=tuple(audit.container_facts(reader.engine, *service)),
        allocations=tuple(audit.allocations(reader.engine, *service)),
        bookings={pod.worker.worker_uid: audit.bookings(reader.engine, pod.worker.worker_uid) for pod in pods},
    )


def refold(
    reader: Reader,
    service: tuple[str, str],
    period: Period,
    known: Known,
    *,
    platform: Mapping[str, Any],
    digests: Mapping[str, str],
    chain: Lineage,
) -> dict[str, bytes]:
    """The bytes of every Final report of a period, by tenant.

    `platform` is the platform's report as it is kept, `digests` those of the period's records by owner, `chain` what
    the service's reports must say of those before them.
    """
    lines: dict[str, tuple[Line, ...]] = {}
    for line in reader.lines(*service, period.end_ns):
        lines[line.worker_uid] = (*lines.get(line.worker_uid, ()), line)
    adjustments = reader.adjustments(*service, period.end_ns)
    booked = lines.keys() | {adjustment.worker_uid for adjustment in adjustments}
    pods = []
    for now in known.pods:
        then = as_known(now, period, known)
        if then.worker.worker_uid in booked or lived_in(then, period):
            pods.append(then)
    facts = (pods, lines, adjustments)
    late = tuple(adjustment.reason for adjustment in adjustments)
    plan = reader.period_plan(*service, period.end_ns) or PeriodPlan(DEFAULT_PLAN, None)
    of_pods = tuple(pod_period(pod, period, facts, period.end_ns) for pod in pods)
    by_uid = {pod.worker.worker_uid: (pod, period.end_ns) for pod in of_pods}
    found = reports(
        ServicePeriod(
            namespace=service[0],
            service=service[1],
            period=period,
            verdict=verdict_of(platform, late),
            pods=of_pods,
            plan=plan,
            digests=digests,
            adjustments=tuple(adjustments),
            parts=parts_of(reader, service, period, plan, facts=facts, pods=by_uid),
            corrections=corrections.of_service(reader, *service, period.end_ns),
        )
    )
    return {each["spec"]["tenant"]: canonical_report(each) for each in chain.chained(found, period.end_ns)}


def as_known(pod: Pod, period: Period, known: Known) -> Pod:
    """The pod as the ledger knew it when this period was closed."""
    uid = pod.worker.worker_uid
    late = {
        each.made_ns for each in known.allocations if each.worker_uid == uid and each.closed_end_ns >= period.end_ns
    }
    events: dict[str, dict[str, int]] = {}
    for each in known.events:
        if each.worker_uid == uid and each.observed_ns not in late:
            events.setdefault(each.container_id, {})[each.event] = each.at_ns
    spans = [span_of(container_id, of) for container_id, of in events.items() if "started" in of]
    boots = []
    for boot in pod.boots:
        first_ns, last_ns = known.bookings[uid].get(boot.boot_id, (0, 0))
        if first_ns > period.end_ns:
            continue
        sealed = boot.seal is not Status.NONE and last_ns <= period.end_ns
        boots.append(boot if sealed else replace(boot, seal=Status.NONE, sealed_ns=0))
    spans.sort(key=lambda span: (span.started_ns, span.container_id))
    return replace(pod, spans=tuple(spans), boots=tuple(boots))


def verdict_of(platform: Mapping[str, Any], late: Iterable[str]) -> Verdict:
    """What was decided when the period was closed, as the platform's report states it."""
    status = platform["status"]
    completeness = status["completeness"]
    complete = next(each for each in status["conditions"] if each["type"] == "Complete")
    missing = [_missing(each) for each in completeness["missing"]]
    count = completeness["expectedWorkers"] - completeness["reportedWorkers"]
    if missing:  # of more than a report names only the first are stated
        missing += [missing[-1]] * (count - len(missing))
    message = complete["message"]
    for sentence in reversed(tuple(late)):
        message = message.removesuffix(sentence).removesuffix(" ")
    return Verdict(Phase.FINAL, complete["reason"], message, completeness["expectedWorkers"], tuple(missing))


def _missing(stated: Mapping[str, Any]) -> Missing:
    return Missing(
        stated["workerUid"],
        stated["pod"],
        stated["reason"],
        stated["message"],
        stated.get("bootId", ""),
        since_ns=from_rfc3339(stated["since"]) if "since" in stated else 0,
        first_seq=stated.get("first", 0),
        last_seq=stated.get("last", 0),
    )


def platform_of(bodies: Iterable[tuple[str, str, bytes, str]]) -> dict[str, Any] | None:
    """The platform's report among those of a period; None where there is none."""
    for tenant, _, body, _ in bodies:
        if tenant == PLATFORM:
            found = json.loads(body)
            return found if isinstance(found, dict) else None
    return None
