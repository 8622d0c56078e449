"""The file to which digests are exported, one line each.

Owns reading and appending it. A line that a crash cut short is cut off and written again; the file is never shortened
otherwise, so that it can be anchored, shipped or mirrored while it grows.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpumeter_operator.billing.digest import Digest, DigestInvalid, digest_of_line, entry_of, export_line

_TAIL_BYTES = 65_536  # far more than a line


class FileUnusable(Exception):
    """The file cannot be read or written, or is not what was exported; the message is a sentence."""


def last_seq(path: Path) -> int:
    """The number of the last digest in the file, 0 where there is none; cuts off a line that does not end."""
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            whole = tail.rfind(b"\n") + 1
            if whole < len(tail):
                file.truncate(start + whole)
            lines = tail[:whole].split(b"\n")[:-1]
            return entry_of(digest_of_line(lines[-1]).body).seq if lines else 0
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise FileUnusable(f"The file of digests {path} cannot be read: {error.strerror}.") from error
    except DigestInvalid as problem:
        raise FileUnusable(
            f"The file of digests {path} does not end with a digest ({problem}); move it away, and it is written anew."
        ) from None


def append(path: Path, digests: Iterable[Digest]) -> int:
    """Append these and have them on the disk; returns how many. Raises FileUnusable."""
    count = 0
    try:
        with path.open("ab") as file:
            for digest in digests:
                file.write(export_line(digest) + b"\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FileUnusable(f"The file of digests {path} cannot be written: {error.strerror}.") from error
    return count


def read(path: Path) -> Iterator[Digest]:
    """The digests of a file, in order. Raises FileUnusable with the line that is none."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield digest_of_line(line)
                except DigestInvalid as problem:
                    raise FileUnusable(f"{path}, line {number}: {problem}.") from None
    except OSError as error:
        raise FileUnusable(f"The file of digests {path} cannot be read: {error.strerror}.") from error
