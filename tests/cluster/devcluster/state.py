"""What a cluster remembers between two commands: backend, port, processes, options.

Owns the state file and the lock that lets one command at a time change a cluster. Does not know what a backend does.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from devcluster.processes import Process
from devcluster.progress import Progress


@dataclass(frozen=True)
class State:
    """One cluster as it was last started."""

    backend: str
    port: int
    gpus: int = 0
    processes: dict[str, Process] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    ready: bool = False
    nodes: int = 1


def encode(state: State) -> str:
    return json.dumps(asdict(state), indent=1, sort_keys=True) + "\n"


def decode(text: str) -> State:
    raw = json.loads(text)
    raw["processes"] = {name: Process(**process) for name, process in raw.get("processes", {}).items()}
    return State(**raw)


def read_state(path: Path) -> State | None:
    """Return the remembered state, or None where there is none or it cannot be read (then it is made anew)."""
    try:
        return decode(path.read_text())
    except (OSError, ValueError, TypeError):
        return None


def write_state(path: Path, state: State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(encode(state))
    fresh.replace(path)


@contextmanager
def locked(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold the cluster's lock. It lies beside the cluster's folder, because `down` removes that folder."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress.step("waiting for another command that works on the same"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
