"""When a period is closed: Open -> Closing -> Final, each with a reason and a sentence.

Owns the rule that a period waits for every worker that lived in it, and for the grace period at most. Pure: takes the
facts and the time, returns a verdict. Does not know what the period's figures are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from gpumeter_operator.billing.facts import BootFacts, Pod, life_of
from gpumeter_operator.billing.gaps import REASON, gap_in
from gpumeter_usage.period import SECOND_NS, Period, rfc3339
from gpumeter_usage.record import Status

SETTLE_NS = 5 * SECOND_NS
"""A container that started at the very end of a period is known to the API server a moment later; no period is closed
before."""


class Phase(StrEnum):
    """Of a UsageReport; it only ever goes forward."""

    OPEN = "Open"
    CLOSING = "Closing"
    FINAL = "Final"


@dataclass(frozen=True, slots=True)
class Missing:
    """A worker whose records up to the period's end are not all in the ledger, and why.

    `since_ns` is up to when they are (0 where that is not known), `first_seq` the first of a boot that is not, and
    `last_seq` the last of them where they are gone and others follow.
    """

    worker_uid: str
    pod: str
    reason: str
    message: str
    boot_id: str = ""
    since_ns: int = 0
    first_seq: int = 0
    last_seq: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a period is now. `missing` names what is waited for, or what was given up when it is Final."""

    phase: Phase
    reason: str
    message: str
    expected: int = 0
    missing: tuple[Missing, ...] = ()

    @property
    def complete(self) -> bool:
        """All records of all workers are in."""
        return self.phase is Phase.FINAL and not self.missing


def decide(
    period: Period, pods: Iterable[Pod], *, now_ns: int, grace_ns: int, forks: Mapping[str, str] | None = None
) -> Verdict:
    """Decide the phase of a period from the pods that lived in it.

    `forks` maps the uid of a worker that sent two different records under one key, with an end in this period, to a
    sentence: such a period is held for the whole grace and ends incomplete, however complete it seems.
    """
    lived = sorted(pods, key=lambda pod: pod.worker.worker_uid)
    if now_ns < period.end_ns + SETTLE_NS:
        return Verdict(Phase.OPEN, "PeriodRunning", f"The period runs until {rfc3339(period.end_ns)}.", len(lived))
    missing = tuple(found for pod in lived if (found := _missing(pod, period, forks or {})) is not None)
    if not missing:
        return Verdict(
            Phase.FINAL, "AllRecordsCommitted", f"All records of {_workers(len(lived))} are in the ledger.", len(lived)
        )
    names = "; ".join(f"{each.pod}: {each.message}" for each in missing)
    if now_ns < period.end_ns + grace_ns:
        return Verdict(
            Phase.CLOSING,
            "WaitingForWorkers",
            f"Waiting until {rfc3339(period.end_ns + grace_ns)} at the latest for {_workers(len(missing))}: {names}",
            len(lived),
            missing,
        )
    return Verdict(
        Phase.FINAL,
        missing[0].reason,
        f"Closed after the grace period without {_workers(len(missing))}; what they did not report is unaccounted and "
        f"billed to nobody: {names}",
        len(lived),
        missing,
    )


def after_earlier(verdict: Verdict, earlier: Period) -> Verdict:
    """The verdict where an earlier period of the service is not Final yet: periods are closed in order, so that what
    comes late always finds an open one after the one that it missed."""
    if verdict.phase is not Phase.FINAL:
        return verdict
    message = f"Waiting for the period that ended {rfc3339(earlier.end_ns)}, because periods are closed in order."
    return Verdict(Phase.CLOSING, "WaitingForEarlierPeriod", message, verdict.expected, verdict.missing)


def lived_in(pod: Pod, period: Period) -> bool:
    """Whether any of the pod's containers ran in the period."""
    return any(
        span.started_ns < period.end_ns and (span.ended_ns is None or span.ended_ns > period.start_ns)
        for span in pod.spans
    )


def _missing(pod: Pod, period: Period, forks: Mapping[str, str]) -> Missing | None:
    worker = pod.worker
    if worker.worker_uid in forks:
        return Missing(worker.worker_uid, worker.pod, "ChainForked", forks[worker.worker_uid])
    if gap := gap_in(pod, period):
        return Missing(
            worker.worker_uid,
            worker.pod,
            REASON,
            gap.reason,
            gap.boot_id,
            since_ns=gap.after_ns,
            first_seq=gap.first_seq,
            last_seq=gap.last_seq,
        )
    for boot, successor in pairwise(pod.boots):
        if boot.seal is Status.NONE and boot.started_ns < period.end_ns and successor.started_ns > period.start_ns:
            return _seal_missing(pod, boot, "it started anew")
    if pod.settled_ns >= period.end_ns:
        return None
    if not pod.gone:
        message = pod.problem or (
            f"its records reach to {rfc3339(pod.settled_ns)}" if pod.settled_ns else "it has not answered yet"
        )
        message = f"{message}.".replace("..", ".")
        return Missing(worker.worker_uid, worker.pod, "WorkerBehind", message, since_ns=_known_until_ns(pod))
    if not pod.boots:
        told = "it is gone and never sent a record."
        return Missing(worker.worker_uid, worker.pod, "WorkerLost", told, since_ns=_known_until_ns(pod))
    return _lost_at_the_end(pod, period)


def _lost_at_the_end(pod: Pod, period: Period) -> Missing | None:
    """What a pod that is gone did after its last record. Only a drained boot promised that there is nothing.

    A recovered seal is written by the next boot: that one lived, and never sent a record of its own.
    """
    last = max(pod.boots, key=lambda boot: (boot.started_ns, boot.boot_id))
    own = life_of(pod.spans, last)
    later = [span for span in pod.spans if span.started_ns > (last.sealed_ns if own is None else own.started_ns)]
    if last.seal is Status.NONE:
        return _seal_missing(pod, last, "it is gone")
    if later:
        begun_ns = min(span.started_ns for span in later)
        what = f"it is gone, it started anew at {rfc3339(begun_ns)}"
        return _seal_missing(pod, last, what) if begun_ns < period.end_ns else None
    return None if last.seal is Status.DRAINED else _seal_missing(pod, last, "it is gone, it started anew")


def _seal_missing(pod: Pod, boot: BootFacts, what: str) -> Missing:
    return Missing(
        pod.worker.worker_uid,
        pod.worker.pod,
        "SealMissing",
        f"{what}, and its records after seq {boot.committed_seq} of boot {boot.boot_id} are lost.",
        boot.boot_id,
        since_ns=_known_until_ns(pod) if boot is pod.boots[-1] else 0,
        first_seq=boot.committed_seq + 1 if boot.seal is Status.NONE else 0,
    )


def _known_until_ns(pod: Pod) -> int:
    """Up to when something is known of a pod: what it did until then, or when its first container started."""
    return pod.settled_ns or min((span.started_ns for span in pod.spans), default=0)


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
