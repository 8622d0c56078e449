"""Reads the journals that workers left behind: files on a volume, of pods that nobody can ask any more.

Owns the reading of such a file, which is the worker's to write: its tables `boots` and `records` (a contract test reads
what the worker wrote). Never writes to it, not even SQLite's own files beside it: what is read is a copy, with the
write-ahead log. Answers as a worker does on port 8001; what is in it is believed no more than what a worker says.
"""

import json
import shutil
import sqlite3
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from gpumeter_operator.adapters.workers import Target
from gpumeter_usage.chain import Link
from gpumeter_usage.page import Acknowledgement, Boot, JournalStatus, Page, PageInvalid
from gpumeter_usage.record import MAX_BODY_BYTES

FILE_NAME = "journal.sqlite"
LOG_SUFFIX = "-wal"
BOOTS_MAX = 10_000

T = TypeVar("T")


class JournalUnreadable(Exception):
    """The file cannot be read, or is no journal; the message is a sentence."""


def journals_in(path: Path) -> list[Path]:
    """The journals at or below a path, in the order of their names."""
    return [path] if path.is_file() else sorted(path.rglob(FILE_NAME))


class JournalFile:
    """A copy of one journal, open until closed. Implements the collector's port towards one worker."""

    def __init__(self, path: Path, *, over_gaps: bool = False) -> None:
        """Where it may go on `over_gaps`, it tells what its chains go on from. Raises JournalUnreadable."""
        self._path = path
        self._over_gaps = over_gaps
        self._folder = tempfile.mkdtemp(prefix="gpumeter-journal-")
        self._database = sqlite3.connect(":memory:")  # until there is a copy
        try:
            copied = Path(shutil.copy(path, Path(self._folder) / FILE_NAME))
            # Read after the file: what the log holds twice is the same, what it lacks would be missing.
            with suppress(FileNotFoundError):
                shutil.copy(path.with_name(path.name + LOG_SUFFIX), copied.with_name(copied.name + LOG_SUFFIX))
            self._database.close()
            self._database = sqlite3.connect(copied, isolation_level=None, check_same_thread=False)
            owners = {
                (str(owner["worker_uid"]), str(owner["service"]))
                for owner in map(json.loads, self._column("SELECT identity FROM boots ORDER BY ordinal LIMIT ?"))
            }
        except OSError as problem:
            self.close()
            raise JournalUnreadable(f"The journal {path} cannot be copied ({problem.strerror}).") from None
        except (sqlite3.Error, ValueError, KeyError, TypeError) as problem:
            self.close()
            raise JournalUnreadable(f"{path} cannot be read as a worker's journal ({problem}).") from None
        if len(owners) != 1:
            self.close()
            raise JournalUnreadable(f"The journal {path} holds records of {len(owners)} workers; it must be one's.")
        ((self.worker_uid, self.service),) = owners

    async def status(self, _target: Target) -> JournalStatus:
        """What is in it. Raises PageInvalid where it is damaged."""
        rows = self._read(
            "SELECT boot_id, head_seq, head_hash, acknowledged_seq, sealed, frontier_ns FROM boots ORDER BY ordinal "
            "LIMIT ?",
            BOOTS_MAX,
        )
        goes_on = self._continuations() if self._over_gaps else {}
        boots = tuple(
            Boot(
                boot_id=_is(str, row[0]),
                head_seq=_is(int, row[1]),
                head_hash=_is(str, row[2]),
                acknowledged_seq=_is(int, row[3]),
                sealed=bool(row[4]),
                acknowledged_hash=goes_on.get(row[0], ""),
            )
            for row in rows
        )
        return JournalStatus(self.worker_uid, self.service, _is(int, rows[-1][5]) if rows else 0, boots)

    def _continuations(self) -> dict[str, str]:
        """By boot, the hash of what was acknowledged last; files of earlier builds do not keep it."""
        if not self._read("SELECT 1 FROM pragma_table_info('boots') WHERE name = 'acknowledged_hash'"):
            return {}
        rows = self._read("SELECT boot_id, acknowledged_hash FROM boots LIMIT ?", BOOTS_MAX)
        return {_is(str, boot_id): _is(str, digest) for boot_id, digest in rows}

    async def page(self, _target: Target, boot_id: str, after: int, limit: int) -> Page:
        """The records of a boot after a seq. Raises PageInvalid where they are damaged."""
        rows = self._read(
            f"SELECT seq, hash, substr(body, 1, {MAX_BODY_BYTES + 1}) FROM records "  # noqa: S608 - a number of ours
            "WHERE boot_id = ? AND seq > ? ORDER BY seq LIMIT ?",
            boot_id,
            after,
            limit,
        )
        links = []
        for number, (seq, digest, body) in enumerate(rows, start=after + 1):
            if seq != number:
                break  # what is before the hole is taken, and the hole is told as nothing new
            links.append(Link(_is(str, digest), _is(bytes, body)))
        return Page(self.worker_uid, self.service, boot_id, after, 0, tuple(links))

    async def acknowledge(self, _target: Target, _acknowledgement: Acknowledgement) -> None:
        """Nobody is there to hear it; the file stays as it is."""

    def close(self) -> None:
        """Remove the copy."""
        self._database.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, statement: str, *parameters: str | int) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(statement, parameters).fetchall()
        except sqlite3.Error as problem:
            raise PageInvalid(f"the journal {self._path} is damaged ({problem})") from None

    def _column(self, statement: str) -> list[Any]:
        return [row[0] for row in self._database.execute(statement, (BOOTS_MAX,))]


def _is(kind: type[T], value: object) -> T:
    """The value, if it is of this kind: SQLite itself keeps anything in any column."""
    if not isinstance(value, kind):
        raise PageInvalid(f"the journal holds {value!r:.60} where a {kind.__name__} must be")
    return value
