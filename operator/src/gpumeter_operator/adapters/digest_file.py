"""The file to which digests are exported, one line each.

Owns reading and appending it. A line that a crash cut short is cut off and written again; the file is never shortened
otherwise, so that it can be anchored, shipped or mirrored while it grows. One that is not this ledger's is put aside
under another name, never overwritten.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from gpumeter_operator.billing.digest import Digest, DigestInvalid, digest_of_line, entry_of, export_line

_TAIL_BYTES = 65_536  # far more than a line


class FileUnusable(Exception):
    """The file cannot be read or written, or is not what was exported; the message is a sentence."""


def last(path: Path) -> Digest | None:
    """The last digest in the file, None where there is none; cuts off a line that does not end. Raises FileUnusable."""
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            whole = tail.rfind(b"\n") + 1
            if whole < len(tail):
                file.truncate(start + whole)
            lines = tail[:whole].split(b"\n")[:-1]
            found = digest_of_line(lines[-1]) if lines else None
            if found is not None:
                entry_of(found.body)
            return found
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileUnusable(f"The file of digests {path} cannot be read: {error.strerror}.") from error
    except DigestInvalid as problem:
        raise FileUnusable(
            f"The file of digests {path} does not end with a digest ({problem}); move it away, and it is written anew."
        ) from None


def aside(path: Path, ends_with: Digest) -> Path:
    """The name, free yet, for a file that ends with this digest and is put aside: `digests.until-6-ab12cd34.jsonl`."""
    stem = f"{path.stem}.until-{entry_of(ends_with.body).seq}-{ends_with.digest[:8]}"
    names = (f"{stem}{'' if number == 1 else f'-{number}'}{path.suffix}" for number in count(1))
    return next(found for name in names if not (found := path.with_name(name)).exists())


def put_aside(path: Path, to: Path) -> None:
    """Give the file this other name, which `aside` found; its bytes stay. Raises FileUnusable."""
    try:
        path.rename(to)
    except OSError as error:
        raise FileUnusable(f"The file of digests {path} cannot be put aside as {to}: {error.strerror}.") from error


def append(path: Path, digests: Iterable[Digest]) -> int:
    """Append these and have them on the disk; returns how many. Raises FileUnusable."""
    written = 0
    try:
        with path.open("ab") as file:
            for digest in digests:
                file.write(export_line(digest) + b"\n")
                written += 1
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FileUnusable(f"The file of digests {path} cannot be written: {error.strerror}.") from error
    return written


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
