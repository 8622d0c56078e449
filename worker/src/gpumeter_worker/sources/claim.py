"""Who fetches: a file that its owner keeps rewriting, and that others may break once it stands still.

Owns taking, beating, watching and breaking a claim. Locks of the operating system are not used: across nodes, network
file systems honour them or not. A claim only saves work; that two owners at once do no harm is the cache's business.
Every reader judges by its own clock how long it saw no change, so that no two machines' clocks are compared.
"""

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

BEAT_S = 5.0
STALE_S = 30.0
"""Six beats. A network file system that shows a write late shows it when the file is opened anew, as it is here."""


class Claim:
    """A claim on one file. `told` travels with every beat, for those who wait."""

    def __init__(self, path: Path, owner: str, beat_s: float = BEAT_S) -> None:
        self.told = ""
        self._path = path
        self._owner = owner
        self._beat_s = beat_s
        self._beats = 0
        self._released = threading.Event()
        self._beating = threading.Thread()

    def take(self) -> bool:
        """Make the file, unless it is there; from then on it is rewritten by a thread."""
        try:
            # O_EXCL is the one thing that every shared file system does for exactly one of two who try.
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o664)
        except FileExistsError:
            return False
        with os.fdopen(file, "w") as stream:
            stream.write(self._content())
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, args=(self._released,), name="claim", daemon=True)
        self._beating.start()
        return True

    def held(self) -> bool:
        """Whether it is still ours, and not broken by someone who saw no beat. Raises OSError when the disk is away."""
        try:
            return _owner(self._path.read_text()) == self._owner
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file, if it is still ours."""
        self._released.set()
        if self._beating.ident is not None:  # a beat that is under way would put the file back
            self._beating.join()
        with suppress(OSError):
            if _owner(self._path.read_text()) == self._owner:
                self._path.unlink()

    def _beat(self, released: threading.Event) -> None:
        while not released.wait(self._beat_s):
            with suppress(OSError):  # a disk that is full or away is no reason to stop; others see no beat
                if _owner(self._path.read_text()) != self._owner:
                    return  # broken by someone who saw no beat; what we fetch meanwhile is still good
                self._rewrite()

    def _rewrite(self) -> None:
        # Aside and then renamed: whoever reads it meanwhile, we too, sees the beat before and never half of one.
        aside = self._path.with_name(f"{self._path.name}.beat-{self._owner}")
        try:
            aside.write_text(self._content())
            aside.replace(self._path)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise

    def _content(self) -> str:
        self._beats += 1
        return json.dumps({"owner": self._owner, "beats": self._beats, "told": self.told})


class Watch:
    """Someone else's claim, as it changes or not."""

    def __init__(self, path: Path, stale_s: float = STALE_S) -> None:
        self._path = path
        self._stale_s = stale_s
        self._seen = ""
        self._changed_s = time.monotonic()

    @property
    def told(self) -> str:
        """What the owner last said."""
        try:
            return str(json.loads(self._seen)["told"])
        except (ValueError, KeyError, TypeError):
            return ""

    def is_stale(self) -> bool:
        """Look again: whether the claim stood still for too long."""
        try:
            seen = self._path.read_text()
        except OSError:
            seen = ""  # released, or the disk is away: not stale, because there is nothing to break
        now_s = time.monotonic()
        if seen != self._seen:
            self._seen, self._changed_s = seen, now_s
        return self._path.exists() and now_s - self._changed_s > self._stale_s

    def break_it(self, breaker: str) -> None:
        """Remove the claim that stood still, and no other: of two breakers the slower one finds a new claim there."""
        aside = self._path.with_name(f"{self._path.name}.broken-{breaker}")
        with suppress(OSError):
            self._path.rename(aside)
            if aside.read_text() != self._seen:
                with suppress(OSError):
                    os.link(aside, self._path)  # it was a new one; it goes back, unless a still newer one is there
            aside.unlink()


def _owner(content: str) -> str:
    try:
        return str(json.loads(content)["owner"])
    except (ValueError, KeyError, TypeError):
        return ""
