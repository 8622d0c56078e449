"""Reads the records of a page as fast as bytes can be read, and as strictly as the contract does.

Owns a short way for records as every worker of ours writes them. Whatever is odd about a record takes the contract's
own way (`gpumeter_usage.record.parse`), which says in a sentence what is wrong, or reads it: nothing is acceptable here
that is not so there, and a property test holds the two against each other. (The contract stands on the standard library
alone, and its way takes ten times as long.)
"""

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


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A record: the same fields as gpumeter_usage.record.Record."""

    worker_uid: _Text
    boot_id: _Text
    seq: _Count
    kind: Kind
    account: _Text
    session_id: _Text
    tenant: _Text
    service: _Text
    model: _Text
    started_at: _Count
    ended_at: _Count
    gpu_ns: _Count
    prefill_ns: _Count
    decode_ns: _Count
    prompt_tokens: _Count
    cached_tokens: _Count
    completion_tokens: _Count
    steps: _Count
    batch_ns: _Count
    kv_byte_s: _Count
    gpu_uuid: _Text
    gpu_class: _Text
    clock: _Text
    profile_hash: _Text
    status: Status


_DECODE = msgspec.json.Decoder(Row).decode
_ACCOUNTS = frozenset(account.value for account in Account)
_OF_SESSIONS = frozenset({Account.ATTRIBUTED.value, Account.NONBILLABLE.value})
_SESSION_STATUSES = ENDED | {Status.OPEN}
_SEALS = frozenset({Status.DRAINED, Status.RECOVERED})


def read(body: bytes) -> Record | Row:
    """Read a record from its bytes. Raises RecordInvalid with the first thing that is wrong."""
    # Printable, without a look at each string: plain ASCII holds no other characters than these where none is escaped.
    if not body.isascii() or b"\\" in body or b"\x7f" in body or len(body) > MAX_BODY_BYTES:
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
