"""The collector's settings: names, defaults and limits of its GPUMETER_* variables.

Owns which variables there are. Does not know what the values do.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpumeter_operator.billing.keep import DEFAULT_KEEP, Keep
from gpumeter_operator.billing.signing import KeyInvalid, SigningKey, signing_key
from gpumeter_operator.environment import Environment
from gpumeter_usage.period import Granularity

PERIODS = {
    "1m": Granularity.MINUTE,
    "5m": Granularity.FIVE_MINUTES,
    "15m": Granularity.FIFTEEN_MINUTES,
    "1h": Granularity.HOUR,
}
LEDGER_URL = "GPUMETER_LEDGER_URL"
DEFAULT_LEDGER = "sqlite:////var/lib/gpumeter/ledger.db"
SIGNING_KEY_FILE = "GPUMETER_SIGNING_KEY_FILE"
DIGESTS_FILE = "GPUMETER_DIGESTS_FILE"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the collector was started with.

    `grace_s`: how long a period waits for its workers before it is closed. `keep`: how long reports stay in the API.
    `retention_days`: how long raw records are kept after their day. `signing_key` signs digests, None where none are to
    be made; `digests_file` is where they are exported to.
    """

    ledger_url: str
    granularity: Granularity
    pull_interval_ms: int
    publish_interval_ms: int
    grace_s: int
    retention_days: int
    master_key: bytes
    http_host: str
    http_port: int
    keep: Keep = DEFAULT_KEEP
    signing_key: SigningKey | None = None
    digests_file: Path | None = None


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from GPUMETER_*; raises SettingsInvalid with every problem."""
    read = Environment(environment)
    settings = Settings(
        ledger_url=read.text(LEDGER_URL, DEFAULT_LEDGER),
        granularity=PERIODS[read.choice("GPUMETER_PERIOD", "1h", tuple(PERIODS))],
        pull_interval_ms=read.number("GPUMETER_PULL_INTERVAL_MS", 2_000, 100, 60_000),
        publish_interval_ms=read.number("GPUMETER_PUBLISH_INTERVAL_MS", 5_000, 500, 300_000),
        grace_s=read.number("GPUMETER_CLOSE_GRACE_S", 600, 1, 86_400),
        keep=_keep(read),
        retention_days=read.number("GPUMETER_RETENTION_DAYS", 400, 90, 36_500),
        master_key=read.master_key(),
        http_host=read.text("GPUMETER_HTTP_HOST", "0.0.0.0"),  # noqa: S104 - probes come from the node
        http_port=read.number("GPUMETER_HTTP_PORT", 8080, 1, 65_535),
        signing_key=read_signing_key(read),
        digests_file=Path(file) if (file := read.text(DIGESTS_FILE)) else None,
    )
    read.check()
    return settings


def read_signing_key(read: Environment) -> SigningKey | None:
    """The key of digests, from the file that GPUMETER_SIGNING_KEY_FILE names; None where it names none."""
    path = read.text(SIGNING_KEY_FILE)
    if not path:
        return None
    try:
        return signing_key(Path(path).read_bytes())
    except OSError as error:
        read.problems.append(f"{SIGNING_KEY_FILE} names {path}, which cannot be read: {error.strerror}.")
    except KeyInvalid as problem:
        read.problems.append(f"{SIGNING_KEY_FILE} names {path}: {problem}.")
    return None


def _keep(read: Environment) -> Keep:
    text = read.text("GPUMETER_KEEP_DAYS", "hours=3,days=31,months=400")
    found = re.fullmatch(r"hours=([0-9]{1,4}),days=([0-9]{1,4}),months=([0-9]{1,4})", text)
    keep = Keep(*(int(number) for number in found.groups())) if found else Keep(0, 0, 0)
    if min(keep.hours, keep.days, keep.months) < 1:
        read.problems.append(
            f"GPUMETER_KEEP_DAYS is {text!r:.60}; write days of at least 1 as hours=3,days=31,months=400, or leave it "
            "out."
        )
    return keep
