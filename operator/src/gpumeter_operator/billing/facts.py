"""The ledger's facts as billing reads them: pods, container spans, boots, and sums of records.

Owns the frozen shapes that the ledger hands out and billing folds, and the one way in which records become sums.
Does not know where facts come from or what they cost.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gpumeter_usage.balance import BALANCED, Open
from gpumeter_usage.record import ENDED, Account, Kind, Record, Status

PLATFORM = "_platform"
"""The reserved tenant that owns what no tenant used."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker pod, as Kubernetes states it. `devices` is the number of GPUs (1 for a CPU service)."""

    worker_uid: str
    namespace: str
    service: str
    service_uid: str
    model: str
    gpu_class: str
    devices: int
    pod: str

    @property
    def service_key(self) -> str:
        """The service as records name it."""
        return f"{self.namespace}/{self.service}"


@dataclass(frozen=True, slots=True)
class Span:
    """One life of the worker's container in UTC nanoseconds (whole seconds, as Kubernetes states them).

    `ended_ns` is None while nothing says that it ended; `end_known` is False where the pod vanished without telling,
    and `ended_ns` is then the last sign of it.
    """

    container_id: str
    started_ns: int
    ended_ns: int | None = None
    end_known: bool = False


@dataclass(frozen=True, slots=True)
class Spent:
    """What a boot's records have claimed so far: since when, by accounts, and by sessions' slices; `open` of these is
    what no account has booked yet. `tokens`: how many its sessions computed."""

    began_ns: int = 0
    accounts_ns: int = 0
    slices_ns: int = 0
    open: Open = BALANCED
    tokens: int = 0


NOTHING = Spent()


@dataclass(frozen=True, slots=True)
class BootFacts:
    """One boot's chain in the ledger: where it stands, how it was sealed (`Status.NONE` while it is not), and the time
    that it has claimed by accounts and by sessions' slices, of which no account has booked what is `open`, and the
    tokens that its sessions computed."""

    boot_id: str
    started_ns: int
    committed_seq: int
    head_hash: str
    seal: Status = Status.NONE
    sealed_ns: int = 0
    accounts_ns: int = 0
    slices_ns: int = 0
    open: Open = BALANCED
    tokens: int = 0

    @property
    def spent(self) -> Spent:
        """What its records have claimed."""
        return Spent(self.started_ns, self.accounts_ns, self.slices_ns, self.open, self.tokens)


@dataclass(frozen=True, slots=True)
class Gap:
    """Records of a boot that are gone: acknowledged, trimmed, and not in this ledger.

    The record after them is chained to `last_hash`. What they booked ended after `after_ns` and at `until_ns` at the
    latest. `reason` is a sentence, `made_ns` when it was found.
    """

    boot_id: str
    first_seq: int
    last_seq: int
    last_hash: str
    after_ns: int
    until_ns: int
    reason: str
    made_ns: int


@dataclass(frozen=True, slots=True)
class Pod:
    """Everything that the ledger knows of one worker pod, but for its records.

    `settled_ns`: every record of usage that ended at or before is committed. `gone`: the pod is no more, nothing
    can be asked of it. `problem` says in a sentence why the last attempt to collect from it failed ("" if it did not).
    """

    worker: Worker
    spans: tuple[Span, ...] = ()
    boots: tuple[BootFacts, ...] = ()
    settled_ns: int = 0
    gone: bool = False
    problem: str = ""
    gaps: tuple[Gap, ...] = ()


def life_of(spans: Iterable[Span], boot: BootFacts) -> Span | None:
    """The container of a boot: the one whose start is nearest to the boot's.

    Kubernetes rounds a start down to the second, so most boots begin after it. But the runtime forks the process before
    it starts the container and looks at the clock, so a boot may begin a moment before its container, too.
    """
    return min(spans, key=lambda span: (abs(span.started_ns - boot.started_ns), span.started_ns), default=None)


@dataclass(frozen=True, slots=True)
class Adjustment:
    """Something of a closed period that became known after it was Final, and is booked in a later one instead.

    Late records are booked as themselves (`allocated_ns` is 0); `allocated_ns` is by how much the allocation of closed
    periods was too small (negative: too large), because a container's start or end became known late. `first_seq` to
    `last_seq` of `boot_id` are the late records, 0 where it is about none; `reason` is a sentence.
    """

    worker_uid: str
    closed_end_ns: int
    booked_end_ns: int
    allocated_ns: int
    reason: str
    boot_id: str = ""
    first_seq: int = 0
    last_seq: int = 0
    actor: str = "gpumeter-collector"

    @property
    def word(self) -> str:
        """The reason in one word."""
        return "LateRecords" if self.first_seq else "LateContainer"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of one model; `cached` is the part of `prompt` that came from the prefix cache."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.cached + other.cached, self.completion + other.completion)

    def __neg__(self) -> "Tokens":
        return Tokens(-self.prompt, -self.cached, -self.completion)


@dataclass(frozen=True, slots=True)
class Correction:
    """What somebody found wrong with a Final report, booked in a later period: the tenant's time of the report's period
    is `gpu_ns` more (negative: less), and the platform's as much less.

    Where the report was billed by standard rates it is of `tokens` of a `model` instead: their price moves between the
    tenant and the platform, and no time does. One of time has no model.

    `report` is the name of that report, `report_digest` the SHA-256 of its bytes. It is of the part of that period that
    begins at `part_start_ns`, and has its price; the plan is the version of that part. None, as versions before booked
    it: of the part with which the period begins. `reason` is the sentence of `actor`, who answers for it.
    """

    id: str
    namespace: str
    service: str
    tenant: str
    report: str
    report_digest: str
    closed_start_ns: int
    closed_end_ns: int
    booked_end_ns: int
    gpu_class: str
    gpu_ns: int
    plan_name: str
    plan_version: int
    plan_hash: str
    reason: str
    actor: str
    made_ns: int
    part_start_ns: int | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def tokens(self) -> Tokens | None:
        """The tokens that it is of; None where it is of time."""
        if self.model is None:
            return None
        return Tokens(self.prompt_tokens or 0, self.cached_tokens or 0, self.completion_tokens or 0)

    @property
    def told(self) -> str:
        """By how much it corrects."""
        of = self.tokens
        if of is None:
            return f"{self.gpu_ns:+d} ns"
        return f"{of.prompt:+d} prompt tokens ({of.cached:+d} of them cached) and {of.completion:+d} of answers"

    @property
    def priced_ns(self) -> int:
        """The start of the part of time whose price it has."""
        return self.closed_start_ns if self.part_start_ns is None else self.part_start_ns


@dataclass(frozen=True, slots=True)
class Line:
    """The sum of records that share a boot, kind, account, tenant and clock. Order changes nothing."""

    worker_uid: str
    boot_id: str
    kind: Kind
    account: str
    tenant: str
    clock: str
    records: int = 0
    first_seq: int = 0
    last_seq: int = 0
    sessions: int = 0
    gpu_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    batch_ns: int = 0
    kv_byte_s: int | None = None  # these two are None where no record states them
    energy_mj: int | None = None

    @property
    def owner(self) -> str:
        """The tenant in whose report these records stand; what names no tenant is the platform's."""
        return self.tenant or PLATFORM


# Names of fields, each the same wherever records are summed; FIGURES are the last of a Line, in its order.
COUNTED = ("records", "sessions")
USED = ("gpu_ns", "prefill_ns", "decode_ns", "prompt_tokens", "cached_tokens", "completion_tokens")
STATED = ("kv_byte_s", "energy_mj")  # None where no record states them
FIGURES = (*USED, "batch_ns", *STATED)


def line_of(record: Record) -> Line:
    """One record as a sum of one. A session is counted where its last slice is."""
    return Line(
        worker_uid=record.worker_uid,
        boot_id=record.boot_id,
        kind=record.kind,
        account=record.account,
        tenant=record.tenant,
        clock=record.clock,
        records=1,
        first_seq=record.seq,
        last_seq=record.seq,
        sessions=int(record.status in ENDED and record.account == Account.ATTRIBUTED),
        gpu_ns=record.gpu_ns,
        prefill_ns=record.prefill_ns,
        decode_ns=record.decode_ns,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.completion_tokens,
        batch_ns=record.batch_ns,
        kv_byte_s=record.kv_byte_s,
        energy_mj=record.energy_mj,
    )


def sum_of_stated(figures: Iterable[int | None]) -> int | None:
    """The sum of those that are stated; None where none is."""
    stated = [figure for figure in figures if figure is not None]
    return sum(stated) if stated else None


def merge(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Add up lines of the same key; the result is in the order of the keys, whatever order they came in."""
    merged: dict[tuple[str, ...], Line] = {}
    for line in lines:
        key = (line.worker_uid, line.boot_id, line.kind, line.account, line.tenant, line.clock)
        known = merged.get(key)
        if known is None:
            merged[key] = line
            continue
        sums = {name: getattr(known, name) + getattr(line, name) for name in (*COUNTED, *USED, "batch_ns")}
        sums |= {name: sum_of_stated((getattr(known, name), getattr(line, name))) for name in STATED}
        merged[key] = replace(
            known,
            first_seq=min(known.first_seq, line.first_seq),
            last_seq=max(known.last_seq, line.last_seq),
            **sums,
        )
    return tuple(merged[key] for key in sorted(merged))
