"""Reads the records of a page as fast as bytes can be read, and as strictly as the contract does.

Owns a short way for records as every worker of ours writes them. Whatever is odd about a record takes the contract's
own way (`gpumeter_usage.record.parse`), which says in a sentence what is wrong, or reads it: nothing is acceptable here
that is not so there, and a property test holds the two against each other. (The contract stands on the standard library
alone, and its way takes ten times as long.)
"""

from collections.abc import Callable, Iterable
from typing import Annotated

import msgspec

from gpumeter_usage.record import (
    ENDED,
    MAX_BODY_BYTES,
    MAX_INTEGER,
    MAX_STRING_CHARS,
    Account,
    Kind,
    Record,
    Status,
    parse,
)

_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_STRING_CHARS)]


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A record: the same fields as gpumeter_usage.record.Record, in the canonical form's order, in which they are
    expected and found quickest. `energy_mj` is UNSET where a record does not state it: no other value is free for
    that, for JSON's null is none that a record may hold."""

    account: _Text
    batch_ns: _Count
    boot_id: _Text
    cached_tokens: _Count
    clock: _Text
    completion_tokens: _Count
    decode_ns: _Count
    ended_at: _Count
    energy_mj: _Count | msgspec.UnsetType = msgspec.UNSET
    gpu_class: _Text
    gpu_ns: _Count
    gpu_uuid: _Text
    kind: Kind
    kv_byte_s: _Count
    model: _Text
    prefill_ns: _Count
    profile_hash: _Text
    prompt_tokens: _Count
    seq: _Count
    service: _Text
    session_id: _Text
    started_at: _Count
    status: Status
    steps: _Count
    tenant: _Text
    worker_uid: _Text


_DECODE = msgspec.json.Decoder(Row).decode
_ACCOUNTS = frozenset(account.value for account in Account)
_OF_SESSIONS = frozenset({Account.ATTRIBUTED.value, Account.NONBILLABLE.value})
_SESSION_STATUSES = ENDED | {Status.OPEN}
_SEALS = frozenset({Status.DRAINED, Status.RECOVERED})


def reader(bodies: Iterable[bytes]) -> Callable[[bytes], Record | Row]:
    """The quickest way to read these: `read`, or the same without a look at each one's characters."""
    return _read_plain if _is_plain(b"".join(bodies)) else read


def read(body: bytes) -> Record | Row:
    """Read a record from its bytes. Raises RecordInvalid with the first thing that is wrong."""
    return _read_plain(body) if _is_plain(body) else parse(body)


def _is_plain(data: bytes) -> bool:
    # Printable, without a look at each string: plain ASCII holds no other characters than these where none is escaped.
    return data.isascii() and b"\\" not in data and b"\x7f" not in data


def _read_plain(body: bytes) -> Record | Row:
    if len(body) > MAX_BODY_BYTES:
        return parse(body)
    try:
        row = _DECODE(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return parse(body)
    return row if _is_consistent(row) else parse(body)


def _is_consistent(row: Row) -> bool:
    if row.seq < 1 or row.ended_at < row.started_at or not (row.worker_uid and row.boot_id and row.service):
        return False
    kind = row.kind
    if kind is not Kind.ACCOUNT and row.energy_mj is not msgspec.UNSET:
        return False
    if kind is Kind.SESSION:
        return (
            row.account in _OF_SESSIONS
            and row.status in _SESSION_STATUSES
            and row.session_id != ""
            and row.tenant != ""
            and row.prefill_ns + row.decode_ns == row.gpu_ns
        )
    if kind is Kind.ACCOUNT:
        return row.account in _ACCOUNTS and row.status is Status.NONE and not row.session_id and not row.tenant
    return row.status in _SEALS and not row.gpu_ns
