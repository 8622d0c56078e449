"""Where the API server is, whom we trust there, and what we say that we are.

Owns the pod's service account, kubeconfig files and the three ways in which a token comes: written down, in a file that
changes, and from a program. Makes no request to a cluster.
"""

import asyncio
import base64
import json
import os
import signal
import ssl
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
DEFAULT_KUBECONFIG = Path("~/.kube/config")
TOKEN_READ_EVERY_S = 60.0  # a kubelet renews a token long before it ends; client-go reads as often
EXEC_TIMEOUT_S = 60.0
EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")

Authorization = Callable[[bool], Awaitable[str]]
"""Gives the Authorization header, "" for none; True says that the last one was refused, and a newer one is wanted."""


class AccessInvalid(Exception):
    """What is configured gives no way to a cluster; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Access:
    """One API server and one identity."""

    server: str  # https://HOST:PORT, and a path where a proxy has one
    tls: ssl.SSLContext | None
    authorization: Authorization
    server_name: str | None = None  # whom the certificate must name, where that is not the host
    proxy: str | None = None


def find(kubeconfig: Path | None = None, context: str | None = None) -> Access:
    """The given file, else the pod's service account, else $KUBECONFIG or ~/.kube/config. Raises AccessInvalid."""
    if kubeconfig is None and (SERVICE_ACCOUNT / "token").exists():
        return of_service_account(SERVICE_ACCOUNT, os.environ)
    return of_file(kubeconfig or _default_file(), context)


def of_service_account(folder: Path, environment: Mapping[str, str]) -> Access:
    """As the pod in which this runs."""
    try:
        host, port = environment["KUBERNETES_SERVICE_HOST"], environment["KUBERNETES_SERVICE_PORT"]
        tls = ssl.create_default_context(cafile=folder / "ca.crt")
    except (KeyError, OSError) as problem:
        raise AccessInvalid(f"the pod's service account is incomplete: {problem}") from problem
    return Access(f"https://{f'[{host}]' if ':' in host else host}:{port}", tls, _TokenFile(folder / "token"))


def of_file(path: Path, context: str | None = None) -> Access:
    """As a kubeconfig says, in its current context or in the named one."""
    try:
        document = yaml.safe_load(path.expanduser().read_text())
        chosen = context or document["current-context"]
        entry = _named(document, "context", chosen)
        cluster = _named(document, "cluster", entry["cluster"])
        user = _named(document, "user", entry["user"]) if entry.get("user") else {}
        server = str(cluster["server"]).rstrip("/")
    except (OSError, yaml.YAMLError) as problem:
        raise AccessInvalid(f"{path} cannot be read: {problem}") from problem
    except (KeyError, TypeError, AttributeError) as problem:
        raise AccessInvalid(f"{path} is no kubeconfig with a current context: {problem} is missing") from problem
    folder = path.expanduser().parent
    try:
        tls = _tls(cluster, user, folder) if server.startswith("https://") else None
    except (OSError, ValueError) as problem:  # ssl.SSLError is an OSError
        raise AccessInvalid(f"the certificates in {path} cannot be used: {problem}") from problem
    return Access(
        server, tls, _authorization(user, folder, path), cluster.get("tls-server-name"), cluster.get("proxy-url")
    )


def _default_file() -> Path:
    named = [Path(one) for one in os.environ.get("KUBECONFIG", "").split(os.pathsep) if one]
    return next((one for one in named if one.exists()), named[0] if named else DEFAULT_KUBECONFIG)


def _named(document: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    for one in document.get(f"{kind}s") or ():
        if one["name"] == name:
            return dict(one[kind] or {})
    raise KeyError(f"{kind} {name!r}")


def _tls(cluster: Mapping[str, Any], user: Mapping[str, Any], folder: Path) -> ssl.SSLContext:
    if authority := _content(cluster, "certificate-authority", folder):
        tls = ssl.create_default_context(cadata=authority.decode())
    else:
        tls = ssl.create_default_context()
    if cluster.get("insecure-skip-tls-verify"):
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    certificate, key = (_content(user, one, folder) for one in ("client-certificate", "client-key"))
    if certificate and key:
        # The ssl module takes a client's certificate from a file alone.
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(certificate + b"\n" + key)
            pair.flush()
            tls.load_cert_chain(pair.name)
    return tls


def _content(entry: Mapping[str, Any], name: str, folder: Path) -> bytes:
    """What stands in the kubeconfig itself, or in the file that it names; empty where there is neither."""
    if data := entry.get(f"{name}-data"):
        return base64.b64decode(data)
    return (folder / Path(entry[name]).expanduser()).read_bytes() if entry.get(name) else b""


def _authorization(user: Mapping[str, Any], folder: Path, path: Path) -> Authorization:
    if file := user.get("tokenFile"):
        return _TokenFile(folder / Path(file).expanduser())
    if token := user.get("token"):
        return _fixed(f"Bearer {token}")
    if user.get("exec"):
        return _Program(user["exec"], folder, path)
    if user.get("username"):
        both = f"{user['username']}:{user.get('password', '')}"
        return _fixed(f"Basic {base64.b64encode(both.encode()).decode()}")
    if user.get("auth-provider"):
        raise AccessInvalid(f"{path} asks for an auth-provider, which Kubernetes has removed; use exec or a token")
    return _fixed("")


def _fixed(header: str) -> Authorization:
    async def authorization(refused: bool) -> str:
        return header

    return authorization


class _TokenFile:
    """A token that somebody renews in its file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header = ""
        self._read_s = 0.0

    async def __call__(self, refused: bool) -> str:
        now_s = time.monotonic()
        if refused or not self._header or now_s - self._read_s > TOKEN_READ_EVERY_S:
            try:
                self._header, self._read_s = f"Bearer {self._path.read_text().strip()}", now_s
            except OSError as problem:
                raise AccessInvalid(f"the token cannot be read: {problem}") from problem
        return self._header


class _Program:
    """A token that a program prints, as clouds have it; kept until it ends or is refused."""

    def __init__(self, entry: Mapping[str, Any], folder: Path, path: Path) -> None:
        if entry.get("apiVersion") not in EXEC_VERSIONS:
            raise AccessInvalid(f"{path} asks for exec of {entry.get('apiVersion')}; known are {EXEC_VERSIONS}")
        self._entry = entry
        if not (named := str(entry.get("command") or "")):
            raise AccessInvalid(f"{path} asks for exec without a command; name the program that prints the token")
        # As client-go has it (clientcmd, ResolveLocalPaths): with a slash it is a file, relative to the kubeconfig.
        self._command = [str(folder.absolute() / named) if "/" in named else named, *(entry.get("args") or ())]
        self._header = ""
        self._ends: datetime | None = None
        self._lock = asyncio.Lock()

    async def __call__(self, refused: bool) -> str:
        former = self._header
        async with self._lock:
            if refused and self._header != former:
                return self._header  # who waited here with us has a newer one
            if (
                refused
                or not self._header
                or (self._ends is not None and datetime.now(self._ends.tzinfo) >= self._ends)
            ):
                await self._ask()
            return self._header

    async def _ask(self) -> None:
        added = {one["name"]: one["value"] for one in self._entry.get("env") or ()}
        about = {"apiVersion": self._entry["apiVersion"], "kind": "ExecCredential", "spec": {"interactive": False}}
        environment = {**os.environ, "KUBERNETES_EXEC_INFO": json.dumps(about), **added}
        try:
            code, output, errors = await _run(self._command, environment)
            if code != 0:
                raise AccessInvalid(f"{self._command[0]} ended with {code}: {errors.decode().strip()[-300:]}")
            status = json.loads(output)["status"]
            self._header = f"Bearer {status['token']}"
            ends = status.get("expirationTimestamp")
            self._ends = datetime.fromisoformat(ends) if ends else None
        except (OSError, TimeoutError, ValueError, KeyError, TypeError) as problem:
            raise AccessInvalid(f"{self._command[0]} gives no token: {type(problem).__name__} {problem}") from problem


async def _run(command: list[str], environment: Mapping[str, str]) -> tuple[int | None, bytes, bytes]:
    """Its exit code and what it said. Whoever stops waiting, for whatever reason, leaves no program behind."""
    pipe = asyncio.subprocess.PIPE
    # A group of its own, for such programs are often scripts that wait for another one.
    program = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        async with asyncio.timeout(EXEC_TIMEOUT_S):
            output, errors = await program.communicate()
        return program.returncode, output, errors
    finally:
        if program.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            await program.wait()
