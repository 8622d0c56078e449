"""The accounts of one pod in one period: who owns each nanosecond that Kubernetes allocated to it.

Owns the identity

    allocated = init + load + warmup + attributed + nonbillable + idle + drain + unaccounted

which holds exactly because `unaccounted` is the rest, and the cross-checks beside it, which can fail: what the sessions
of a pod claim must be what the pod itself booked as attributed. Knows no price, tenant or storage.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from gpumeter_operator.billing.facts import Line, Pod, Span, life_of
from gpumeter_usage.period import Period
from gpumeter_usage.record import Account, Kind, Status


@dataclass(frozen=True, slots=True)
class Accounts:
    """GPU-nanoseconds by account. `host_gap` is a part of `idle` and is not added again."""

    allocated: int = 0
    init: int = 0
    load: int = 0
    warmup: int = 0
    attributed: int = 0
    nonbillable: int = 0
    idle: int = 0
    drain: int = 0
    unaccounted: int = 0
    host_gap: int = 0

    @property
    def owned(self) -> int:
        """Everything that has an owner by measurement."""
        return self.init + self.load + self.warmup + self.attributed + self.nonbillable + self.idle + self.drain

    @property
    def platform(self) -> int:
        """What the platform carries: all that was allocated and no tenant used."""
        return self.allocated - self.attributed

    def __add__(self, other: "Accounts") -> "Accounts":
        return Accounts(*(getattr(self, name) + getattr(other, name) for name in NAMES))


NAMES = tuple(field.name for field in fields(Accounts))


@dataclass(frozen=True, slots=True)
class PodAccounts:
    """The accounts of a pod in a period, and a sentence for each cross-check that failed."""

    accounts: Accounts
    problems: tuple[str, ...] = ()


def fold(pod: Pod, period: Period, lines: Iterable[Line], *, until_ns: int, adjusted_ns: int = 0) -> PodAccounts:
    """Book the records and spans of one pod in one period, counting allocation up to `until_ns` at most.

    `lines` are the sums of the records that are booked in this period. `adjusted_ns` is allocation of periods that
    were Final already when it became known. `attributed` is what sessions claim, for that is what tenants pay; a
    difference from what the pod booked as attributed is a problem, and stands in `unaccounted`.
    """
    by_account = dict.fromkeys(Account, 0)
    slices_ns = nonbillable_slices_ns = 0
    for line in lines:
        if line.kind is Kind.ACCOUNT:
            by_account[Account(line.account)] += line.gpu_ns
        elif line.kind is Kind.SESSION and line.account == Account.ATTRIBUTED:
            slices_ns += line.gpu_ns
        elif line.kind is Kind.SESSION:
            nonbillable_slices_ns += line.gpu_ns
    host_gap = by_account[Account.HOST_GAP]
    booked = Accounts(
        allocated=allocated_ns(pod, period, until_ns) + adjusted_ns,
        init=by_account[Account.INIT],
        load=by_account[Account.LOAD],
        warmup=by_account[Account.WARMUP],
        attributed=slices_ns,
        nonbillable=by_account[Account.NONBILLABLE],
        idle=by_account[Account.IDLE] + host_gap,
        drain=by_account[Account.DRAIN] + drain_tail_ns(pod, period, until_ns),
        host_gap=host_gap,
    )
    problems = []
    if slices_ns != by_account[Account.ATTRIBUTED]:
        problems.append(
            f"pod {pod.worker.pod}: the slices of sessions sum to {slices_ns} ns, the pod booked "
            f"{by_account[Account.ATTRIBUTED]} ns as attributed"
        )
    if nonbillable_slices_ns > by_account[Account.NONBILLABLE]:
        problems.append(
            f"pod {pod.worker.pod}: sessions show {nonbillable_slices_ns} ns of nonbillable work, the pod booked "
            f"{by_account[Account.NONBILLABLE]} ns"
        )
    return PodAccounts(Accounts(*_with_rest(booked)), tuple(problems))


def allocated_ns(pod: Pod, period: Period, until_ns: int) -> int:
    """Container start to container end times devices, as far as it lies in the period and before `until_ns`."""
    return overlap_ns(pod.spans, pod.worker.devices, period.start_ns, min(period.end_ns, until_ns))


def overlap_ns(spans: Iterable[Span], devices: int, start_ns: int, end_ns: int) -> int:
    """GPU-nanoseconds of these spans between two times; a span without an end runs on."""
    total = 0
    for span in spans:
        span_end_ns = end_ns if span.ended_ns is None else span.ended_ns
        total += max(0, min(end_ns, span_end_ns) - max(start_ns, span.started_ns))
    return total * devices


def drain_tail_ns(pod: Pod, period: Period, until_ns: int) -> int:
    """From the seal of a worker that stopped in order to the end of its container: it promised to run nothing.

    The tail ends with the container, and never reaches into the next boot.
    """
    total = 0
    for boot in pod.boots:
        if boot.seal is not Status.DRAINED:
            continue
        span = life_of(pod.spans, boot)
        if span is None:
            continue
        end_ns = min(period.end_ns, until_ns) if span.ended_ns is None else span.ended_ns
        later = [other.started_ns for other in pod.boots if other.started_ns > boot.started_ns]
        end_ns = min([end_ns, period.end_ns, until_ns, *later])
        total += max(0, end_ns - max(period.start_ns, boot.sealed_ns))
    return total * pod.worker.devices


def horizon_ns(pod: Pod, period: Period, now_ns: int, *, final: bool) -> int:
    """Up to when the pod's allocation is reckoned in a report that may still change.

    A running worker's lag is not a loss: until the period is closed, allocation is counted as far as its records
    reach. A Final report, and a pod that will send nothing more, is counted whole.
    """
    if final:
        return period.end_ns
    newest = max(pod.boots, key=lambda boot: boot.started_ns, default=None)
    if newest is not None and newest.seal is Status.DRAINED and newest.sealed_ns <= pod.settled_ns:
        return min(period.end_ns, now_ns)
    if pod.gone:
        return min(period.end_ns, now_ns)
    return min(period.end_ns, pod.settled_ns)


def _with_rest(booked: Accounts) -> Iterable[int]:
    for name in NAMES:
        yield booked.allocated - booked.owned if name == "unaccounted" else getattr(booked, name)
