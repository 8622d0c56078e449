"""Debian packages without an installation: fetched once, unpacked into the cache, and run from there.

Owns the closure of libraries, the fetching (checked by apt itself), the cache key and the unpacking. Does not know what
the programs are for. Nothing is installed on the machine, and nobody needs to be root.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from devcluster.layout import cache_root

TIMEOUT_S = 300
NOT_NEEDED = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
LEFT_OUT = re.compile(r"libc6|libc-bin|libllvm.*|libz3.*|libperl.*")
"""The machine's own C library must serve (two of them in one process do not go together); LLVM is PostgreSQL's JIT
compiler, which is a plug-in and 100 MB, and it and Perl are not asked for here."""


class NoPackages(Exception):
    """They cannot be had here; the message is a sentence."""


def unpacked(packages: Sequence[str]) -> Path:
    """A folder that holds these packages of the machine's release, and the libraries that they are linked with.

    Raises NoPackages. The folder's name says which versions and which bytes: another version is another folder.
    """
    for program in ("apt-get", "apt-cache", "dpkg"):
        if not shutil.which(program):
            raise NoPackages(f"{program} is not here: this is no Debian.")
    try:
        stanzas = _stanzas(packages)
    except NoPackages:
        _run(["apt-get", "-q", "update"], Path("/"))  # a machine without lists, as an image is
        stanzas = _stanzas(packages)
    key = hashlib.sha256("\n".join(f"{name}={version} {digest}" for name, version, digest in stanzas).encode())
    folder = cache_root() / "debian" / f"{packages[0]}-{key.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{packages[0]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _fetch(stanzas, folder)
    return folder


def library_path(folder: Path) -> str:
    """LD_LIBRARY_PATH for the programs in an unpacked folder."""
    return ":".join(str(each) for each in sorted((folder / "usr/lib").glob("*-linux-gnu")))


def _stanzas(packages: Sequence[str]) -> list[tuple[str, str, str]]:
    """(name, version, SHA-256) of the packages and of every library below them, as the release's lists have them."""
    answer = _run(
        ["apt-cache", "depends", "--recurse", *(f"--no-{kind}" for kind in NOT_NEEDED), *packages],
        Path("/"),
    )
    below = {line for line in answer.splitlines() if re.fullmatch(r"lib[\w.+-]+", line)}
    wanted = sorted(set(packages) | {name for name in below if not LEFT_OUT.fullmatch(name)})
    found = []
    for stanza in _run(["apt-cache", "show", "--no-all-versions", *wanted], Path("/")).split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|SHA256): (\S+)$", stanza, re.MULTILINE))
        if fields.keys() == {"Package", "Version", "SHA256"}:
            found.append((fields["Package"], fields["Version"], fields["SHA256"]))
    if missing := set(packages) - {name for name, *_ in found}:
        raise NoPackages(f"This release has no package {', '.join(sorted(missing))}, or its lists are not here.")
    return sorted(found)


def _fetch(stanzas: Sequence[tuple[str, str, str]], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as name:
        fetched, fresh = Path(name) / "packages", Path(name) / "root"
        fetched.mkdir()
        # The library that is installed may be older than the release's; what is fetched is one consistent set.
        _run(["apt-get", "-q", "download", *(f"{package}={version}" for package, version, _ in stanzas)], fetched)
        known = {digest for *_, digest in stanzas}
        for package in sorted(fetched.glob("*.deb")):
            if hashlib.sha256(package.read_bytes()).hexdigest() not in known:
                raise NoPackages(f"{package.name} is not what the release's lists say.")
            _run(["dpkg", "-x", str(package), str(fresh)], fetched)
        fresh.chmod(0o755)
        fresh.rename(folder)


def _run(argv: Sequence[str], at: Path) -> str:
    try:
        done = subprocess.run(
            argv,
            cwd=at,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoPackages(f"{argv[0]} {argv[1]} did not end in {TIMEOUT_S} s.") from None
    if done.returncode != 0:
        raise NoPackages(f"{argv[0]} {argv[1]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout
