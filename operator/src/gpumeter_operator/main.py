"""kopf's handlers: which event of an InferenceService leads to which call.

Owns the registration of handlers and how kopf is started. Decides nothing.
"""

import logging
from datetime import timedelta
from typing import Any

import kopf

from gpumeter_operator.adapters.kubernetes import Cluster
from gpumeter_operator.decide.credentials import internal_token
from gpumeter_operator.flow.doors import doors_of
from gpumeter_operator.flow.operation import Operation
from gpumeter_operator.flow.scale_ports import NoDoors, OpenDoors
from gpumeter_operator.settings import HANDLER_BACKOFF_S, Settings, configure_kopf

SERVICES = ("gpumeter.io", "v1alpha1", "inferenceservices")


def run(settings: Settings) -> None:
    """Run the operator until it is told to stop."""
    _quiet_kopf()
    interval_s = settings.status_interval_ms / 1_000
    cluster = Cluster.connect()
    doors: OpenDoors = NoDoors
    if settings.gateway_service:
        doors = doors_of(cluster, settings.gateway_service, internal_token(settings.master_key))
    operation = Operation(
        cluster,
        settings.installation,
        settings.master_key,
        interval_s=interval_s,
        deletion_margin=timedelta(milliseconds=settings.deletion_margin_ms),
        http=(settings.http_host, settings.http_port),
        open_doors=doors,
    )
    kopf_settings = kopf.OperatorSettings()
    configure_kopf(kopf_settings)
    kopf.run(
        registry=handlers(),
        settings=kopf_settings,
        memo=operation,
        standalone=True,
        clusterwide=True,
    )


def handlers() -> kopf.OperatorRegistry:
    """All handlers, in a registry of their own."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> Any:
        # kopf's own minimal logins: neither the official client nor pykube is installed, by choice (30 MiB of memory).
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.startup(registry=registry)
    async def startup(memo: Operation, **_: Any) -> None:
        await memo.start()

    @kopf.on.cleanup(registry=registry)
    async def cleanup(memo: Operation, **_: Any) -> None:
        await memo.stop()

    # One function for all three: with create and resume alone, edits would be swallowed. A failure is not raised: kopf
    # would note every retry in the object, and the next round looks again in seconds anyway.
    @kopf.on.resume(*SERVICES, id="reconcile", registry=registry)
    @kopf.on.create(*SERVICES, id="reconcile", registry=registry)
    @kopf.on.update(*SERVICES, id="reconcile", registry=registry)
    async def reconcile(body: Any, memo: Operation, **_: Any) -> None:
        await memo.look(dict(body))

    @kopf.on.delete(*SERVICES, id="release", backoff=HANDLER_BACKOFF_S, registry=registry)
    async def release(body: Any, memo: Operation, **_: Any) -> None:
        if (sentence := await memo.leave(dict(body))) is not None:
            raise kopf.TemporaryError(sentence, delay=HANDLER_BACKOFF_S)

    return registry


def _quiet_kopf() -> None:
    """Kopf tells of every handled event and of every tick of a timer at INFO; with DEBUG a developer sees them."""
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        for chatty in ("kopf.objects", "kopf.activities", "kopf._core.engines.activities"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
