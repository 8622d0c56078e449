"""Space that is kept back on the journal's volume, so that a full disk can still be emptied.

Owns two files that hold nothing. SQLite writes before it deletes, so on a disk without a free byte an acknowledgement
could trim nothing and the journal would stay full for ever; the same holds for a seal. A seal never takes what trimming
needs, or the next boot could neither begin nor be emptied. Does not know SQL.
"""

import os
from contextlib import suppress
from pathlib import Path

from gpumeter_worker.metering.journalfile import LOG_BYTES

SEAL_FILE_NAME = "journal.reserve"
TRIM_FILE_NAME = "journal.reserve-trim"
RESERVE_BYTES = 2 * LOG_BYTES
"""The log is folded into the file first, which grows by no more than the log holds; as much again is for the work."""

_LEAST_BYTES = RESERVE_BYTES // 4
"""A step of trimming fits in this, and so does the begin of a boot."""


class Reserve:
    """One reserve of one directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self._path = directory / name

    def take(self) -> bool:
        """Set it aside whole; False where the disk has too little room now. What is there already is kept."""
        return self._size_bytes() >= RESERVE_BYTES or self._take(RESERVE_BYTES)

    def take_again(self) -> bool:
        """After a use: as much of it as half, or a quarter, where it does not fit whole. The log needs room as well."""
        size_bytes = RESERVE_BYTES
        while size_bytes >= _LEAST_BYTES:
            if self._size_bytes() >= size_bytes or self._take(size_bytes):
                return True
            size_bytes //= 2
        return False

    def give(self) -> bool:
        """Give the space back to the disk; False where there was none to give."""
        with suppress(OSError):
            self._path.unlink()
            return True
        return False

    def _size_bytes(self) -> int:
        with suppress(OSError):
            return self._path.stat().st_size
        return 0

    def _take(self, size_bytes: int) -> bool:
        held_bytes = self._size_bytes()
        try:
            with self._path.open("ab") as file:
                file.write(b"\0" * (size_bytes - held_bytes))  # real blocks, on any file system
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self._path, held_bytes)  # what was there stays there
            return False
        return True
