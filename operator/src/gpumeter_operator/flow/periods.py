"""What of a service is not closed yet: its open periods, and the facts of each.

Owns which periods those are and the order in which their facts are read, for the collector that closes them and for an
auditor who only looks. Changes nothing and decides nothing.
"""

from collections.abc import Callable, Sequence

from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.accounts import fold
from gpumeter_operator.billing.close import lived_in
from gpumeter_operator.billing.facts import Adjustment, Line, Pod
from gpumeter_operator.billing.report import PodPeriod
from gpumeter_operator.billing.schedule import Schedule
from gpumeter_usage.period import Period

Facts = tuple[list[Pod], dict[str, tuple[Line, ...]], list[Adjustment]]
"""The pods that lived in a period or have something booked in it, the sums of its records by worker, and its
adjustments."""

Fold = Callable[[tuple[str, str], Period, Sequence[Pod]], Sequence[Line]]
"""The sums of the records of a service that are booked in a period, as far as the cursors of these pods reach."""


def open_periods(reader: Reader, service: tuple[str, str], schedule: Schedule, now_ns: int) -> list[Period]:
    """Every period after the last Final one that was opened, or in which a container ran or something is booked."""
    final_ns = reader.last_final_ns(*service)
    found: set[Period] = set()
    for pod in reader.pods(*service, final_ns, booked=()):
        for span in pod.spans:
            end_ns = now_ns if span.ended_ns is None else span.ended_ns
            found |= set(schedule.between(max(final_ns, span.started_ns), end_ns))
    # A container may turn out to have ended in the second in which it started. The period that was opened for it holds
    # nothing then, and must be closed all the same.
    ends = (*reader.booked_ends(*service, final_ns), *reader.opened_ends(*service, final_ns))
    return sorted(found | {schedule.period_of(end_ns) for end_ns in ends})


def facts_of(reader: Reader, service: tuple[str, str], period: Period, fold: Fold | None = None) -> Facts:
    """The facts of one period of a service; without `fold` its records are summed by the ledger, all of them."""
    # The pods first: that a pod is settled must be older than the records that are read after it. Those that are only
    # known by their records are loaded after them, and no period is kept where records came in between.
    candidates = reader.pods(*service, period.start_ns, booked=())
    lines = reader.lines(*service, period.end_ns) if fold is None else fold(service, period, candidates)
    by_worker: dict[str, list[Line]] = {}
    for line in lines:
        by_worker.setdefault(line.worker_uid, []).append(line)
    adjustments = reader.adjustments(*service, period.end_ns)
    if unknown := by_worker.keys() - {pod.worker.worker_uid for pod in candidates}:
        candidates = reader.pods(*service, period.start_ns, booked=sorted(unknown))
    booked = by_worker.keys() | {adjustment.worker_uid for adjustment in adjustments}
    pods = [pod for pod in candidates if pod.worker.worker_uid in booked or lived_in(pod, period)]
    return pods, {worker_uid: tuple(own) for worker_uid, own in by_worker.items()}, adjustments


def pod_period(pod: Pod, period: Period, facts: Facts, until_ns: int) -> PodPeriod:
    """What of these facts is one pod's, with its allocation reckoned up to `until_ns`."""
    _, lines, adjustments = facts
    uid = pod.worker.worker_uid
    own = lines.get(uid, ())
    adjusted_ns = sum(adjustment.allocated_ns for adjustment in adjustments if adjustment.worker_uid == uid)
    return PodPeriod(pod.worker, fold(pod, period, own, until_ns=until_ns, adjusted_ns=adjusted_ns), own)
