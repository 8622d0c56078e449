"""The worker's settings, read from GPUMETER_* once.

Owns names, defaults and what is refused; every problem is reported, not only the first. Reads the environment and the
credentials' files, and looks at nothing else of the machine.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpumeter_worker.metering.attribution import Rule

DTYPES = ("auto", "float32", "bfloat16", "float16")
OPERATOR_MARKS = ("GPUMETER_SERVICE_UID", "GPUMETER_CREDENTIALS_DIR", "GPUMETER_SERVICE")
"""What only the operator sets: with any of these, `--dev` is refused."""

_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

DEV_TENANT = "anonymous"

_URI_CHARS_MAX = 1024
"""As long as the InferenceService lets spec.model.uri be."""


class SettingsInvalid(Exception):
    """The settings cannot be used; the message joins every problem into one sentence."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Credentials:
    """What proves who calls: the collector by `usage_token`, the gateway by a token signed with `hop_key`."""

    usage_token: str
    hop_key: str


@dataclass(frozen=True, slots=True)
class Settings:
    """How this worker serves and meters. Durations carry their unit; 0 means "none" where it says so."""

    service: str
    service_uid: str
    worker_uid: str
    model_name: str
    model_uri: str
    model_revision: str
    dtype: str
    max_model_len: int  # 0: what the model says
    max_batch_size: int
    max_batch_tokens: int
    max_wait_ms: int
    max_queue_length: int
    cuda_graphs: bool
    compile: bool
    prefix_cache: bool
    allow_pickle: bool
    gpu_count: int
    ranks: int  # processes, with a device each, that the model is split over
    gpu_class: str
    attribution: Rule
    calibration_ms: int  # how long planned steps may be timed before readiness; 0: none are
    checkpoint_interval_ms: int
    lease_timeout_ms: int  # 0: no lease
    drain_timeout_ms: int
    seal_grace_ms: int
    step_timeout_ms: int  # 0: what the measured steps say
    start_timeout_ms: int  # 0: for ever
    journal_dir: Path
    journal_max_bytes: int
    model_cache: Path
    gateway_url: str
    max_body_bytes: int
    http_host: str
    http_port: int
    usage_port: int
    dev: bool
    credentials: Credentials | None
    """None with `--dev`, and only then: no caller has to prove anything."""

    @property
    def device(self) -> str:
        """The torch device: a GPU where one was asked for, and never the CPU instead."""
        return "cuda" if self.gpu_count else "cpu"

    @property
    def clock(self) -> str:
        """How steps are measured, as records say it."""
        return "cuda" if self.gpu_count else "host"


def from_environment(environment: Mapping[str, str], *, dev: bool = False, model: str = "") -> Settings:
    """Read all settings. `dev` is a worker run by hand; `model` replaces GPUMETER_MODEL_URI. Raises SettingsInvalid."""
    read = _Reader(environment)
    if dev:
        marks = [name for name in OPERATOR_MARKS if environment.get(name)]
        if marks:
            raise SettingsInvalid(
                [f"--dev is refused because the operator started this worker ({', '.join(marks)} is set)"]
            )
    state = Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "gpumeter" if dev else Path("/")
    by_hand = "; name the model with --model URI" if dev else ""
    model_uri = model or read.text("GPUMETER_MODEL_URI", required=not model, longest=_URI_CHARS_MAX, remedy=by_hand)
    gpu_count = read.whole("GPUMETER_GPU_COUNT", 0, 0, 64)
    settings = Settings(
        service=read.text("GPUMETER_SERVICE", "dev/worker" if dev else "", required=not dev),
        service_uid=read.text("GPUMETER_SERVICE_UID", required=not dev),
        worker_uid=read.text("GPUMETER_WORKER_UID", "dev" if dev else "", required=not dev),
        model_name=read.text("GPUMETER_MODEL_NAME", model_uri.rstrip("/").rpartition("/")[2]),
        model_uri=model_uri,
        model_revision=read.text("GPUMETER_MODEL_REVISION", "main"),
        dtype=read.choice("GPUMETER_DTYPE", DTYPES),
        max_model_len=read.whole("GPUMETER_MAX_MODEL_LEN", 0, 0, 2**24),
        max_batch_size=read.whole("GPUMETER_MAX_BATCH_SIZE", 64, 1, 4096),
        max_batch_tokens=read.whole("GPUMETER_MAX_BATCH_TOKENS", 2048, 1, 2**20),
        max_wait_ms=read.whole("GPUMETER_MAX_WAIT_MS", 0, 0, 60_000),
        max_queue_length=read.whole("GPUMETER_MAX_QUEUE_LENGTH", 256, 0, 10**6),
        cuda_graphs=read.flag("GPUMETER_CUDA_GRAPHS", default=True),
        compile=read.flag("GPUMETER_COMPILE", default=False),
        prefix_cache=read.flag("GPUMETER_PREFIX_CACHE", default=True),
        allow_pickle=read.flag("GPUMETER_ALLOW_PICKLE", default=False),
        gpu_count=gpu_count,
        ranks=read.whole("GPUMETER_TENSOR_PARALLEL", max(gpu_count, 1), 1, 64),
        gpu_class=read.text("GPUMETER_GPU_CLASS", "gpu" if gpu_count else "cpu"),
        attribution=Rule(read.choice("GPUMETER_ATTRIBUTION", tuple(Rule))),
        calibration_ms=read.whole("GPUMETER_CALIBRATION_MS", 5000, 0, 600_000),
        checkpoint_interval_ms=read.whole("GPUMETER_CHECKPOINT_INTERVAL_MS", 5000, 100, 60_000),
        lease_timeout_ms=read.whole("GPUMETER_LEASE_TIMEOUT_MS", 0 if dev else 60_000, 0, 86_400_000),
        drain_timeout_ms=read.whole("GPUMETER_DRAIN_TIMEOUT_MS", 120_000, 0, 86_400_000),
        seal_grace_ms=read.whole("GPUMETER_SEAL_GRACE_MS", 0 if dev else 20_000, 0, 3_600_000),
        start_timeout_ms=read.whole("GPUMETER_START_TIMEOUT_MS", 600_000, 0, 86_400_000),
        step_timeout_ms=read.whole("GPUMETER_STEP_TIMEOUT_MS", 0, 0, 86_400_000),
        journal_dir=Path(read.text("GPUMETER_JOURNAL_DIR", str(state / "journal") if dev else "/var/lib/gpumeter")),
        journal_max_bytes=read.whole("GPUMETER_JOURNAL_MAX_BYTES", 2**29, 2**20, 2**40),
        model_cache=Path(read.text("GPUMETER_MODEL_CACHE", str(state / "models") if dev else "/var/cache/gpumeter")),
        gateway_url=read.text("GPUMETER_GATEWAY_URL"),
        max_body_bytes=read.whole("GPUMETER_MAX_BODY_BYTES", 10 * 2**20, 1024, 2**30),
        http_host=read.text("GPUMETER_HTTP_HOST", "127.0.0.1" if dev else "0.0.0.0"),  # noqa: S104 - a pod's own address
        http_port=read.whole("GPUMETER_HTTP_PORT", 8000, 0, 65535),
        usage_port=read.whole("GPUMETER_USAGE_PORT", 8001, 0, 65535),
        dev=dev,
        credentials=None if dev else read.credentials(),
    )
    problems = read.problems + _contradictions(settings)
    if problems:
        raise SettingsInvalid(problems)
    return settings


def _contradictions(settings: Settings) -> list[str]:
    problems = []
    if settings.max_batch_tokens < settings.max_batch_size:
        problems.append(
            f"GPUMETER_MAX_BATCH_TOKENS is {settings.max_batch_tokens}; it must be at least GPUMETER_MAX_BATCH_SIZE "
            f"({settings.max_batch_size}), one token for every running request"
        )
    if settings.gpu_count and settings.ranks != settings.gpu_count:
        problems.append(
            f"GPUMETER_TENSOR_PARALLEL is {settings.ranks} and GPUMETER_GPU_COUNT is {settings.gpu_count}; a worker "
            "splits its model over all of its GPUs, so make them equal"
        )
    if not settings.dev and settings.service and not re.fullmatch(r"[^/\s]+/[^/\s]+", settings.service):
        problems.append(f"GPUMETER_SERVICE is {settings.service!r:.80}; it must read namespace/name")
    return problems


class _Reader:
    """Collects problems while values are read, so that a user sees them all at once."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.problems: list[str] = []

    def text(
        self, name: str, default: str = "", *, required: bool = False, longest: int = 250, remedy: str = ""
    ) -> str:
        value = self._environment.get(name, "").strip()
        if required and not value:
            self.problems.append(f"{name} is not set{remedy}")
        elif len(value) > longest or not value.isprintable():
            self.problems.append(f"{name} must be at most {longest} printable characters")
        return value or default

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self._environment.get(name, "").strip() or choices[0]
        if value not in choices:
            self.problems.append(f"{name} is {value!r:.80}; it must be one of {', '.join(choices)}")
            return choices[0]
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        text = self._environment.get(name, "").strip().lower()
        if text and text not in _ON + _OFF:
            self.problems.append(f"{name} is {text!r:.80}; it must be 1 or 0")
        return text in _ON if text else default

    def whole(self, name: str, default: int, lowest: int, highest: int) -> int:
        text = self._environment.get(name, "").strip()
        if not text:
            return default
        if not re.fullmatch(r"[0-9]{1,18}", text) or not lowest <= int(text) <= highest:
            self.problems.append(f"{name} is {text!r:.80}; it must be a whole number from {lowest} to {highest}")
            return default
        return int(text)

    def credentials(self) -> Credentials:
        directory = Path(self.text("GPUMETER_CREDENTIALS_DIR", "/etc/gpumeter/credentials"))
        values = {}
        for name in ("usage-token", "hop-key"):
            try:
                values[name] = (directory / name).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                self.problems.append(f"the credential {directory / name} cannot be read ({type(error).__name__})")
                continue
            if len(values[name]) < 32:
                self.problems.append(f"the credential {directory / name} has fewer than 32 characters")
        return Credentials(values.get("usage-token", ""), values.get("hop-key", ""))
