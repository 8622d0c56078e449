"""Configuration of the operator: its environment, and every kopf setting with its reason.

Owns names, defaults and checks of GPUMETER_* variables. Reports all problems at once. Does not know what the values do.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kopf

from gpumeter_operator.decide.credentials import MASTER_KEY_MIN_BYTES
from gpumeter_operator.decide.names import FINALIZER
from gpumeter_operator.decide.workload import Installation

# Not gpumeter.io itself: kopf hides every annotation under its own prefix from the comparison that notices edits, and
# gpumeter.io/stop is one that a user edits.
KOPF_PREFIX = "operator.gpumeter.io"
HANDLER_BACKOFF_S = 5.0
PULL_POLICIES = ("Always", "IfNotPresent", "Never")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator was started with."""

    installation: Installation
    master_key: bytes
    status_interval_ms: int
    deletion_margin_ms: int
    http_host: str
    http_port: int


class SettingsInvalid(Exception):
    """The environment cannot be used; `problems` holds a sentence for each variable that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from GPUMETER_*; raises SettingsInvalid with every problem."""
    problems: list[str] = []

    def number(name: str, default: int, least: int, most: int) -> int:
        text = environment.get(name, "")
        if not text:
            return default
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            problems.append(
                f"{name} is {text!r}; set a whole number from {least} to {most}, or leave it out ({default})."
            )
            return default
        return int(text)

    def choice(name: str, default: str, choices: tuple[str, ...]) -> str:
        text = environment.get(name, "") or default
        if text not in choices:
            problems.append(f"{name} is {text!r}; set one of {', '.join(choices)}.")
        return text

    image = environment.get("GPUMETER_WORKER_IMAGE", "")
    if not image:
        problems.append("GPUMETER_WORKER_IMAGE is not set; name the image that workers run.")
    settings = Settings(
        installation=Installation(
            worker_image=image,
            worker_image_pull_policy=choice("GPUMETER_WORKER_IMAGE_PULL_POLICY", "IfNotPresent", PULL_POLICIES),
            gateway_url=environment.get("GPUMETER_GATEWAY_URL", ""),
        ),
        master_key=_master_key(environment.get("GPUMETER_MASTER_KEY_FILE", ""), problems),
        status_interval_ms=number("GPUMETER_STATUS_INTERVAL_MS", 3_000, 200, 60_000),
        deletion_margin_ms=number("GPUMETER_DELETION_MARGIN_MS", 60_000, 0, 3_600_000),
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
            f"GPUMETER_MASTER_KEY_FILE names {path}, which holds {len(key)} bytes; "
            f"a master key has at least {MASTER_KEY_MIN_BYTES}."
        )
    return key


def configure_kopf(settings: Any) -> None:
    """Every setting of kopf that differs from its default, and why. `settings` is kopf.OperatorSettings."""
    # Our own name in the finalizer: it tells an administrator who waits, and for what.
    settings.persistence.finalizer = FINALIZER
    # State lives in annotations: status is ours and its schema prunes unknown fields.
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=KOPF_PREFIX, v1=False)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=KOPF_PREFIX, v1=False)
    # One operator by the chart's Recreate strategy; kopf's peering freezes everyone when priorities are equal.
    settings.peering.standalone = True
    # A request that takes 10 s is lost; the default of 5 minutes would look like a freeze.
    settings.networking.request_timeout = 10
    settings.networking.connect_timeout = 5
    # The API server is told to end a watch before we would give it up; without both a dead connection is kept for ever.
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 310
    settings.watching.connect_timeout = 10
    # An unexpected error is tried again soon: a minute (the default) is longer than a status may be wrong.
    settings.execution.default_backoff = HANDLER_BACKOFF_S
    # The reconciler writes events itself, once each; what the framework logs is not for users.
    settings.posting.enabled = False
    settings.posting.level = logging.ERROR
    # No limit on workers: a limit below the number of services stalls all of them while one waits.
    settings.queueing.worker_limit = None
    # The deletion of a service waits inside its handler; an operator that stops must not wait with it.
    settings.queueing.exit_timeout = 1.0
