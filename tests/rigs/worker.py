"""A real worker process with the real model, as a gateway and a collector see it.

Owns its start on ports of its own, hop tokens, and a collector that verifies what it pulls. Knows nothing of what a
worker does inside: it sees HTTP, signals, the log and the exit code.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt

from devcluster import model
from devcluster.progress import Progress
from gpumeter_usage.chain import GENESIS, verify
from gpumeter_usage.page import Acknowledgement, JournalStatus, decode_page, decode_status, encode_acknowledgement
from gpumeter_usage.record import Kind, Record, Status, parse
from rigs.engines import children
from rigs.ports import hold_port

COMMAND = Path(sys.executable).parent / "gpumeter-worker"
SERVICE_UID = "11111111-2222-3333-4444-555555555555"
USAGE_TOKEN = "usage-token-of-a-test-" + "0" * 32
HOP_KEY = "hop-key-of-a-test-" + "1" * 32
START_TIMEOUT_S = 240.0
"""Imports and load take seconds; on two cores that others use as well they may take minutes."""


def model_path() -> Path:
    """The converted SmolLM2 of the local cluster; converted once if it is not there."""
    return model.ensure(Progress()) / model.FOLDER


def until(what: Callable[[], Any], why: str, timeout_s: float = 60.0) -> Any:
    """Poll until something is true, and return it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s:.0f} s: {why}")


@dataclass
class Ledger:
    """What a collector has committed: every record once, in chains that verify."""

    records: dict[str, list[Record]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def all(self) -> list[Record]:
        """Every record of every boot."""
        return [record for records in self.records.values() for record in records]

    def of_session(self, session_id: str) -> list[Record]:
        """The slices of one session."""
        return [record for record in self.all() if record.session_id == session_id]

    def ended(self, session_id: str) -> Status | None:
        """How a session ended, as far as the ledger knows."""
        slices = self.of_session(session_id)
        return slices[-1].status if slices and slices[-1].status is not Status.OPEN else None

    def check(self, unmeasured_s: float = 0.0, devices: int = 1) -> None:
        """The identity, for every boot; `unmeasured_s` is the most that may be missing with engines that were lost."""
        for boot_id, records in self.records.items():
            assert [record.seq for record in records] == list(range(1, len(records) + 1)), boot_id
            accounts = [record for record in records if record.kind is Kind.ACCOUNT]
            slices = sum(record.gpu_ns for record in records if record.kind is Kind.SESSION)
            assert slices == sum(record.gpu_ns for record in accounts if record.account == "attributed")
            lived_ns = accounts[-1].ended_at - accounts[0].started_at
            assert 0 <= lived_ns * devices - sum(r.gpu_ns for r in accounts) <= unmeasured_s * 1e9 * devices


class WorkerProcess:
    """One process over a folder that outlives it."""

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str] | None = None,
        command: Sequence[str | Path] = (COMMAND, "serve"),
    ) -> None:
        self.folder = folder
        credentials = folder / "credentials"
        credentials.mkdir(parents=True, exist_ok=True)
        (credentials / "usage-token").write_text(USAGE_TOKEN + "\n")
        (credentials / "hop-key").write_text(HOP_KEY)
        self.http, self.usage = hold_port(), hold_port()
        self.environment = {
            "PATH": os.environ["PATH"],
            "GPUMETER_SERVICE": "team-a/smollm2",
            "GPUMETER_SERVICE_UID": SERVICE_UID,
            "GPUMETER_WORKER_UID": "pod-of-a-test",
            "GPUMETER_MODEL_NAME": "smollm2",
            "GPUMETER_MODEL_URI": f"file://{model_path()}",
            "GPUMETER_DTYPE": "float32",
            "GPUMETER_MAX_MODEL_LEN": "1024",
            "GPUMETER_MAX_BATCH_SIZE": "8",
            "GPUMETER_MAX_BATCH_TOKENS": "64",
            "GPUMETER_MAX_QUEUE_LENGTH": "4",
            "GPUMETER_CALIBRATION_MS": "0",  # seconds of every start, for what few tests look at
            "GPUMETER_CHECKPOINT_INTERVAL_MS": "1000",
            "GPUMETER_LEASE_TIMEOUT_MS": "3600000",  # a test collects when it wants to
            "GPUMETER_HTTP_HOST": "127.0.0.1",
            "GPUMETER_HTTP_PORT": str(self.http),
            "GPUMETER_USAGE_PORT": str(self.usage),
            "GPUMETER_JOURNAL_DIR": str(folder / "journal"),
            "GPUMETER_MODEL_CACHE": str(folder / "cache"),
            "GPUMETER_CREDENTIALS_DIR": str(credentials),
        } | (environment or {})
        self.log_file = folder / f"worker-{uuid.uuid4().hex[:8]}.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    @property
    def url(self) -> str:
        """Port 8000's."""
        return f"http://127.0.0.1:{self.http}"

    @property
    def log(self) -> str:
        """Everything that was logged so far."""
        return self.log_file.read_text()

    def ready(self) -> "WorkerProcess":
        """Wait for readiness."""

        def is_ready() -> bool:
            assert self.process.poll() is None, self.log
            return self.reason() == "Ready"

        until(is_ready, "the worker is ready", START_TIMEOUT_S)
        return self

    def reason(self) -> str:
        """Why it is ready or not; empty while nobody listens."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=10) as answer:
                return str(json.load(answer)["reason"])
        except urllib.error.HTTPError as error:
            return str(json.load(error)["reason"])
        except OSError:
            return ""

    def metrics(self) -> dict[str, float]:
        """Every sample by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def status(self) -> JournalStatus:
        """What the journal holds."""
        return decode_status(self._usage("/usage/v1/status"))

    def collect(self, ledger: Ledger, *, limit: int = 5000, acknowledge: bool = True) -> None:
        """Pull every boot once, verify, commit, acknowledge."""
        for boot in self.status().boots:
            have = len(ledger.records.get(boot.boot_id, []))
            page = decode_page(self._usage(f"/usage/v1/records?boot={boot.boot_id}&after={have}&limit={limit}"))
            if page.links:
                head = verify(ledger.heads.get(boot.boot_id, GENESIS), page.links)
                ledger.heads[boot.boot_id] = head
                ledger.records.setdefault(boot.boot_id, []).extend(parse(link.body) for link in page.links)
                if acknowledge:
                    given = Acknowledgement(boot.boot_id, have + len(page.links), head)
                    self._usage("/usage/v1/acknowledge", encode_acknowledgement(given))

    def children(self) -> list[int]:
        """The process ids of its children: the engine."""
        return children(self.process.pid)

    def send(self, number: signal.Signals) -> None:
        """A signal to the process itself."""
        self.process.send_signal(number)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        engines = self.children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for pid in engines:
            until(lambda pid=pid: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), f"the engine {pid} is gone")

    def _usage(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.usage}{path}", body, {"Authorization": f"Bearer {USAGE_TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            data: bytes = answer.read()
            return data


@contextmanager
def worker(
    folder: Path, environment: dict[str, str] | None = None, command: Sequence[str | Path] = (COMMAND, "serve")
) -> Iterator[WorkerProcess]:
    """A worker that is gone afterwards."""
    process = WorkerProcess(folder, environment, command)
    try:
        yield process
    finally:
        process.stop()


def session_id() -> str:
    """As the gateway makes it."""
    return f"s-{uuid.uuid4().hex}"


def hop_token(tenant: str = "acme", session: str | None = None, key: str = HOP_KEY, **claims: object) -> str:
    """What the gateway sends; `claims` replace its own."""
    now = int(time.time())
    own = {"iss": "gpumeter-gateway", "aud": SERVICE_UID, "tenant": tenant, "session": session or session_id()}
    return jwt.encode({**own, "iat": now, "exp": now + 60, **claims}, key, algorithm="HS256")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
