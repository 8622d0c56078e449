"""Copies of models on a volume that several workers may share.

Owns the layout, what makes a copy whole, and how a new one appears: written aside, checked, and renamed in one step, so
that nobody ever sees half a model, and two who fetch at once do no harm. Does not fetch.

    models/NAME-HASH/             a copy; .gpumeter.json in it tells its files and their sizes
    models/NAME-HASH.part-OWNER/  one that is being made
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

from gpumeter_worker.failure import MODEL_CACHE_FULL, MODEL_CACHE_UNUSABLE, StartupFailed
from gpumeter_worker.sources.progress import megabytes
from gpumeter_worker.sources.remote import Damaged, RemoteFile, Snapshot, first_line

MARKER = ".gpumeter.json"
_ABANDONED_S = 3600.0
"""What nobody wrote to for an hour, by the file system's own clock, belongs to nobody."""

_HASH_BYTES = 2**22


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


def place(cache: Path, uri: str, version: str) -> Place:
    """The place of a version; its name says which model it is, and the hash which version."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", uri.partition("://")[2]).strip("-.")[-60:]
    return Place(cache / "models" / f"{name}-{_short_hash(uri, version)}")


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
    return mine


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


def publish(where: Place, part: Path, uri: str, snapshot: Snapshot) -> None:
    """Turn the checked folder into the copy, in one step. A copy that someone else made meanwhile stays."""
    names = [file.name for file in snapshot.files] or [
        path.relative_to(part).as_posix() for path in sorted(part.rglob("*")) if path.is_file()
    ]
    for path in part.iterdir():  # what a library left beside the files
        if path.is_dir() and not any(name.startswith(f"{path.name}/") for name in names):
            shutil.rmtree(path, ignore_errors=True)
    sizes = {name: (part / name).stat().st_size for name in names}
    marker = part / MARKER
    marker.write_text(json.dumps({"uri": uri, "version": snapshot.version, "files": sizes}, indent=1))
    for name in (*names, MARKER):
        _sync(part / name)  # after a crash of the node a renamed folder must not hold empty files
    if where.folder.exists() and not whole(where):
        shutil.rmtree(where.folder, ignore_errors=True)
    try:
        part.rename(where.folder)
    except OSError:
        if not whole(where):
            raise
        shutil.rmtree(part, ignore_errors=True)


def remember(cache: Path, uri: str, revision: str, version: str) -> None:
    """Note what a URI and revision mean now, for a start without the source."""
    file = _reference(cache, uri, revision)
    text = json.dumps({"uri": uri, "revision": revision, "version": version})
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        aside.write_text(text)
        aside.replace(file)


def remembered(cache: Path, uri: str, revision: str) -> str:
    """What they meant when they were last asked about; empty where nobody did."""
    try:
        return str(json.loads(_reference(cache, uri, revision).read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def sweep(cache: Path) -> None:
    """Remove what dead workers left of models that nobody fetches any more."""
    models = cache / "models"
    probe = models / f".now-{os.getpid()}-{time.monotonic_ns()}"
    try:
        probe.touch()
        now_s = probe.stat().st_mtime
        probe.unlink()
        left = [*models.glob("*.part-*"), *models.glob("*.claim"), *models.glob("*.broken-*")]
    except OSError:
        return
    for path in left:
        if now_s - _last_write_s(path) > _ABANDONED_S:
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
    return sum(_stat(path, "st_size") for path in folder.rglob("*") if path.is_file())


def _full(cache: Path, why: str, free: int, total: int) -> StartupFailed:
    return StartupFailed(
        MODEL_CACHE_FULL,
        f"{why}, and the model cache {cache} has {free // 10**6:,} MB free of {megabytes(total)} MB; enlarge the "
        f"volume that spec.cache.pvc names, or remove models that nobody serves from {cache / 'models'}",
    )


def _short_hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _reference(cache: Path, uri: str, revision: str) -> Path:
    return cache / "models" / "refs" / f"{_short_hash(uri, revision)}.json"


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
