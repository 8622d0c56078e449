"""A real PostgreSQL server for tests and benches, from the Debian package of the machine's own release.

Owns a server in a short folder of its own: one cluster, one unix socket, no TCP, ended for sure (it dies with us, too).
The server refuses root; started by root it runs as nobody.
"""

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from devcluster.processes import wait_until
from rigs.debian import NoPackages, library_path, unpacked

NOBODY = 65534
OWNER = "gpumeter"  # a superuser of its own server, as an administrator is; roles with less are made by tests
START_TIMEOUT_S = 60.0
SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0777",
    "jit": "off",
    "max_connections": "60",
    "autovacuum_naptime": "5s",
    "log_min_messages": "warning",
    "timezone": "Europe/Berlin",  # a ledger that minds the server's time zone shows
}
FAST = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "64MB"}
"""What a killed process wrote is there all the same; a power cut is nothing that a test makes."""
DURABLE = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
"""As a ledger needs it, and as figures are taken."""


@dataclass
class Server:
    """A running server. `programs` is where psql, pg_dump and the others are."""

    folder: Path
    programs: Path
    environment: Mapping[str, str]
    settings: Mapping[str, str]
    _process: subprocess.Popen[bytes] | None = None
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def pid(self) -> int:
        """Of the running server's first process."""
        assert self._process is not None, "it is not running"
        return self._process.pid

    def url(self, database: str, user: str = OWNER) -> str:
        """As `ledger.url` has it."""
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def database(self, template: str = "template0", *, locale: str = "C.UTF-8") -> str:
        """A new database, of another language's order of letters where asked; returns its name."""
        name = f"ledger_{next(self._numbers)}"
        how = f"ENCODING 'UTF8' LOCALE '{locale}'" if template == "template0" else ""
        self.execute("postgres", f"CREATE DATABASE {name} TEMPLATE {template} {how}")
        return name

    def drop(self, database: str) -> None:
        """Remove a database, and whoever is connected to it."""
        self.execute("postgres", f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")

    def execute(self, database: str, *statements: str) -> None:
        """Run statements as the server's administrator, each in a transaction of its own."""
        with psycopg.connect(host=str(self.folder), dbname=database, user=OWNER, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def run(self, program: str, *arguments: str) -> bytes:
        """Run one of the package's own programs against this server; its output. Raises CalledProcessError."""
        argv = [str(self.programs / program), "-h", str(self.folder), "-U", OWNER, *arguments]
        return subprocess.run(argv, env=dict(self.environment), capture_output=True, check=True, timeout=600).stdout

    def start(self) -> None:
        """Start it, and wait until it answers."""
        told = [f"-c{name}={value}" for name, value in self.settings.items()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                _as_nobody([str(self.programs / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder)])
                + told,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if not wait_until(self._answers, START_TIMEOUT_S):
            self.stop()
            raise NoPackages(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-500:]}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it; SIGINT cuts off transactions and stops in order."""
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def crash(self) -> None:
        """SIGQUIT: no transaction is ended in order, and the next start recovers from the log."""
        self.stop(signal.SIGQUIT)

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            return True  # it has ended; the connection below fails and says so
        try:
            psycopg.connect(host=str(self.folder), dbname="postgres", user=OWNER, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def server(settings: Mapping[str, str] = FAST, *, folder: Path | None = None) -> Iterator[Server]:
    """A server with an empty cluster; gone, with all that it held, after the block. Raises NoPackages.

    `folder` is where its own folder is made: short, because a socket's path has 107 bytes.
    """
    programs, environment = _programs()
    _sweep(folder or Path(tempfile.gettempdir()))
    home = Path(tempfile.mkdtemp(prefix=f"gpm-pg-{os.getpid()}-", dir=folder))
    started = None
    try:
        home.chmod(0o755)
        if not _reaches(programs):  # a cache in root's home, which nobody may enter
            root = programs.parents[4]
            shutil.copytree(root, home / "root", symlinks=True, ignore=shutil.ignore_patterns("doc", "man", "locale"))
            programs = home / "root" / programs.relative_to(root)
            environment = environment | {"LD_LIBRARY_PATH": library_path(home / "root")}
        if os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)
        initdb = [str(programs / "initdb"), "-D", str(home / "data"), "-U", OWNER, "--auth=trust", "--no-sync"]
        done = subprocess.run(
            [*_as_nobody(initdb), "--encoding=UTF8", "--locale=C.UTF-8"],
            env=environment,
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
        )
        if done.returncode != 0:
            raise NoPackages(f"initdb failed: {done.stderr[-500:]}")
        started = Server(home, programs, environment, SETTINGS | dict(settings))
        started.start()
        yield started
    finally:
        if started is not None:
            started.stop()
        shutil.rmtree(home, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what those left behind who were killed: their servers died with them."""
    for left in folder.glob("gpm-pg-*-*"):
        pid = left.name.split("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _programs() -> tuple[Path, dict[str, str]]:
    """The folder of the server's programs, and the environment in which they run."""
    clean = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8"}
    if given := os.environ.get("GPUMETER_POSTGRES_BIN"):
        return Path(given), clean
    version = _newest()
    root = unpacked([f"postgresql-{version}", f"postgresql-client-{version}"])
    return root / f"usr/lib/postgresql/{version}/bin", clean | {"LD_LIBRARY_PATH": library_path(root)}


def _newest() -> str:
    """The version that the release's own package `postgresql` stands for."""
    try:
        done = subprocess.run(["apt-cache", "depends", "postgresql"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise NoPackages(
            "There is no PostgreSQL to be had: this is no Debian. GPUMETER_POSTGRES_BIN may name a folder with its "
            "programs."
        ) from None
    for word in done.stdout.split():
        if word.startswith("postgresql-") and word.removeprefix("postgresql-").isdigit():
            return word.removeprefix("postgresql-")
    raise NoPackages("This release has no package postgresql, or its lists are not here: apt-get update.")


def _as_nobody(argv: Sequence[str]) -> list[str]:
    """The same command with root's rights given up, and a life that is bound to ours."""
    if os.geteuid() != 0:
        return list(argv)
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return [*drop, "setpriv", "--pdeathsig=INT", *argv]  # after the change of user, which would clear it


def _reaches(programs: Path) -> bool:
    if os.geteuid() != 0:
        return True
    argv = _as_nobody(["test", "-x", str(programs / "postgres")])
    return subprocess.run(argv, check=False, cwd="/").returncode == 0
