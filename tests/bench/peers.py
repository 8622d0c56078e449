"""Virtual environments of peers that a bench compares with: made by the bench itself, outside the tree.

Owns where they lie and when they are made anew. Each comes from a hashed file in bench/requirements.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from devcluster.layout import REPOSITORY, cache_root
from devcluster.progress import Progress

REQUIREMENTS = Path(__file__).parent / "requirements"
UV = REPOSITORY / ".tools/bin/uv"


class PeerError(Exception):
    """A peer cannot be installed here."""


def environment(name: str, progress: Progress) -> Path:
    """The Python of the peer's environment; installs what bench/requirements/NAME.txt lists if it is not there."""
    wanted = REQUIREMENTS / f"{name}.txt"
    key = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = cache_root() / "bench" / f"{name}-{key}"
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        log = folder.parent / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out, progress.step(f"installing {name} into {folder}", lambda: f"log {log}"):
            _run([UV, "venv", "--quiet", "--python", sys.executable, folder], out, log)
            _run([UV, "pip", "install", "--python", python, "--no-deps", "--require-hashes", "-r", wanted], out, log)
        (folder / ".ready").touch()
    return python


def recommended_preloads(peer: Path) -> list[str]:
    """What vLLM's manual says to preload for speed on a CPU, as far as it is here: Intel's OpenMP, which the peer's
    environment has, and tcmalloc, where the machine has it. Every engine gets the same, or a table would compare
    allocators.
    """
    openmp = peer.parent.parent / "lib/libiomp5.so"
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    tcmalloc = [line.split("=>")[1].strip() for line in listed.splitlines() if "libtcmalloc_minimal.so" in line]
    return tcmalloc[:1] + ([str(openmp)] if openmp.exists() else [])


def _run(command: list[str | Path], out: object, log: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=inherited, check=False).returncode:
        raise PeerError(f"{log.stem} cannot be installed; see {log}")
