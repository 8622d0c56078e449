"""`gpumeter gateway`: puts the front door together and runs it until SIGTERM.

Owns the choice of adapters: which mirrors feed the gateway, and that hop keys come from the release's master key.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial

import click

from gpumeter_operator.adapters.kubernetes import ENDPOINT_SLICES, INFERENCE_SERVICES, SECRETS, Cluster, Unreachable
from gpumeter_operator.adapters.mirror import Mirror
from gpumeter_operator.cli.start import settings_or_exit
from gpumeter_operator.decide.credentials import derive, internal_token
from gpumeter_operator.decide.names import API_KEY_LABEL, SERVICE_LABEL
from gpumeter_operator.environment import Environment
from gpumeter_operator.gateway.app import serve
from gpumeter_operator.gateway.notices import Notices
from gpumeter_operator.gateway.settings import Settings, settings_from
from gpumeter_operator.gateway.world import World


@click.command()
def gateway() -> None:
    """Run the OpenAI-compatible front door of all services of the cluster."""
    settings, master_key = settings_or_exit(_read)
    try:
        asyncio.run(_run(settings, master_key))
    except Unreachable as problem:
        sys.exit(str(problem))


def _read(environ: Mapping[str, str]) -> tuple[Settings, bytes]:
    settings = settings_from(environ)
    read = Environment(environ)
    master_key = read.master_key(str(settings.master_key_file))
    read.check()
    return settings, master_key


async def _run(settings: Settings, master_key: bytes) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    cluster = Cluster.connect()
    try:
        hop_key_of = partial(derive, master_key, "hop-key")
        await serve(_world(cluster, settings), settings, hop_key_of, internal_token(master_key), stop)
    finally:
        await cluster.close()
    logging.getLogger(__name__).info("stopped")


def _world(cluster: Cluster, settings: Settings) -> World:
    return World(
        services=lambda changed: Mirror(cluster, INFERENCE_SERVICES, on_change=changed),
        slices=lambda changed: Mirror(cluster, ENDPOINT_SLICES, labels={SERVICE_LABEL: None}, on_change=changed),
        keys=lambda changed: Mirror(
            cluster, SECRETS, namespace=settings.namespace, labels={API_KEY_LABEL: "true"}, on_change=changed
        ),
        notices=Notices(cluster.create, clock=lambda: datetime.now(UTC)),
    )
