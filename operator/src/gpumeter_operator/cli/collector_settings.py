"""The collector's settings: names, defaults and checks of its GPUMETER_* variables.

Owns that all problems are told at once, each as a sentence. Does not know what the values do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpumeter_operator.decide.credentials import MASTER_KEY_MIN_BYTES
from gpumeter_usage.period import Granularity

PERIODS = {
    "1m": Granularity.MINUTE,
    "5m": Granularity.FIVE_MINUTES,
    "15m": Granularity.FIFTEEN_MINUTES,
    "1h": Granularity.HOUR,
}
DEFAULT_LEDGER = "sqlite:////var/lib/gpumeter/ledger.db"


class SettingsInvalid(Exception):
    """The environment cannot be used; `problems` holds a sentence for each variable that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Settings:
    """What the collector was started with. `grace_s`: how long a period waits for its workers before it is closed."""

    ledger_url: str
    granularity: Granularity
    pull_interval_ms: int
    publish_interval_ms: int
    grace_s: int
    master_key: bytes
    http_host: str
    http_port: int


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from GPUMETER_*; raises SettingsInvalid with every problem."""
    problems: list[str] = []

    def number(name: str, default: int, least: int, most: int) -> int:
        text = environment.get(name, "")
        if not text:
            return default
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            problems.append(
                f"{name} is {text!r:.40}; set a whole number from {least} to {most}, or leave it out ({default})."
            )
            return default
        return int(text)

    def choice(name: str, default: str, choices: tuple[str, ...]) -> str:
        text = environment.get(name, "") or default
        if text in choices:
            return text
        problems.append(f"{name} is {text!r:.40}; set one of {', '.join(choices)}.")
        return default

    settings = Settings(
        ledger_url=environment.get("GPUMETER_LEDGER_URL", "") or DEFAULT_LEDGER,
        granularity=PERIODS[choice("GPUMETER_PERIOD", "1h", tuple(PERIODS))],
        pull_interval_ms=number("GPUMETER_PULL_INTERVAL_MS", 2_000, 100, 60_000),
        publish_interval_ms=number("GPUMETER_PUBLISH_INTERVAL_MS", 5_000, 500, 300_000),
        grace_s=number("GPUMETER_CLOSE_GRACE_S", 600, 1, 86_400),
        master_key=_master_key(environment.get("GPUMETER_MASTER_KEY_FILE", ""), problems),
        http_host=environment.get("GPUMETER_HTTP_HOST", "") or "0.0.0.0",  # noqa: S104 - probes come from the node
        http_port=number("GPUMETER_HTTP_PORT", 8080, 1, 65_535),
    )
    if problems:
        raise SettingsInvalid(problems)
    return settings


def _master_key(path: str, problems: list[str]) -> bytes:
    if not path:
        problems.append("GPUMETER_MASTER_KEY_FILE is not set; name the file that holds the release's master key.")
        return b""
    try:
        key = Path(path).read_bytes()
    except OSError as error:
        problems.append(f"GPUMETER_MASTER_KEY_FILE names {path}, which cannot be read: {error.strerror}.")
        return b""
    if len(key) < MASTER_KEY_MIN_BYTES:
        problems.append(
            f"GPUMETER_MASTER_KEY_FILE names {path}, which holds {len(key)} bytes; a master key has at least "
            f"{MASTER_KEY_MIN_BYTES}."
        )
    return key
