"""Configuration of the operator: its environment, and every kopf setting with its reason.

Owns the names, defaults and limits of its GPUMETER_* variables. Does not know what the values do.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumeter_operator.decide.access import Monitoring, Peers
from gpumeter_operator.decide.names import FINALIZER
from gpumeter_operator.decide.placement import NodeChoice
from gpumeter_operator.decide.workload import Installation
from gpumeter_operator.environment import Environment
from gpumeter_operator.handled import HandledInMemory, OnlyRetries

# Not gpumeter.io itself: kopf hides every annotation under its own prefix from the comparison that notices edits, and
# gpumeter.io/stop is one that a user edits.
KOPF_PREFIX = "operator.gpumeter.io"
HANDLER_BACKOFF_S = 5.0
# How long a status waits that only tells how far a start is. Of a thousand services that start together most go through
# three such states within seconds, each of them a write and some an event, of which nobody reads any; a worker that
# loads for minutes tells all of them. At the longest it is this and one round of looks.
HOLD_MS = 5_000
GPU_CLASSES = "GPUMETER_GPU_CLASSES"
PEERS = "GPUMETER_WORKER_PEERS"
MONITORING = "GPUMETER_WORKER_MONITORING"
PULL_POLICIES = ("Always", "IfNotPresent", "Never")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator was started with."""

    installation: Installation
    gateway_service: str
    """NAMESPACE/NAME of the gateways' Service; "" where there is none, and nothing scales to zero or from it."""
    master_key: bytes
    status_interval_ms: int
    status_hold_ms: int
    deletion_margin_ms: int
    http_host: str
    http_port: int
    namespace: str
    lease: str
    """Of all operators of a release one acts: the one that holds this Lease of the namespace."""


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from GPUMETER_*; raises SettingsInvalid with every problem."""
    read = Environment(environment)
    settings = Settings(
        installation=Installation(
            worker_image=read.needed("GPUMETER_WORKER_IMAGE", "name the image that workers run"),
            worker_image_pull_policy=read.choice("GPUMETER_WORKER_IMAGE_PULL_POLICY", "IfNotPresent", PULL_POLICIES),
            gateway_url=read.text("GPUMETER_GATEWAY_URL"),
            gpu_classes=_gpu_classes(read),
            peers=_peers(read),
            monitoring=_monitoring(read),
            development_image=read.text("GPUMETER_DEVELOPMENT_IMAGE"),
        ),
        gateway_service=_gateway_service(read),
        master_key=read.master_key(),
        status_interval_ms=read.number("GPUMETER_STATUS_INTERVAL_MS", 3_000, 200, 60_000),
        status_hold_ms=read.number("GPUMETER_STATUS_HOLD_MS", HOLD_MS, 0, 60_000),
        deletion_margin_ms=read.number("GPUMETER_DELETION_MARGIN_MS", 60_000, 0, 3_600_000),
        http_host=read.text("GPUMETER_HTTP_HOST", "0.0.0.0"),  # noqa: S104 - probes come from the node
        http_port=read.number("GPUMETER_HTTP_PORT", 8080, 1, 65_535),
        namespace=read.needed("GPUMETER_NAMESPACE", "name the namespace in which the operators' Lease is to lie"),
        lease=read.text("GPUMETER_LEASE", "gpumeter-operator"),
    )
    read.check()
    return settings


def _gateway_service(read: Environment) -> str:
    text = read.text("GPUMETER_GATEWAY_SERVICE")
    if text and not re.fullmatch(r"[a-z0-9.-]+/[a-z0-9-]+", text):
        read.problems.append(f"GPUMETER_GATEWAY_SERVICE is {text!r:.80}; write NAMESPACE/NAME, or leave it out.")
    return text


def _gpu_classes(read: Environment) -> Mapping[str, NodeChoice]:
    found = read.document(GPU_CLASSES, "with {nodeSelector: {...}, tolerations: [...]} by class of GPU")
    classes = {}
    for name, choice in found.items():
        selector = choice.get("nodeSelector") if isinstance(choice, dict) else None
        tolerations = (choice.get("tolerations") or []) if isinstance(choice, dict) else None
        if not isinstance(selector, dict) or not selector or not isinstance(tolerations, list):
            read.problems.append(
                f"{GPU_CLASSES} says nothing of the nodes of {name!r:.64}; give it a nodeSelector with at least one "
                "label, and tolerations as a list, if any."
            )
            continue
        classes[name] = NodeChoice(selector, tuple(tolerations))
    return classes


def _peers(read: Environment) -> Peers | None:
    found = read.document(PEERS, "with lists of NetworkPolicyPeers under http and usage, and rules under egress")
    if not found:
        return None
    lists = {key: found.get(key) or [] for key in ("http", "usage", "egress")}
    if not all(isinstance(one, list) for one in lists.values()) or not lists["http"] or not lists["usage"]:
        # A rule without peers would let everybody in.
        read.problems.append(
            f"{PEERS} names nobody who may reach workers; fill http and usage with NetworkPolicyPeers."
        )
        return None
    return Peers(tuple(lists["http"]), tuple(lists["usage"]), tuple(lists["egress"]) or None)


def _monitoring(read: Environment) -> Monitoring | None:
    found = read.document(MONITORING, "with the PodMonitors' labels and interval")
    return Monitoring(found.get("labels") or {}, str(found.get("interval", "15s"))) if found else None


def configure_kopf(settings: Any, handled: HandledInMemory) -> None:
    """Every setting of kopf that differs from its default, and why. `settings` is kopf.OperatorSettings."""
    # Our own name in the finalizer: it tells an administrator who waits, and for what.
    settings.persistence.finalizer = FINALIZER
    # A deletion that is tried again is noted in annotations: status is ours and its schema prunes unknown fields.
    settings.persistence.progress_storage = OnlyRetries(prefix=KOPF_PREFIX, v1=False)
    # What was dealt with is kept in memory: an annotation of it would be a write for each service and each edit.
    settings.persistence.diffbase_storage = handled
    # One operator by the Lease (flow.election); kopf's peering freezes everyone when priorities are equal.
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
    # After an error of its own kopf leaves an object alone, up to 610 s by default. What it does not bring for a minute
    # counts as a watch that is frozen (flow.liveness).
    settings.queueing.error_delays = (1, 2, 3, 5, 8, 13, 20)
    # No limit on workers: a limit below the number of services stalls all of them while one waits.
    settings.queueing.worker_limit = None
    # The deletion of a service waits inside its handler; an operator that stops must not wait with it.
    settings.queueing.exit_timeout = 1.0
