"""Records into the database, a page at a time, as fast as it takes them.

Owns the order in which the columns of `records` are written, and PostgreSQL's binary COPY, whose rows are made here: it
spares the server the reading of figures and both sides a body that is twice as long. Begins and ends no transaction;
decides nothing.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psycopg
from msgspec import UNSET, UnsetType
from psycopg import errors
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.billing.reading import Row
from gpumeter_usage.chain import Link
from gpumeter_usage.record import Kind, Record, Status

COLUMNS = tuple(column.name for column in t.records.columns)
ROWS = 250  # that one statement inserts in SQLite; it takes 32,766 parameters at most
_ROW = f"({', '.join('?' * len(COLUMNS))})"
INSERT = f"INSERT INTO records ({', '.join(COLUMNS)}) VALUES {_ROW}"  # noqa: S608
INSERT_MANY = INSERT + (", " + _ROW) * (ROWS - 1)

# What all records of a run share comes first, then what few values recur in, then what is of one length, and the body.
_SHARED = ("worker_uid", "boot_id", "service", "booked_end_ns")
_RECURRING = ("kind", "account", "status", "clock", "tenant", "session_id")
_FIGURES = (
    "seq",
    "ended_at",
    "gpu_ns",
    "prefill_ns",
    "decode_ns",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "batch_ns",
    "kv_byte_s",
)
COPIED = (*_SHARED, *_RECURRING, *_FIGURES, "energy_mj", "hash", "body")
COPY = f"COPY records ({', '.join(COPIED)}) FROM STDIN (FORMAT BINARY)"

# PostgreSQL's documentation, "COPY", File Formats, Binary Format: a signature, flags and the length of an extension;
# then each row as the number of its fields and each field as its length and bytes; -1 in the place of a row at the end.
_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_END = struct.pack(">h", -1)
_FIELDS = struct.pack(">h", len(COPIED))
_LENGTH = struct.Struct(">i").pack
_FIGURE = struct.Struct(">iq").pack
_FIXED = struct.Struct(">" + len(_FIGURES) * "iq").pack
_HASHED = struct.Struct(">i64si").pack  # the hash and the length of the body
_NULL = struct.pack(">i", -1)

# An enumeration's `value` is a call, and there are two a record.
_KINDS = {kind: kind.value for kind in Kind}
_STATUSES = {status: status.value for status in Status}


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive records of one boot, with their links, that are booked in the period that ends at `end_ns`."""

    records: Sequence[Record | Row]
    links: Sequence[Link]
    end_ns: int


class NoPartition(Exception):
    """A record is booked in a day that PostgreSQL has no partition for."""


def insert_records(connection: Connection, runs: Iterable[Run]) -> None:
    """Insert records straight through the driver: parameters by name cost as much again as the insertion itself.

    Raises NoPartition, and SQLAlchemy's IntegrityError for what a constraint refuses.
    """
    if connection.dialect.name == "sqlite":
        _insert(_values(runs), connection)
        return
    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor, cursor.copy(COPY) as copy:
            copy.write(b"".join(_pieces(runs)))
    except psycopg.IntegrityError as error:  # as SQLAlchemy has it, which this goes past
        if isinstance(error, errors.CheckViolation) and not error.diag.constraint_name:
            raise NoPartition from error  # the message depends on the server's language; a constraint has a name
        raise IntegrityError(COPY, None, error) from error


def _insert(values: list[Any], connection: Connection) -> None:
    # Each step of a statement gives the interpreter to another thread, which keeps it for milliseconds: a page of
    # single rows would wait five thousand times for threads that read other pages.
    width = len(COLUMNS)
    many = ROWS * width
    whole = len(values) - len(values) % many
    for start in range(0, whole, many):
        connection.exec_driver_sql(INSERT_MANY, tuple(values[start : start + many]))
    if rest := [tuple(values[start : start + width]) for start in range(whole, len(values), width)]:
        connection.exec_driver_sql(INSERT, rest)


def _values(runs: Iterable[Run]) -> list[Any]:
    """The values of all rows, one row after the other, each in the order of COLUMNS."""
    values: list[Any] = []
    for run in runs:
        first, end_ns = run.records[0], run.end_ns
        worker_uid, boot_id, service = first.worker_uid, first.boot_id, first.service
        for record, (digest, body) in zip(run.records, run.links, strict=True):
            values += (
                worker_uid,
                boot_id,
                record.seq,
                digest,
                body,
                service,
                end_ns,
                record.ended_at,
                _KINDS[record.kind],
                record.account,
                _STATUSES[record.status],
                record.tenant,
                record.session_id,
                record.clock,
                record.gpu_ns,
                record.prefill_ns,
                record.decode_ns,
                record.prompt_tokens,
                record.cached_tokens,
                record.completion_tokens,
                record.batch_ns,
                record.kv_byte_s,
                _stated(record.energy_mj),
            )
    return values


def _pieces(runs: Iterable[Run]) -> list[bytes]:
    """What COPY reads, in pieces; joined once, so that no row's body is copied twice."""
    pieces = [_SIGNATURE]
    for run in runs:
        first = run.records[0]
        shared = _FIELDS + _texts(first.worker_uid, first.boot_id, first.service) + _FIGURE(8, run.end_ns)
        for record, (digest, body) in zip(run.records, run.links, strict=True):
            pieces += (
                shared,
                _texts(
                    _KINDS[record.kind],
                    record.account,
                    _STATUSES[record.status],
                    record.clock,
                    record.tenant,
                    record.session_id,
                ),
                _FIXED(
                    8,
                    record.seq,
                    8,
                    record.ended_at,
                    8,
                    record.gpu_ns,
                    8,
                    record.prefill_ns,
                    8,
                    record.decode_ns,
                    8,
                    record.prompt_tokens,
                    8,
                    record.cached_tokens,
                    8,
                    record.completion_tokens,
                    8,
                    record.batch_ns,
                    8,
                    record.kv_byte_s,
                ),
                _NULL if (energy_mj := _stated(record.energy_mj)) is None else _FIGURE(8, energy_mj),
                _HASHED(64, digest.encode(), len(body)),
                body,
            )
    pieces.append(_END)
    return pieces


def _stated(figure: int | UnsetType | None) -> int | None:
    return None if figure is UNSET else figure


@lru_cache(maxsize=16384)
def _texts(*texts: str) -> bytes:
    return b"".join(_LENGTH(len(encoded)) + encoded for encoded in (text.encode() for text in texts))
