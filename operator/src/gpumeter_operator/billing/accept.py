"""What makes a page acceptable to this ledger, beyond being well-formed.

Owns every check of untrusted records against the pod that sent them: whose they are, that they are consecutive and
chained, that sessions claim what their pod booked, to the nanosecond, and that no number or time is beyond what a
worker can have measured. Pure; the caller says what time it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gpumeter_operator.billing.counts import FREE_TOKENS, TOKEN_NS, counts_of, impossible
from gpumeter_operator.billing.facts import NOTHING, PLATFORM, BootFacts, Spent, Worker
from gpumeter_operator.billing.reading import Row, reader
from gpumeter_usage.balance import SlicesDisagree, balance
from gpumeter_usage.chain import ChainBroken, verify
from gpumeter_usage.page import Page
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, rfc3339
from gpumeter_usage.record import MAX_INTEGER, Kind, Record, RecordInvalid
from gpumeter_usage.tenant import tenant_problem

CLOCK_SKEW_NS = 60 * SECOND_NS
"""How far a node's clock may be ahead of ours. NTP holds it to milliseconds; a minute still closes no period early. It
is why a boot may claim that much more than it lived: of that time only Kubernetes' clock knows, and it is another one.
What sessions claim of it is compared with the pod's own accounts, and needs no clock."""

MAX_RECORD_NS = 60 * MINUTE_NS
"""The most GPU time per device in one record. Records are slices of at most a minute, and one step may straddle; an
hour is far beyond either."""

EARLIEST_NS = 1_577_836_800 * SECOND_NS
"""2020, before the first of these ledgers: a node whose clock is there has lost the time (one without a battery begins
in 1970), and retention, which goes by days, would never come to what is booked there."""

CLOCK_DRIFT_PER_MILLE = 1
"""How much faster than UTC a worker's monotonic clock may run; crystals are a tenth of that off at worst."""


class PageRefused(ValueError):
    """A page that the ledger must not take. `reason` is one CamelCase word, the message a sentence.

    `kept` says where an alarm of it is in the ledger already, and whether that was a new one.
    """

    def __init__(self, reason: str, message: str, *, kept: bool | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.kept = kept


@dataclass(frozen=True, slots=True)
class Accepted:
    """The records of a page that continue the chain, its new head, and what the boot has claimed with them."""

    records: tuple[Record | Row, ...]
    head_hash: str
    spent: Spent


def refuse_foreign(worker: Worker, worker_uid: str, service: str) -> None:
    """Raise PageRefused unless what was sent names the very pod and service that was asked."""
    if worker_uid != worker.worker_uid:
        raise PageRefused(
            "ForeignWorker", f"it speaks for the worker {worker_uid:.64}; pod {worker.pod} is {worker.worker_uid}"
        )
    if service != worker.service_key:
        raise PageRefused(
            "ForeignService", f"it speaks for the service {service:.128}; pod {worker.pod} serves {worker.service_key}"
        )


def refuse_future(what: str, at_ns: int, now_ns: int) -> None:
    """Raise PageRefused where a time lies further ahead than clocks differ."""
    if at_ns > now_ns + CLOCK_SKEW_NS:
        raise PageRefused(
            "FutureTime",
            f"{what} is {rfc3339(min(at_ns, 2**62))}, which is yet to come; check the clock of the node",
        )


@dataclass(frozen=True, slots=True)
class OfPod:
    """What is known of a page's pod beside the boot: when its first container started, as Kubernetes says (0 where that
    is not known; no boot of it can have begun before, whatever its records say), and the GPU-nanoseconds that the
    sessions of its other boots claim."""

    since_ns: int = 0
    others_ns: int = 0


UNKNOWN = OfPod()


def others_ns(boots: Iterable[BootFacts], boot_id: str) -> int:
    """What the sessions of a pod's boots claim, but for this one."""
    return sum(boot.slices_ns for boot in boots if boot.boot_id != boot_id)


def accept(
    page: Page,
    worker: Worker,
    previous_hash: str,
    now_ns: int,
    *,
    spent: Spent = NOTHING,
    of_pod: OfPod = UNKNOWN,
    whole: bool = False,
) -> Accepted:
    """Check a page whose first record must follow `previous_hash` at seq `page.after` + 1. Raises PageRefused.

    `spent` is what the boot has claimed before this page. `whole`: the journal ends with this page, and so with a
    flush, which leaves no slice of a session that its pod did not book. Any other page may be cut within a flush; then
    the next one is judged by what this one left open.
    """
    refuse_foreign(worker, page.worker_uid, page.service)
    refuse_future("the page's watermark", page.watermark_ns, now_ns)
    try:
        head_hash = verify(previous_hash, page.links)
    except ChainBroken as error:
        raise PageRefused("ChainBroken", f"boot {page.boot_id:.64} after seq {page.after}: {error}") from None
    records: list[Record | Row] = []
    tenants = {"", PLATFORM}  # that were looked at in this page
    sealed = False
    read = reader(link.body for link in page.links)
    for seq, link in enumerate(page.links, start=page.after + 1):
        if sealed:
            raise PageRefused("AfterSeal", f"boot {page.boot_id:.64} goes on at seq {seq} after its seal")
        try:
            record = read(link.body)
        except RecordInvalid as error:
            raise PageRefused("RecordInvalid", f"boot {page.boot_id:.64} seq {seq}: {error}") from None
        _refuse_record(record, seq, page, worker, now_ns)
        if record.tenant not in tenants:
            if problem := tenant_problem(record.tenant):
                raise PageRefused("TenantInvalid", f"boot {page.boot_id:.64} seq {seq}: {problem}")
            tenants.add(record.tenant)
        records.append(record)
        sealed = record.kind is Kind.SEAL
    if records:
        spent = _refuse_unbooked(page, records, spent, whole=whole)
        spent = _refuse_too_much(page, worker, records, spent, of_pod)
        _refuse_more_than_its_pod_lived(page, worker, spent, of_pod, now_ns)
    return Accepted(tuple(records), head_hash, spent)


def _refuse_unbooked(page: Page, records: list[Record | Row], before: Spent, *, whole: bool) -> Spent:
    """Raise PageRefused where sessions claim another time than their pod booked; what was spent, with what is open."""
    try:
        left = balance(before.open, records)
    except SlicesDisagree as error:
        raise PageRefused("SlicesDisagree", f"boot {page.boot_id:.64} seq {records[error.at].seq}: {error}") from None
    if whole and left.gpu_ns:
        raise PageRefused(
            "SlicesDisagree",
            f"boot {page.boot_id:.64}: its journal ends at seq {records[-1].seq} with sessions' slices that sum to "
            f"{left.gpu_ns} ns, and the account attributed has none of it",
        )
    return replace(before, open=left)


def _refuse_too_much(page: Page, worker: Worker, records: list[Record | Row], before: Spent, of_pod: OfPod) -> Spent:
    """Raise PageRefused where a boot claims more time than has passed on its devices since it began, or its sessions
    more tokens than fit into theirs. What is open counts as booked: its account is yet to come."""
    accounts_ns, slices_ns, tokens = before.accounts_ns, before.slices_ns, before.tokens
    first_ns, last_ns = records[0].started_at, 0
    for record in records:
        if record.kind is Kind.ACCOUNT:
            accounts_ns += record.gpu_ns
        elif record.kind is Kind.SESSION:
            slices_ns += record.gpu_ns
            tokens += record.prompt_tokens - record.cached_tokens + record.completion_tokens
        first_ns = min(first_ns, record.started_at)
        last_ns = max(last_ns, record.ended_at)
    began_ns = before.began_ns or first_ns
    most_ns = _most_ns(last_ns - max(began_ns, of_pod.since_ns - CLOCK_SKEW_NS), worker)
    for what, claimed_ns in (("sessions", slices_ns), ("accounts", accounts_ns + before.open.gpu_ns)):
        if claimed_ns > most_ns:
            raise PageRefused(
                "MoreThanTime",
                f"boot {page.boot_id:.64}: its {what} claim {claimed_ns} ns up to seq {records[-1].seq}; on "
                f"{worker.devices} device(s) it cannot have spent more than {most_ns} ns by then",
            )
    if tokens > FREE_TOKENS + slices_ns // TOKEN_NS:
        raise PageRefused(
            "CountTooLarge",
            f"boot {page.boot_id:.64}: its sessions claim {tokens} computed tokens up to seq {records[-1].seq}, more "
            f"than any device computes in the {slices_ns} ns that they claim",
        )
    return Spent(began_ns, accounts_ns, slices_ns, before.open, tokens)


def _refuse_more_than_its_pod_lived(page: Page, worker: Worker, spent: Spent, of_pod: OfPod, now_ns: int) -> None:
    """Raise PageRefused where the boots of a pod claim more time together than has passed since its first container
    started. By our clock: boots come in any order, and a later one may have told of its end before this one is read."""
    most_ns, claimed_ns = _most_ns(now_ns - of_pod.since_ns, worker), spent.slices_ns + of_pod.others_ns
    if of_pod.since_ns and claimed_ns > most_ns:
        raise PageRefused(
            "MoreThanTime",
            f"boot {page.boot_id:.64}: with it the sessions of its pod's boots claim {claimed_ns} ns; on "
            f"{worker.devices} device(s) they cannot have spent more than {most_ns} ns since the pod's first container "
            f"started",
        )


def _most_ns(lived_ns: int, worker: Worker) -> int:
    """The most time that the devices of a pod can have spent while so much passed by another clock."""
    lived_ns = max(0, lived_ns)
    return min((lived_ns + lived_ns * CLOCK_DRIFT_PER_MILLE // 1000 + CLOCK_SKEW_NS) * worker.devices, MAX_INTEGER)


def _refuse_record(record: Record | Row, seq: int, page: Page, worker: Worker, now_ns: int) -> None:
    if record.worker_uid != page.worker_uid or record.boot_id != page.boot_id or record.service != page.service:
        raise PageRefused(
            "ForeignRecord",
            f"a record at seq {seq} names worker {record.worker_uid:.64}, boot {record.boot_id:.64}, service "
            f"{record.service:.128}; the page is of {page.worker_uid}, {page.boot_id:.64}, {page.service:.128}",
        )
    if record.seq != seq:
        raise PageRefused("SequenceGap", f"boot {page.boot_id:.64}: seq {seq} is missing, {record.seq} was sent")
    if record.ended_at > now_ns + CLOCK_SKEW_NS:
        refuse_future(f"ended_at of boot {page.boot_id:.64} seq {seq}", record.ended_at, now_ns)
    if record.ended_at < EARLIEST_NS:
        raise PageRefused(
            "PastTime",
            f"ended_at of boot {page.boot_id:.64} seq {seq} is {rfc3339(record.ended_at)}, before "
            f"{rfc3339(EARLIEST_NS)}; check the clock of the node, and restart the pod when it is right",
        )
    if record.gpu_ns > MAX_RECORD_NS * worker.devices:
        raise PageRefused(
            "CountTooLarge",
            f"boot {page.boot_id:.64} seq {seq} claims {record.gpu_ns} ns on {worker.devices} device(s); a record is "
            f"a slice of at most a minute",
        )
    if told := impossible(counts_of(record)):
        raise PageRefused("CountTooLarge", f"boot {page.boot_id:.64} seq {seq} claims {told}")
