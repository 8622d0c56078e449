"""Space that is kept back on the journal's volume, so that a full disk can still be emptied.

Owns one file that holds nothing. SQLite writes before it deletes, so on a disk without a free byte an acknowledgement
could trim nothing and the journal would stay full for ever; the same holds for a seal. Does not know SQL.
"""

import os
from contextlib import suppress
from pathlib import Path

from gpumeter_worker.metering.journalfile import LOG_BYTES

FILE_NAME = "journal.reserve"
RESERVE_BYTES = 2 * LOG_BYTES
"""The log is folded into the file first, which grows by no more than the log holds; as much again is for the work."""


class Reserve:
    """The reserve of one directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME

    def take(self) -> bool:
        """Set it aside; False where the disk has too little room now. What is there already is kept."""
        try:
            if self._path.exists() and self._path.stat().st_size == RESERVE_BYTES:
                return True
            with self._path.open("wb") as file:
                file.write(b"\0" * RESERVE_BYTES)  # real blocks, on any file system
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self.give()
            return False
        return True

    def give(self) -> bool:
        """Give the space back to the disk; False where there was none to give."""
        with suppress(OSError):
            self._path.unlink()
            return True
        return False
