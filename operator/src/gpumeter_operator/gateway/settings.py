"""The gateway's settings: environment variables, their defaults and why these.

Owns names, defaults and validation; all problems are told at once. Does not read the master key itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

_SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class SettingsInvalid(ValueError):
    """One sentence per problem, joined by spaces."""


def _from(variable: str, why: str, read: Callable[[str], Any]) -> dict[str, Any]:
    return {"variable": variable, "why": why, "read": read}


def _port(text: str) -> int:
    if not 0 <= (port := int(text)) <= 65535:
        raise ValueError
    return port


def _seconds(text: str) -> float:
    if not 0 < (seconds := float(text)) < 86_400:
        raise ValueError
    return seconds


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set. Every field is read from one variable, GPUMETER_GATEWAY_... unless other parts share it."""

    namespace: str = field(
        default="", metadata=_from("GPUMETER_NAMESPACE", "the release's namespace, where API keys live", str)
    )
    master_key_file: Path = field(
        default=Path("/etc/gpumeter/master/master-key"),
        metadata=_from("GPUMETER_MASTER_KEY_FILE", "hop keys are derived from it", Path),
    )
    host: str = field(default="0.0.0.0", metadata=_from("GPUMETER_GATEWAY_HOST", "a pod's address", str))  # noqa: S104
    port: int = field(default=8080, metadata=_from("GPUMETER_GATEWAY_PORT", "a port from 0 to 65535", _port))
    body_bytes_max: int = field(
        default=10 << 20,
        metadata=_from("GPUMETER_GATEWAY_BODY_BYTES_MAX", "a body is held until a worker has it", _count),
    )
    in_flight_max: int = field(
        default=1024, metadata=_from("GPUMETER_GATEWAY_IN_FLIGHT_MAX", "bounds memory and connections", _count)
    )
    body_timeout_s: float = field(
        default=30, metadata=_from("GPUMETER_GATEWAY_BODY_TIMEOUT_S", "a client that sends slowly", _seconds)
    )
    write_timeout_s: float = field(
        default=60,
        metadata=_from("GPUMETER_GATEWAY_WRITE_TIMEOUT_S", "a client that reads slowly costs GPU time", _seconds),
    )
    connect_timeout_s: float = field(
        default=2,
        metadata=_from("GPUMETER_GATEWAY_CONNECT_TIMEOUT_S", "a pod answers in milliseconds or not", _seconds),
    )
    silence_timeout_s: float = field(
        default=600,
        metadata=_from("GPUMETER_GATEWAY_SILENCE_TIMEOUT_S", "a plain answer comes only at its end", _seconds),
    )
    settle_s: float = field(
        default=1,
        metadata=_from(
            "GPUMETER_GATEWAY_SETTLE_S", "for what is on its way; preStop has waited for the Service", _seconds
        ),
    )
    drain_timeout_s: float = field(
        default=110, metadata=_from("GPUMETER_GATEWAY_DRAIN_TIMEOUT_S", "less than the pod's grace period", _seconds)
    )


def settings_from(environ: Mapping[str, str]) -> Settings:
    """Read the environment. Raises SettingsInvalid with every problem."""
    values: dict[str, Any] = {}
    problems = []
    for each in fields(Settings):
        variable = each.metadata["variable"]
        if not environ.get(variable):
            continue
        try:
            values[each.name] = each.metadata["read"](environ[variable])
        except ValueError:
            problems.append(f"{variable} is {environ[variable]!r}, which cannot be ({each.metadata['why']}).")
    if "namespace" not in values and _SERVICE_ACCOUNT_NAMESPACE.exists():
        values["namespace"] = _SERVICE_ACCOUNT_NAMESPACE.read_text().strip()
    if not values.get("namespace"):
        problems.append("GPUMETER_NAMESPACE is not set; it must name the namespace that holds the API keys' Secrets.")
    if problems:
        raise SettingsInvalid(" ".join(problems))
    return Settings(**values)
