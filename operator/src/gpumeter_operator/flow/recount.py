"""Recomputes one service from its raw rows: chains, accounts, prices and reports.

Owns what is compared with what, for `gpumeter accounts --check` and for `gpumeter verify`. The sums themselves are
billing's. Reads, changes nothing.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from gpumeter_operator.adapters.ledger import audit as raw
from gpumeter_operator.adapters.ledger import corrections
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.audit import (
    HashedRecords,
    RawRow,
    Recount,
    check_accounts,
    check_kept,
    check_reports,
    nothing_hashed,
    recount,
)
from gpumeter_operator.billing.audit_corrections import corrections_unproved
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import Pod
from gpumeter_operator.billing.gaps import gaps_untold
from gpumeter_operator.billing.lineage import Lineage, lineage
from gpumeter_operator.billing.removals import Removed
from gpumeter_operator.flow.refold import as_known, known_of, platform_of, refold
from gpumeter_operator.flow.rollup import check_sums
from gpumeter_usage.period import rfc3339

PROGRESS_EVERY = 10_000

Count = Callable[[int, int], None]
"""(records so far, of how many)."""


@dataclass(frozen=True, slots=True)
class Span:
    """Periods that end after `since_ns` and at `until_ns` at the latest."""

    since_ns: int = -1
    until_ns: int = 2**63 - 1

    def holds(self, end_ns: int) -> bool:
        """Whether a period that ended then is one of them."""
        return self.since_ns < end_ns <= self.until_ns


Whole = Span()
"""Everything."""


class Counts(Protocol):
    """Where it is noted how much was looked at."""

    records: int
    periods: int
    only_compared: int
    refolded: int


def recount_service(
    reader: Reader, service: tuple[str, str], span: Span, counts: Counts, progress: Count, *, removed: Removed
) -> Iterator[tuple[str, str]]:
    """(reason, sentence) for every difference between the raw records of a service, its pods' accounts and its reports.

    In a part of the ledger, chains are followed from the record before it, and what only the whole can tell (where a
    chain ends, all of a pod's allocation) is left out. Of what is `removed` there are no raw records any more.
    """
    schedule, adjustments = reader.schedule(), reader.adjustments(*service)
    final_ns = reader.last_final_ns(*service)
    pods = reader.pods(*service, 0)
    of_records = sum(raw.count_records(reader.engine, pod.worker.worker_uid) for pod in pods)
    seen = 0
    hashed = nothing_hashed()
    recounts: list[Recount] = []
    allocated_ns: dict[int, dict[str, int]] = {}  # by end of period and class of GPU
    for pod in pods:
        frozen = [each for each in reader.pod_accounts(pod.worker.worker_uid) if span.holds(each[0])]

        def counted(pod: Pod = pod) -> Iterator[RawRow]:
            nonlocal seen
            for row in _rows(reader, pod, span):
                seen += 1
                if seen % PROGRESS_EVERY == 0:
                    progress(seen, of_records)
                yield row

        uid = pod.worker.worker_uid
        heads = None if span == Whole else raw.heads_before(reader.engine, uid, span.since_ns, span.until_ns)
        found = recount(pod, counted(), schedule, adjustments, hashed, gone=removed.chains.get(uid), heads=heads)
        for problem in found.problems:
            yield "RecordDiffers", problem
        for problem in check_accounts(pod, frozen, found, adjustments, final_ns, removed=removed, whole=span == Whole):
            yield "AccountsDiffer", problem
        found.problems.clear()
        found.frozen_ns = {end_ns: of_period.allocated for end_ns, of_period in frozen}
        recounts.append(found)
        for end_ns, of_period in frozen:
            of_class = allocated_ns.setdefault(end_ns, {})
            of_class[pod.worker.gpu_class] = of_class.get(pod.worker.gpu_class, 0) + of_period.allocated
    counts.records += seen
    name = "/".join(service)
    by_hand = corrections.of_service(reader, *service)  # before the reports: what was booked meanwhile is in neither
    kept = reader.kept_reports(*service)
    for problem in check_kept((each for each in kept if span.holds(each[0])), []):
        yield "ReportDiffers", f"{name}: {problem}"
    chain = lineage((end_ns, tenant, body) for end_ns, tenant, phase, body, _ in kept if phase == Phase.FINAL.value)
    for end_ns, told in chain.breaks:
        if span.holds(end_ns):
            yield "ReportChain", f"{name}: in the period that ended {rfc3339(end_ns)}, {told}"
    finals = {(end, tenant): (body, digest) for end, tenant, phase, body, digest in kept if phase == Phase.FINAL.value}
    inside = (each for each in by_hand if span.holds(each.booked_end_ns))
    yield from corrections_unproved(
        inside,
        finals,
        lambda end_ns: corrections.gpu_classes(reader, *service, end_ns),
        lambda end_ns: corrections.models(reader, *service, end_ns),
        final_ns,
    )
    folded = (pods, recounts, hashed, allocated_ns, chain)
    yield from _reports(reader, service, span, counts, folded, removed=removed)


Folded = tuple[tuple[Pod, ...], list[Recount], HashedRecords, dict[int, dict[str, int]], Lineage]
"""The pods of a service, what their records say, the hashes of these, what was allocated by period and class, and what
its Final reports say of those before them."""


def _reports(
    reader: Reader, service: tuple[str, str], span: Span, counts: Counts, folded: Folded, *, removed: Removed
) -> Iterator[tuple[str, str]]:
    """The Final reports beside the raw records, and beside themselves folded anew."""
    (pods, recounts, hashed, allocated_ns, chain), name = folded, "/".join(service)
    schedule, adjustments = reader.schedule(), reader.adjustments(*service)
    known = known_of(reader, service, pods)
    ends = {end_ns: kept_ns for end_ns, kept_ns in raw.final_ends(reader.engine, *service) if span.holds(end_ns)}
    closed = ends.keys() | allocated_ns.keys()
    there = sorted(each for each in closed if not removed.holds(each))
    counts.only_compared += len(closed) - len(there)
    for end_ns in there:
        counts.periods += 1
        period = schedule.period_of(end_ns)
        bodies = raw.reports_of_period(reader.engine, *service, end_ns)
        reports: dict[str, dict[str, Any]] = {tenant: json.loads(body) for tenant, _, body, _ in bodies}
        told = check_reports(
            period,
            reports,
            recounts,
            hashed.get(end_ns, {}),
            allocated_ns=allocated_ns.get(end_ns, {}),
            plan=reader.period_plan(*service, end_ns),
            adjustments=adjustments,
            pods=[as_known(pod, period, known) for pod in pods],
            corrections=corrections.of_service(reader, *service, end_ns),
        )
        for problem in told:
            yield "ReportDiffers", f"{name}: {problem}"
        platform = platform_of(bodies)
        if platform is None:
            yield "ReportBytes", f"{name}: the period that ended {rfc3339(end_ns)} has no report of the platform"
            continue
        for pod, gap in gaps_untold(pods, period, platform["status"]["completeness"], ends.get(end_ns, 0)):
            key = f"{pod.worker.worker_uid} {gap.boot_id} {gap.first_seq}"
            when = f"{name}'s report of the period that ended {rfc3339(end_ns)}"
            yield "GapUnproved", f"gaps ({key}): {when} came later, and does not name pod {pod.worker.pod} as missing"
        of_owners = {owner: each.running.hexdigest() for owner, each in hashed.get(end_ns, {}).items()}
        again = refold(reader, service, period, known, platform=platform, digests=of_owners, chain=chain)
        kept = {tenant: body for tenant, _, body, _ in bodies}
        counts.refolded += len(again)
        for tenant in sorted(kept.keys() | again.keys()):
            if kept.get(tenant) != again.get(tenant):
                what = _first_difference(kept.get(tenant), again.get(tenant))
                yield "ReportBytes", f"{name}: {tenant}'s report of the period that ended {rfc3339(end_ns)}: {what}"
    for end_ns, problem in check_sums(reader, service):
        if span.holds(end_ns):
            yield "ReportBytes", f"{name}: {problem}"


def _rows(reader: Reader, pod: Pod, span: Span) -> Iterator[RawRow]:
    if span == Whole:
        return iter(reader.kept_records(pod.worker.worker_uid))
    return iter(raw.records_in_span(reader.engine, pod.worker.worker_uid, span.since_ns, span.until_ns))


def _first_difference(kept: bytes | None, again: bytes | None) -> str:
    if again is None:
        return "its facts give none"
    if kept is None:
        return "it is missing, and its facts give one"
    return _differs("", json.loads(kept), json.loads(again)) or "it has the same content in other bytes"


def _differs(path: str, kept: Any, again: Any) -> str:
    """The first field, in the order of names, in which two reports differ."""
    if isinstance(kept, dict) and isinstance(again, dict):
        for name in sorted(kept.keys() | again.keys()):
            if told := _differs(f"{path}.{name}".lstrip("."), kept.get(name), again.get(name)):
                return told
        return ""
    return "" if kept == again else f"{path} is {kept!r:.120}, its facts give {again!r:.120}"
