"""A remote model becomes a directory in the cache: ask, wait for whoever fetches it already, fetch, check, publish.

Owns the order, the retries and what a start without the source may use. Blocks; runs in a process of its own.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpumeter_worker.failure import first_line
from gpumeter_worker.sources import cache as copies
from gpumeter_worker.sources.claim import BEAT_S, STALE_S, Claim, Watch
from gpumeter_worker.sources.progress import Progress, duration, megabytes
from gpumeter_worker.sources.remote import Damaged, Remote, Snapshot, Unreachable

log = logging.getLogger(__name__)

_BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_DAMAGED_TRIES = 2
_STUCK_TRIES = 5


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take. The defaults suit a cluster; tests have less."""

    source_s: float = 600.0
    """Without a byte of progress, how long a source that does not answer is asked again."""
    stuck_tries: int = _STUCK_TRIES
    """How often in a row a source may break off that brings something, and never more than it once did."""
    back_off_s: tuple[float, ...] = _BACK_OFF_S
    beat_s: float = BEAT_S
    stale_s: float = STALE_S
    poll_s: float = 1.0


def fetch(remote: Remote, cache: Path, owner: str, progress: Progress, patience: Patience = Patience()) -> Path:
    """The directory of the model. Raises StartupFailed, of it Unreachable when patience ran out."""
    copies.prepare(cache)
    copies.sweep(cache)
    if remote.pinned and copies.whole(ready := _place(remote, cache, remote.pinned)):
        return ready.folder
    progress.begin(f"asking for {remote.uri}")
    damaged = tries = stuck = furthest = 0
    moved, since_s = progress.moved, time.monotonic()
    while True:
        try:
            return _fetch_once(remote, cache, owner, progress, patience)
        except Unreachable as error:
            if (known := _known_copy(remote, cache)) is not None:
                log.warning("%s; serving the copy that the cache holds", error.message)
                return known
            if not error.may_pass:
                raise
            if progress.moved > moved:
                stuck = 0 if progress.done > furthest else stuck + 1
                furthest = max(furthest, progress.done)
                moved, since_s, tries = progress.moved, time.monotonic(), 0
            if stuck >= patience.stuck_tries:
                raise Unreachable(
                    f"{error.message}; it broke off {stuck + 1} times and never came further than "
                    f"{megabytes(furthest)} MB; check what stands between it and this node (a proxy, a limit)"
                ) from None
            left_s = patience.source_s - (time.monotonic() - since_s)
            wait_s = patience.back_off_s[min(tries, len(patience.back_off_s) - 1)]
            if left_s < wait_s:
                raise
            log.warning("%s; asking again for %s", error.message, duration(left_s))
            progress.begin(f"{error.message}; asking again for {duration(left_s)}")
            tries += 1
            time.sleep(wait_s)
        except (Damaged, FileNotFoundError) as error:  # a missing file: someone took over while this process slept
            damaged += 1
            if damaged >= _DAMAGED_TRIES:
                raise copies.disk_failure(error, cache) if isinstance(error, OSError) else error from None
            log.warning("%s; fetching the model again", error)
        except OSError as error:
            raise copies.disk_failure(error, cache) from None


def _fetch_once(remote: Remote, cache: Path, owner: str, progress: Progress, patience: Patience) -> Path:
    snapshot = remote.look()
    where = _place(remote, cache, snapshot.version)
    claim = Claim(where.claim, owner, patience.beat_s)
    watch = Watch(where.claim, patience.stale_s)
    while not copies.whole(where):
        if claim.take():
            try:
                if not copies.whole(where):
                    part = copies.take_over(where, owner)
                    copies.tidy(part, snapshot.files, remote.resumed)
                    copies.refuse_if_full(cache, max(0, snapshot.size - copies.held_bytes(part)))
                    _fill(remote, snapshot, part, progress, claim)
                    if claim.held():
                        copies.publish(where, owner, remote.uri, snapshot)
            except Exception as error:
                if claim.held():
                    raise
                log.warning("%s; another worker took over meanwhile, and is waited for", first_line(error))
            finally:
                claim.release()
        elif watch.is_stale():
            log.warning("who was fetching %s gave no sign for %.0f s; taking over", remote.uri, patience.stale_s)
            watch.break_it(owner)
        else:
            told = watch.told
            progress.begin(f"another worker is fetching the model{f' ({told})' if told else ''}")
            time.sleep(patience.poll_s)
    copies.discard(where, owner)
    copies.remember(cache, remote.uri, remote.revision, snapshot.version, allow_pickle=remote.allow_pickle)
    return where.folder


def _fill(remote: Remote, snapshot: Snapshot, part: Path, progress: Progress, claim: Claim) -> None:
    progress.begin("fetching the model", snapshot.size, copies.held_bytes(part))
    finished = threading.Event()
    threading.Thread(target=_tell, args=(progress.text, claim, finished), name="tell", daemon=True).start()
    try:
        remote.copy(snapshot, part, progress)
        progress.begin("checking what was fetched")
        copies.check(part, snapshot.files)
    finally:
        finished.set()


def _tell(text: Callable[[], str], claim: Claim, finished: threading.Event) -> None:
    while not finished.wait(0.5):
        claim.told = text()


def _known_copy(remote: Remote, cache: Path) -> Path | None:
    """What can be served without the source: our own copy of what it last said."""
    known = copies.remembered(cache, remote.uri, remote.revision, allow_pickle=remote.allow_pickle)
    for version in (remote.pinned, known):
        if version and copies.whole(where := _place(remote, cache, version)):
            return where.folder
    return remote.elsewhere()


def _place(remote: Remote, cache: Path, version: str) -> copies.Place:
    return copies.place(cache, remote.uri, version, allow_pickle=remote.allow_pickle)
