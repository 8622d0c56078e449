"""Copies of models on a volume that several workers may share.

Owns the layout, what makes a copy whole, and how a new one appears: written aside, checked, and renamed in one step, so
that nobody ever sees half a model, and two who fetch at once do no harm. Does not fetch. A model with pickles allowed
and the same one without are two copies, for they hold other files.

    models/NAME-HASH/             a copy; .gpumeter.json in it tells its files and their sizes
    models/NAME-HASH.part-OWNER/  one that is being made; .gpumeter-owner in it tells by whom
    models/NAME-HASH.claim        who makes it (claim.py)
    models/refs/HASH.json         the version that a URI and revision last meant
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpumeter_worker.failure import MODEL_CACHE_FULL, MODEL_CACHE_UNUSABLE, StartupFailed, first_line
from gpumeter_worker.sources.progress import megabytes
from gpumeter_worker.sources.remote import Damaged, RemoteFile, Snapshot

MARKER = ".gpumeter.json"
_OWNER = ".gpumeter-owner"
_ABANDONED_S = 3600.0
"""What nobody wrote to for an hour, by the file system's own clock, belongs to nobody."""

_HASH_BYTES = 2**22


class Displaced(Damaged):
    """Another owner took the folder over while this one gave no sign; what is under its name now is no model."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the copy of one version of one model lies."""

    folder: Path

    @property
    def claim(self) -> Path:
        """The claim on making it."""
        return self.folder.with_name(self.folder.name + ".claim")

    def part(self, owner: str) -> Path:
        """Where an owner makes it."""
        return self.folder.with_name(f"{self.folder.name}.part-{owner}")


def place(cache: Path, uri: str, version: str, *, allow_pickle: bool) -> Place:
    """The place of a version; its name says which model it is, and the hash which version and whether with pickles."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", uri.partition("://")[2]).strip("-.")[-60:]
    return Place(cache / "models" / f"{name}-{_short_hash(uri, version, *_with_pickles(allow_pickle))}")


def prepare(cache: Path) -> None:
    """Make the folders. Raises StartupFailed when the volume cannot be written."""
    try:
        (cache / "models" / "refs").mkdir(parents=True, exist_ok=True)
        probe = cache / "models" / f".probe-{os.getpid()}-{time.monotonic_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise disk_failure(error, cache) from None


def whole(where: Place) -> bool:
    """Whether there is a copy with every file in its full size."""
    try:
        marker = json.loads((where.folder / MARKER).read_text())
        return bool(marker["files"]) and all(
            (where.folder / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def take_over(where: Place, owner: str) -> Path:
    """The folder to fetch into: what a dead owner left is taken over, and so not fetched again."""
    mine = where.part(owner)
    left = [path for path in where.folder.parent.glob(f"{where.folder.name}.part-*") if path != mine]
    left.sort(key=held_bytes, reverse=True)
    for number, path in enumerate(left):
        if number == 0 and not mine.exists():
            with suppress(OSError):
                path.rename(mine)
                continue
        shutil.rmtree(path, ignore_errors=True)
    mine.mkdir(exist_ok=True)
    (mine / _OWNER).write_text(owner)
    return mine


def tidy(part: Path, files: tuple[RemoteFile, ...], resumed: str) -> None:
    """Remove what an earlier owner left and nobody goes on with: all but the model's files and the folder `resumed`."""
    keep = {part / file.name for file in files} | {part / _OWNER}
    for path in sorted(part.rglob("*"), reverse=True):  # what is in a folder comes before it
        if resumed and path.relative_to(part).parts[0] == resumed:
            continue
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()  # unless something of the model is in it
        elif path not in keep:
            path.unlink(missing_ok=True)


def check(part: Path, files: tuple[RemoteFile, ...]) -> None:
    """Compare what arrived with what the source says; all that differs is removed, and told. Raises Damaged."""
    wrong = []
    for file in files:
        path = part / file.name
        found = path.stat().st_size if path.is_file() else 0
        if found != file.size:
            wrong.append(f"{file.name} with {found} of {file.size} bytes")
        elif file.digest and _digest(path, file.digest.partition(":")[0]) != file.digest:
            wrong.append(f"{file.name} without the checksum that its source tells")
        else:
            continue
        path.unlink(missing_ok=True)
    if wrong:
        raise Damaged(f"the model arrived damaged: {', '.join(wrong)}; try again, or publish it anew")


def publish(where: Place, owner: str, uri: str, snapshot: Snapshot) -> None:
    """Turn an owner's checked folder into the copy, in one step. A copy that someone else made meanwhile stays.

    Raises Displaced when the folder is not the one that the owner took over: whoever takes over renames it, so that the
    last step, a rename too, then finds nothing under the old name, or a folder that lacks the owner's mark.
    """
    part = where.part(owner)
    _refuse_unless_owned(part, owner)
    names = [file.name for file in snapshot.files] or [
        path.relative_to(part).as_posix()
        for path in sorted(part.rglob("*"))
        if path.is_file() and path.name not in (_OWNER, MARKER)
    ]
    tidy(part, tuple(RemoteFile(name, 0) for name in names), "")  # what a library left beside the files
    sizes = {name: (part / name).stat().st_size for name in names}
    marker = part / MARKER
    marker.write_text(json.dumps({"uri": uri, "version": snapshot.version, "files": sizes}, indent=1))
    for name in (*names, MARKER):
        _sync(part / name)  # after a crash of the node a renamed folder must not hold empty files
    if where.folder.exists() and not whole(where):
        _put_aside(where, owner)
    _refuse_unless_owned(part, owner)
    (part / _OWNER).unlink()
    try:
        part.rename(where.folder)
    except OSError:
        if not whole(where):
            raise
        shutil.rmtree(part, ignore_errors=True)


def discard(where: Place, owner: str) -> None:
    """Remove what an owner made who is no longer needed: the copy is whole, so nobody takes that over now."""
    shutil.rmtree(where.part(owner), ignore_errors=True)


def remember(cache: Path, uri: str, revision: str, version: str, *, allow_pickle: bool) -> None:
    """Note what a URI and revision mean now, for a start without the source."""
    file = _reference(cache, uri, revision, allow_pickle)
    text = json.dumps({"uri": uri, "revision": revision, "version": version})
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        aside.write_text(text)
        aside.replace(file)


def remembered(cache: Path, uri: str, revision: str, *, allow_pickle: bool) -> str:
    """What they meant when they were last asked about; empty where nobody did."""
    try:
        return str(json.loads(_reference(cache, uri, revision, allow_pickle).read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


_LEFT = ("*.part-*", "*.claim", "*.claim.beat-*", "*.broken-*")


def sweep(cache: Path) -> None:
    """Remove what dead workers left of models that nobody fetches any more."""
    models = cache / "models"
    probe = models / f".now-{os.getpid()}-{time.monotonic_ns()}"
    try:
        probe.touch()
        now_s = probe.stat().st_mtime
        probe.unlink()
        left = [found for kind in _LEFT for found in models.glob(kind)]
    except OSError:
        return
    for path in left:
        # Who checks sums for an hour writes nothing to the folder, but beats: the claim speaks for it.
        claim = models / f"{path.name.partition('.part-')[0]}.claim"
        if now_s - max(_last_write_s(path), _stat(claim, "st_mtime")) > _ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def refuse_if_full(cache: Path, needed: int) -> None:
    """Raises StartupFailed when the volume has less room than is still to be fetched."""
    usage = shutil.disk_usage(cache)
    if usage.free < needed:
        raise _full(cache, f"{megabytes(needed)} MB are still to be fetched", usage.free, usage.total)


def disk_failure(error: OSError, cache: Path) -> StartupFailed:
    """What an error of the cache's disk means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        usage = shutil.disk_usage(cache)
        return _full(cache, "the model does not fit", usage.free, usage.total)
    return StartupFailed(
        MODEL_CACHE_UNUSABLE,
        f"the model cache {cache} cannot be used ({error.strerror or first_line(error)}); check the volume that "
        "spec.cache.pvc names, and that group 65532 may write it",
    )


def held_bytes(folder: Path) -> int:
    """Bytes that lie in a folder already."""
    return sum(_stat(path, "st_size") for path in folder.rglob("*") if path.is_file() and path.name != _OWNER)


def _full(cache: Path, why: str, free: int, total: int) -> StartupFailed:
    return StartupFailed(
        MODEL_CACHE_FULL,
        f"{why}, and the model cache {cache} has {free // 10**6:,} MB free of {megabytes(total)} MB; enlarge the "
        f"volume that spec.cache.pvc names, or remove models that nobody serves from {cache / 'models'}",
    )


def _refuse_unless_owned(part: Path, owner: str) -> None:
    try:
        owned = (part / _OWNER).read_text() == owner
    except FileNotFoundError:
        owned = False
    if not owned:
        raise Displaced(f"another worker took over {part.name} while this one gave no sign; start it again")


def _put_aside(where: Place, owner: str) -> None:
    """Remove a copy that is not whole; by a rename, so that of one that just became whole nothing is lost."""
    aside = Place(where.folder.with_name(f"{where.folder.name}.broken-{owner}"))
    with suppress(OSError):
        where.folder.rename(aside.folder)
        if whole(aside):
            with suppress(OSError):
                aside.folder.rename(where.folder)
    shutil.rmtree(aside.folder, ignore_errors=True)


def _with_pickles(allow_pickle: bool) -> tuple[str, ...]:
    return ("pickle",) if allow_pickle else ()


def _short_hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _reference(cache: Path, uri: str, revision: str, allow_pickle: bool) -> Path:
    return cache / "models" / "refs" / f"{_short_hash(uri, revision, *_with_pickles(allow_pickle))}.json"


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.sha256()
    if kind == "git":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_HASH_BYTES):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _last_write_s(path: Path) -> float:
    return max(_stat(one, "st_mtime") for one in (path, *path.rglob("*")))


def _stat(path: Path, field: str) -> int:
    try:
        return int(getattr(path.stat(), field))
    except OSError:
        return 0
