"""Records into the database, a page at a time, as fast as it takes them.

Owns the order of the columns of `records`, and PostgreSQL's binary COPY, whose rows are made here: it spares the server
the reading of figures and both sides a body that is twice as long. Begins and ends no transaction; decides nothing.
"""

import struct
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import Any

import psycopg
from psycopg import errors
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_usage.chain import Link
from gpumeter_usage.record import Kind, Status

COLUMNS = tuple(column.name for column in t.records.columns)
ROWS = 250  # that one statement inserts in SQLite; it takes 32,766 parameters at most
_ROW = f"({', '.join('?' * len(COLUMNS))})"
INSERT = f"INSERT INTO records ({', '.join(COLUMNS)}) VALUES {_ROW}"  # noqa: S608
INSERT_MANY = INSERT + (", " + _ROW) * (ROWS - 1)
COPY = f"COPY records ({', '.join(COLUMNS)}) FROM STDIN (FORMAT BINARY)"

# PostgreSQL's documentation, "COPY", File Formats, Binary Format: a signature, flags and the length of an extension;
# then each row as the number of its fields and each field as its length and bytes; -1 in the place of a row at the end.
_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_END = struct.pack(">h", -1)
_FIELDS = struct.pack(">h", len(COLUMNS))
_LENGTH = struct.Struct(">i").pack
_ONE = struct.Struct(">iq").pack
_TWO = struct.Struct(">iqiq").pack
_SEVEN = struct.Struct(">" + 7 * "iq").pack

# An enumeration's `value` is a call, and there are two a record.
_KINDS = {kind: kind.value for kind in Kind}
_STATUSES = {status: status.value for status in Status}

Booked = Iterable[tuple[Any, Link, int]]
"""Each record, its link, and the end of the period in which it is booked."""


class NoPartition(Exception):
    """A record is booked in a day that PostgreSQL has no partition for."""


def insert_records(connection: Connection, booked: Booked) -> None:
    """Insert records straight through the driver: parameters by name cost as much again as the insertion itself.

    Raises NoPartition, and SQLAlchemy's IntegrityError for what a constraint refuses.
    """
    if connection.dialect.name == "sqlite":
        _insert([_row(*each) for each in booked], connection)
        return
    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor, cursor.copy(COPY) as copy:
            copy.write(b"".join((_SIGNATURE, *(_packed(*each) for each in booked), _END)))
    except psycopg.IntegrityError as error:  # as SQLAlchemy has it, which this goes past
        if isinstance(error, errors.CheckViolation) and not error.diag.constraint_name:
            raise NoPartition from error  # the message depends on the server's language; a constraint has a name
        raise IntegrityError(COPY, None, error) from error


def _insert(rows: list[tuple[Any, ...]], connection: Connection) -> None:
    # Each step of a statement gives the interpreter to another thread, which keeps it for milliseconds: a page of
    # single rows would wait five thousand times for threads that read other pages.
    whole = len(rows) - len(rows) % ROWS
    for start in range(0, whole, ROWS):
        connection.exec_driver_sql(INSERT_MANY, tuple(chain.from_iterable(rows[start : start + ROWS])))
    if whole < len(rows):
        connection.exec_driver_sql(INSERT, rows[whole:])


def _row(record: Any, link: Link, end_ns: int) -> tuple[Any, ...]:
    return (
        record.worker_uid,
        record.boot_id,
        record.seq,
        link.hash,
        link.body,
        record.service,
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
    )


def _packed(record: Any, link: Link, end_ns: int) -> bytes:
    body = link.body
    return b"".join(
        (
            _key(record.worker_uid, record.boot_id),
            _ONE(8, record.seq),
            b"\0\0\0\x40",
            link.hash.encode(),
            _LENGTH(len(body)),
            body,
            _text(record.service),
            _TWO(8, end_ns, 8, record.ended_at),
            _names(_KINDS[record.kind], record.account, _STATUSES[record.status], record.tenant, record.session_id),
            _text(record.clock),
            _SEVEN(
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
            ),
        )
    )


@lru_cache(maxsize=4096)
def _text(text: str) -> bytes:
    encoded = text.encode()
    return _LENGTH(len(encoded)) + encoded


@lru_cache(maxsize=4096)
def _key(worker_uid: str, boot_id: str) -> bytes:
    return _FIELDS + _text(worker_uid) + _text(boot_id)


@lru_cache(maxsize=16384)
def _names(*texts: str) -> bytes:
    return b"".join(_LENGTH(len(encoded)) + encoded for encoded in (text.encode() for text in texts))
