"""The gateway's settings: environment variables, their defaults and why these.

Owns names, defaults and limits, and which of them contradict each other. Does not read the master key itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpumeter_operator.decide.names import INTERNAL_PORT
from gpumeter_operator.environment import MASTER_KEY_FILE, Environment

COUNT_MAX = 1 << 40  # a terabyte or a million million of anything is a slip of the pen
_SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set, with its default and why this one."""

    namespace: str = ""  # the release's, where API keys live
    master_key_file: Path = Path("/etc/gpumeter/master/master-key")  # hop keys are derived from it
    host: str = "0.0.0.0"  # noqa: S104 - a pod's address
    port: int = 8080
    internal_port: int = INTERNAL_PORT  # for the operator; not a port of the Service
    body_bytes_max: int = 10 << 20  # a body is held until a worker has it
    held_bytes_max: int = 96 << 20  # bodies in flight; in memory up to twice that
    tenant_held_bytes_max: int = 32 << 20  # one tenant must leave room for others
    in_flight_max: int = 1024  # bounds connections
    body_timeout_s: float = 30  # a client that sends slowly
    write_timeout_s: float = 60  # a client that reads slowly costs GPU time
    connect_timeout_s: float = 2  # a pod answers in milliseconds or not
    silence_timeout_s: float = 600  # a plain answer comes only at its end
    waiting_max: int = 512  # requests that wait for a worker; half of what may be in flight
    tenant_waiting_max: int = 256  # one tenant must leave room for others
    waiting_bytes_max: int = 48 << 20  # their bodies; the other half of held_bytes_max is for services that run
    tenant_waiting_bytes_max: int = 16 << 20
    waiting_timeout_s: float = 300  # a cold start of a large model takes minutes
    heartbeat_s: float = 10  # proxies cut silent connections off after 30 s or more
    prefix_affinity_bytes: int = 0  # 0: equally loaded workers take turns
    settle_s: float = 1  # for what is on its way; preStop has waited for the Service
    drain_timeout_s: float = 110  # less than the pod's grace period


DEFAULTS = Settings()


def settings_from(environ: Mapping[str, str]) -> Settings:
    """Settings from GPUMETER_*; raises SettingsInvalid with every problem."""
    read = Environment(environ)
    settings = Settings(
        namespace=read.text("GPUMETER_NAMESPACE") or _own_namespace(),
        master_key_file=Path(read.text(MASTER_KEY_FILE, str(DEFAULTS.master_key_file))),
        host=read.text("GPUMETER_GATEWAY_HOST", DEFAULTS.host),
        port=read.number("GPUMETER_GATEWAY_PORT", DEFAULTS.port, 0, 65_535),
        internal_port=read.number("GPUMETER_GATEWAY_INTERNAL_PORT", DEFAULTS.internal_port, 0, 65_535),
        body_bytes_max=read.number("GPUMETER_GATEWAY_BODY_BYTES_MAX", DEFAULTS.body_bytes_max, 1, COUNT_MAX),
        held_bytes_max=read.number("GPUMETER_GATEWAY_HELD_BYTES_MAX", DEFAULTS.held_bytes_max, 1, COUNT_MAX),
        tenant_held_bytes_max=read.number(
            "GPUMETER_GATEWAY_TENANT_HELD_BYTES_MAX", DEFAULTS.tenant_held_bytes_max, 1, COUNT_MAX
        ),
        in_flight_max=read.number("GPUMETER_GATEWAY_IN_FLIGHT_MAX", DEFAULTS.in_flight_max, 1, COUNT_MAX),
        body_timeout_s=read.seconds("GPUMETER_GATEWAY_BODY_TIMEOUT_S", DEFAULTS.body_timeout_s),
        write_timeout_s=read.seconds("GPUMETER_GATEWAY_WRITE_TIMEOUT_S", DEFAULTS.write_timeout_s),
        connect_timeout_s=read.seconds("GPUMETER_GATEWAY_CONNECT_TIMEOUT_S", DEFAULTS.connect_timeout_s),
        silence_timeout_s=read.seconds("GPUMETER_GATEWAY_SILENCE_TIMEOUT_S", DEFAULTS.silence_timeout_s),
        waiting_max=read.number("GPUMETER_GATEWAY_WAITING_MAX", DEFAULTS.waiting_max, 0, COUNT_MAX),
        tenant_waiting_max=read.number(
            "GPUMETER_GATEWAY_TENANT_WAITING_MAX", DEFAULTS.tenant_waiting_max, 0, COUNT_MAX
        ),
        waiting_bytes_max=read.number("GPUMETER_GATEWAY_WAITING_BYTES_MAX", DEFAULTS.waiting_bytes_max, 0, COUNT_MAX),
        tenant_waiting_bytes_max=read.number(
            "GPUMETER_GATEWAY_TENANT_WAITING_BYTES_MAX", DEFAULTS.tenant_waiting_bytes_max, 0, COUNT_MAX
        ),
        waiting_timeout_s=read.seconds("GPUMETER_GATEWAY_WAITING_TIMEOUT_S", DEFAULTS.waiting_timeout_s),
        heartbeat_s=read.seconds("GPUMETER_GATEWAY_HEARTBEAT_S", DEFAULTS.heartbeat_s),
        prefix_affinity_bytes=read.number("GPUMETER_GATEWAY_PREFIX_AFFINITY_BYTES", 0, 0, 1 << 20),
        settle_s=read.seconds("GPUMETER_GATEWAY_SETTLE_S", DEFAULTS.settle_s),
        drain_timeout_s=read.seconds("GPUMETER_GATEWAY_DRAIN_TIMEOUT_S", DEFAULTS.drain_timeout_s),
    )
    if not settings.namespace:
        read.problems.append(
            "GPUMETER_NAMESPACE is not set; it must name the namespace that holds the API keys' Secrets."
        )
    read.problems += _contradictions(settings)
    read.check()
    return settings


def _own_namespace() -> str:
    return _SERVICE_ACCOUNT_NAMESPACE.read_text().strip() if _SERVICE_ACCOUNT_NAMESPACE.exists() else ""


def _contradictions(settings: Settings) -> list[str]:
    """What no body of the greatest length could ever pass."""
    found = []
    body, share, whole = settings.body_bytes_max, settings.tenant_held_bytes_max, settings.held_bytes_max
    if body > share:
        found.append(
            f"GPUMETER_GATEWAY_BODY_BYTES_MAX ({body}) is more than GPUMETER_GATEWAY_TENANT_HELD_BYTES_MAX ({share}); "
            "one body must fit into a tenant's share."
        )
    if share > whole:
        found.append(
            f"GPUMETER_GATEWAY_TENANT_HELD_BYTES_MAX ({share}) is more than GPUMETER_GATEWAY_HELD_BYTES_MAX ({whole}); "
            "a tenant's share must fit into the whole."
        )
    if settings.port and settings.port == settings.internal_port:
        found.append(
            f"GPUMETER_GATEWAY_PORT and GPUMETER_GATEWAY_INTERNAL_PORT are both {settings.port}; the internal port "
            "must be one of its own, because it is not for clients."
        )
    return found + _contradictions_of_waiting(settings)


def _contradictions_of_waiting(settings: Settings) -> list[str]:
    """What would let those who wait shut the gateway for everybody else."""
    names = {
        "waiting_max": "GPUMETER_GATEWAY_WAITING_MAX",
        "tenant_waiting_max": "GPUMETER_GATEWAY_TENANT_WAITING_MAX",
        "waiting_bytes_max": "GPUMETER_GATEWAY_WAITING_BYTES_MAX",
        "tenant_waiting_bytes_max": "GPUMETER_GATEWAY_TENANT_WAITING_BYTES_MAX",
        "in_flight_max": "GPUMETER_GATEWAY_IN_FLIGHT_MAX",
        "held_bytes_max": "GPUMETER_GATEWAY_HELD_BYTES_MAX",
    }
    rules = (
        ("tenant_waiting_max", "waiting_max", "a tenant's share must fit into the waiting room."),
        ("tenant_waiting_bytes_max", "waiting_bytes_max", "a tenant's share must fit into the waiting room."),
        ("waiting_max", "in_flight_max", "those who wait are in flight too, and must leave room for others."),
        ("waiting_bytes_max", "held_bytes_max", "bodies that wait are held too, and must leave room for others."),
    )
    return [
        f"{names[less]} ({getattr(settings, less)}) is more than {names[more]} ({getattr(settings, more)}); {why}"
        for less, more, why in rules
        if getattr(settings, less) > getattr(settings, more)
    ]
