"""The journal's file: how it is opened and kept small, and what becomes of a disk that refuses.

Owns SQLite's settings, the difference between a full disk and a broken one, and the sentence for each. Does not know
what is in the file, but for the chain that its records make.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpumeter_usage.chain import ChainBroken, Link, verify

FILE_NAME = "journal.sqlite"
LOG_BYTES = 2**20
"""A write-ahead log of this size is folded into the file and cut back. The reserve must hold as much: on a full disk
the file may have to grow by what is in the log before the log's room is free."""

_PAGE_BYTES = 4096
SETTINGS = (
    "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
    f"PRAGMA wal_autocheckpoint={LOG_BYTES // _PAGE_BYTES}; PRAGMA journal_size_limit={LOG_BYTES};"
)


class JournalUnusable(Exception):
    """The journal cannot be opened, read or written; the message is a sentence with what to do."""


class Damaged(JournalUnusable):
    """Something that was written cannot be read any more."""


class DiskFull(JournalUnusable):
    """There is no room; this passes when somebody makes some, or acknowledges what is here."""


def check_directory(directory: Path) -> None:
    """Raises JournalUnusable when nothing can be written there. Looks before anything costly is started."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise JournalUnusable(
            f"the journal directory {directory} cannot be written ({error.strerror}); mount a writable volume there"
        ) from None


def opened(directory: Path, mode: str) -> sqlite3.Connection:
    """A connection to the file in `directory`; a writer's ("rwc") looks for damage first. Raises JournalUnusable."""
    path = directory / FILE_NAME
    with translated(directory):
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            timeout=5,
            check_same_thread=False,
        )
        try:
            if mode == "ro":
                # A file that was cut short is refused as a whole without this, and with it read as far as it goes.
                database.execute("PRAGMA writable_schema=ON")
            broken = database.execute("PRAGMA quick_check(1)").fetchone()[0] if mode != "ro" else "ok"
        except BaseException:
            database.close()
            raise
    if broken != "ok":
        database.close()
        raise Damaged(f"the journal {path} is damaged ({broken}); keep the file and start with an empty volume")
    return database


@contextmanager
def translated(directory: Path | None) -> Iterator[None]:
    """Errors of the library and the disk leave as JournalUnusable."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        where = f" in {directory}" if directory else ""
        kind = DiskFull if _is_full(error) else Damaged if _is_damage(error) else JournalUnusable
        raise kind(f"the journal{where} cannot be used ({error}); free the disk or mount a healthy volume") from error


def _is_full(error: sqlite3.Error | OSError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    code = getattr(error, "sqlite_errorcode", None)
    # On some file systems only the mapped index, or a write beyond a quota, tells that there is no room.
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_WRITE)


def _is_damage(error: sqlite3.Error | OSError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says where it was found
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def continues(previous_hash: str, digest: str, body: bytes) -> bool:
    """Whether a record follows the one before it; "" is one that no hash is known of: anything may come."""
    if not previous_hash:
        return True
    try:
        verify(previous_hash, (Link(digest, bytes(body)),))
    except ChainBroken:
        return False
    return True
