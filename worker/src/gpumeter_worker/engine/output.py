"""What the engine process prints, as lines of the worker's log.

Owns the pipe that is the engine's stdout and stderr. Its own log lines pass as they are; what a library, the
interpreter or the driver prints becomes a log line of its own. Reads in the event loop, a chunk at a time.
"""

import asyncio
import logging
import os
import sys

from gpumeter_worker.log import is_log_line

log = logging.getLogger(__name__)

_CHUNK_BYTES = 65_536
_LINE_BYTES_MAX = 16_384
"""A longer line is told in pieces: nobody may fill the memory by never ending one."""


class EngineOutput:
    """The reading end; `target` is what the process is given. Close both when it is gone."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._source, self.target = os.pipe()
        os.set_blocking(self._source, False)
        self._rest = b""
        self._loop.add_reader(self._source, self._read)

    def started(self) -> None:
        """The process has its end now; ours of it would keep the pipe open."""
        os.close(self.target)

    def close(self) -> None:
        """Tell what is still in the pipe, though a stray grandchild may hold its other end open."""
        while self._source >= 0 and self._read():
            pass
        self._end()

    def _read(self) -> bool:
        try:
            chunk = os.read(self._source, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            self._end()
            return False
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LINE_BYTES_MAX:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            _tell(line)
        return True

    def _end(self) -> None:
        if self._source < 0:
            return
        _tell(self._rest)
        self._rest = b""
        self._loop.remove_reader(self._source)
        os.close(self._source)
        self._source = -1


def _tell(line: bytes) -> None:
    text = line.decode(errors="replace").rstrip()
    if not text:
        return
    if is_log_line(text):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    else:
        log.warning("%s", text)
