"""What every source of models is asked for, and how it says no.

Owns the port that `fetch` drives and the words for a refusal. Knows no library and no protocol.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpumeter_worker.failure import MODEL_INVALID, MODEL_SOURCE_UNREACHABLE, StartupFailed
from gpumeter_worker.sources.progress import Progress


class Unreachable(StartupFailed):
    """The source does not answer. `may_pass` says whether trying again may help."""

    def __init__(self, message: str, *, may_pass: bool = True) -> None:
        super().__init__(MODEL_SOURCE_UNREACHABLE, message)
        self.may_pass = may_pass


class Damaged(StartupFailed):
    """What arrived is not what the source says it has; another try may bring it whole."""

    def __init__(self, message: str) -> None:
        super().__init__(MODEL_INVALID, message)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that belongs to the model.

    `digest` is `sha256:HEX`, or `git:HEX` (SHA-1 of the content after git's `blob SIZE` and a zero byte), or empty
    where the source tells none.
    """

    name: str
    size: int  # bytes
    digest: str = ""
    tag: str = ""
    """The source's own word for exactly this content, where that can only be compared by the source (S3's ETag)."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a source holds now. `version` names exactly this content: a commit, a digest."""

    version: str
    size: int  # bytes to be fetched
    files: tuple[RemoteFile, ...]
    """Empty where only unpacking tells: then everything that `copy` leaves behind is the model."""


class Remote(Protocol):
    """One model at one source."""

    uri: str
    revision: str  # empty where the source has none
    allow_pickle: bool  # which files belong to the model depends on it
    resumed: str
    """The folder below the copy's in which `copy` leaves what it goes on with after a break; empty where it begins a
    file anew."""
    pinned: str
    """The version, where URI and revision name it already, so that a copy in the cache needs no question; else ""."""

    def look(self) -> Snapshot:
        """Ask for the version and the files. Raises StartupFailed, of it Unreachable where trying again may help."""
        ...

    def copy(self, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
        """Bring every file into the folder; what lies there whole is kept. Raises as `look`, or OSError."""
        ...

    def elsewhere(self) -> Path | None:
        """A copy that the source's own tools keep on this machine, for when the source does not answer."""
        ...
