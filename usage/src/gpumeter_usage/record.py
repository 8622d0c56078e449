"""The usage record: what a worker states about one slice of time, and the bytes in which it states it.

Owns the fields, their canonical form, and what makes a record unacceptable whatever its source. Does not know how
records are stored, carried or priced.
"""

import json
from dataclasses import dataclass, fields
from enum import StrEnum
from operator import attrgetter

MAX_INTEGER = 2**63 - 1
MAX_STRING_CHARS = 256
MAX_BODY_BYTES = 8192


class Kind(StrEnum):
    """What a record is about."""

    SESSION = "session"  # a slice of one session's usage
    ACCOUNT = "account"  # the change of one account of the pod since the last flush
    SEAL = "seal"  # the chain of this boot ends here


class Account(StrEnum):
    """Where a worker's nanosecond belongs. It cannot know `allocated` and `unaccounted`: those are the ledger's."""

    INIT = "init"  # process start to the first byte of weights
    LOAD = "load"  # weights to the GPU
    WARMUP = "warmup"  # capture, compile, calibration
    ATTRIBUTED = "attributed"  # measured steps, owned by sessions
    NONBILLABLE = "nonbillable"  # work that the platform caused
    IDLE = "idle"  # ready and nothing to do
    HOST_GAP = "host_gap"  # between steps while sessions are in flight; reported as a part of idle
    DRAIN = "drain"  # after SIGTERM, minus the sessions' own steps


class Status(StrEnum):
    """How far a session is with this slice, or how a chain ended."""

    OPEN = "open"  # more slices of this session follow
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    DRAINED = "drained"  # seal: the worker stopped in order and runs nothing more
    RECOVERED = "recovered"  # seal: written by the next boot, after a crash
    NONE = ""


ENDED = frozenset({Status.FINISHED, Status.CANCELLED, Status.FAILED})


class RecordInvalid(ValueError):
    """A record that no ledger may accept; the message is a sentence that names the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One immutable statement of a worker. Times are UTC nanoseconds since 1970, durations GPU-nanoseconds.

    The key is (worker_uid, boot_id, seq). `batch_ns` is the sum over steps of share x sequences in the step, so that
    batch_ns / gpu_ns is the mean batch size; `kv_byte_s` the KV cache that the session held, in byte-seconds: eighty
    gigabytes for a year stay below 2^63, which byte-nanoseconds leave after nine gigabyte-seconds. What a slice rounds
    off is in the session's next one. Each sequence of a session counts as if its cache
    were its own, also while steps leave it out.

    `energy_mj` is what the whole GPU drew in the windows that closed since the last such statement, in millijoules, an
    estimate that nobody is billed by. Only an account record states it, of `attributed` or of `idle` for all that is
    the platform's; where nobody measured it, it is None and stands in no bytes.
    """

    worker_uid: str
    boot_id: str
    seq: int
    kind: Kind
    account: str
    session_id: str = ""
    tenant: str = ""
    service: str
    model: str
    started_at: int
    ended_at: int
    gpu_ns: int
    prefill_ns: int = 0
    decode_ns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    batch_ns: int = 0
    kv_byte_s: int = 0
    energy_mj: int | None = None
    gpu_uuid: str = ""
    gpu_class: str
    clock: str
    profile_hash: str = ""
    status: Status = Status.NONE


_NAMES = frozenset(field.name for field in fields(Record))
_OPTIONAL = frozenset(field.name for field in fields(Record) if field.type == int | None)
REQUIRED = _NAMES - _OPTIONAL
"""The fields that every record has. Another may be absent, as in records of builds that did not know it."""

_INTEGERS = tuple(field.name for field in fields(Record) if field.type is int)
_STRINGS = tuple(name for name in sorted(REQUIRED) if name not in _INTEGERS)

# A record is a flat row of scalars: read in the order of its sorted names, it needs no deep copy and no sorting.
_SORTED = tuple(sorted(_NAMES))
_VALUES = attrgetter(*_SORTED)
_ENCODE = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def canonical(record: Record, seq: int | None = None) -> bytes:
    """The bytes that travel, are hashed and are kept: JSON in UTF-8, sorted keys, no spaces, integers and strings.

    `seq` is the number that a store gives it, in place of the record's own.
    """
    values = dict(zip(_SORTED, _VALUES(record), strict=True))
    if record.energy_mj is None:
        del values["energy_mj"]
    if seq is not None:
        values["seq"] = seq
    return _ENCODE(values).encode()


def parse(body: bytes) -> Record:
    """Read a record from its bytes. Raises RecordInvalid with the first thing that is wrong."""
    if len(body) > MAX_BODY_BYTES:
        raise RecordInvalid(f"a record of {len(body)} bytes; at most {MAX_BODY_BYTES} are accepted")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RecordInvalid(f"a record is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RecordInvalid("a record is not a JSON object")
    if not REQUIRED <= values.keys() <= _NAMES:
        odd = ", ".join(sorted((values.keys() ^ _NAMES) - (_OPTIONAL - values.keys())))
        raise RecordInvalid(f"a record has missing or unknown fields: {odd}")
    for name in (*_INTEGERS, *(_OPTIONAL & values.keys())):
        value = values[name]
        if type(value) is not int or not 0 <= value <= MAX_INTEGER:
            raise RecordInvalid(f"{name} is {value!r:.60}; it must be a whole number from 0 to {MAX_INTEGER}")
    for name in _STRINGS:
        value = values[name]
        if type(value) is not str or len(value) > MAX_STRING_CHARS or not value.isprintable():
            raise RecordInvalid(
                f"{name} is {value!r:.60}; it must be a string of at most {MAX_STRING_CHARS} printable characters"
            )
    try:
        values["kind"], values["status"] = Kind(values["kind"]), Status(values["status"])
    except ValueError as error:
        raise RecordInvalid(f"unknown kind or status: {error}") from None
    record = Record(**values)
    _refuse_contradictions(record)
    return record


def _refuse_contradictions(record: Record) -> None:
    if record.seq < 1:
        raise RecordInvalid("seq is 0; sequence numbers start at 1")
    if not record.worker_uid or not record.boot_id or not record.service:
        raise RecordInvalid("worker_uid, boot_id and service must not be empty")
    if record.ended_at < record.started_at:
        raise RecordInvalid(f"ended_at {record.ended_at} lies before started_at {record.started_at}")
    if record.energy_mj is not None and record.kind is not Kind.ACCOUNT:
        raise RecordInvalid("energy_mj is the whole GPU's; only an account record states it")
    if record.kind is Kind.SEAL:
        if record.status not in (Status.DRAINED, Status.RECOVERED) or record.gpu_ns:
            raise RecordInvalid("a seal has the status drained or recovered, and no time of its own")
        return
    if record.account not in Account.__members__.values():
        raise RecordInvalid(f"unknown account {record.account!r:.60}")
    if record.kind is Kind.ACCOUNT:
        if record.session_id or record.tenant or record.status is not Status.NONE:
            raise RecordInvalid("an account record names no session, tenant or status")
        return
    if record.account not in (Account.ATTRIBUTED, Account.NONBILLABLE):
        raise RecordInvalid(f"a session cannot own time of the account {record.account!r:.60}")
    if not record.session_id or not record.tenant:
        raise RecordInvalid("a session record names its session_id and its tenant")
    if record.status not in ENDED and record.status is not Status.OPEN:
        raise RecordInvalid("a session record has the status open, finished, cancelled or failed")
    if record.prefill_ns + record.decode_ns != record.gpu_ns:
        raise RecordInvalid("prefill_ns + decode_ns must equal gpu_ns")
