"""The gateway as a server: routes, start, and a stop that finishes what runs.

Owns the life of the listening socket. Does not know what a request means (front) or where the cluster is (world).
"""

import asyncio
import logging
import time

from aiohttp import web

from gpumeter_operator.gateway.demand import Board
from gpumeter_operator.gateway.doorman import Doorman
from gpumeter_operator.gateway.front import Front, HopKeyOf
from gpumeter_operator.gateway.internal import Internal
from gpumeter_operator.gateway.relay import Relay
from gpumeter_operator.gateway.room import Bounds
from gpumeter_operator.gateway.settings import Settings
from gpumeter_operator.gateway.telemetry import Telemetry
from gpumeter_operator.gateway.world import World

logger = logging.getLogger(__name__)

# Also bounds a client that opens a connection and never completes its headers.
_CLIENT_IDLE_S = 75.0
_LAST_WORDS_S = 5.0  # for error events and answers to leave after the drain timeout


async def serve(
    world: World, settings: Settings, hop_key_of: HopKeyOf, internal_token: str, stop: asyncio.Event
) -> None:
    """Serve until `stop` is set, then drain. Raises when a mirror fails for good."""
    gateway = Gateway(world, settings, hop_key_of, internal_token)
    await gateway.start()
    mirrors = asyncio.create_task(world.run())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((mirrors, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            mirrors.result()  # raises what ended it
        await gateway.stop()
    finally:
        for task in (mirrors, stopped):
            task.cancel()
        await asyncio.gather(mirrors, stopped, return_exceptions=True)
        await gateway.close()


class Gateway:
    """A running gateway."""

    def __init__(self, world: World, settings: Settings, hop_key_of: HopKeyOf, internal_token: str) -> None:
        self._settings = settings
        self._world = world
        self._hop_key_of = hop_key_of
        # Nanoseconds as the first version: no former process at this address can have told a greater one.
        self._board = Board(time.time_ns())
        self._internal = Internal(self._board, internal_token)
        self._front: Front
        self._doorman: Doorman
        self._relay: Relay
        self._runner: web.AppRunner
        self._site: web.TCPSite
        self.port = 0

    async def start(self) -> None:
        """Listen. Requests are refused with 503 until the world is in sync."""
        telemetry = Telemetry()
        telemetry.watch_ignored_keys(lambda: len(self._world.keyring().ignored))
        self._relay = Relay(
            connect_timeout_s=self._settings.connect_timeout_s,
            silence_timeout_s=self._settings.silence_timeout_s,
        )
        self._doorman = _doorman(self._world, self._settings, telemetry, self._board)
        self._doorman.on_demand = self._internal.changed
        self._front = Front(
            self._world, self._doorman, self._relay, telemetry, settings=self._settings, hop_key_of=self._hop_key_of
        )
        app = web.Application(middlewares=[self._front.around])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._front.complete),
                web.post("/v1/completions", self._front.complete),
                web.post("/generate", self._front.complete),
                web.get("/v1/models", self._front.list_models),
                web.get("/v1/models/{model:.+}", self._front.get_model),
                web.get("/healthz", self._front.healthz),
                web.get("/readyz", self._front.readyz),
                web.get("/metrics", self._front.metrics),
            ]
        )
        # handler_cancellation: a client that goes away ends its handler, and with it the connection to the worker.
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=_CLIENT_IDLE_S,
            shutdown_timeout=_LAST_WORDS_S,
        )
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, self._settings.host, self._settings.port, backlog=1024)
        await self._site.start()
        self.port = self._site.port
        await self._internal.start(self._settings.host, self._settings.internal_port)
        logger.info("listening on %s:%d, for the operator on %d", self._settings.host, self.port, self.internal_port)

    @property
    def internal_port(self) -> int:
        """Where the operator asks."""
        return self._internal.port

    @property
    def waiting(self) -> int:
        """Requests that wait for a worker."""
        return self._doorman.waiting

    async def stop(self) -> None:
        """Readiness off, wait until nobody is sent here, finish what runs, within the drain timeout."""
        self._front.stopping = True
        logger.info("stopping: %d requests in flight", self._front.in_flight)
        await asyncio.sleep(self._settings.settle_s)
        await self._site.stop()
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self._front.idle.wait()
        except TimeoutError:
            logger.warning("cutting off %d requests after the drain timeout", self._front.in_flight)
            self._doorman.close()
            self._relay.cut_off()

    async def close(self) -> None:
        """Close everything that is still open."""
        await self._runner.cleanup()
        await self._internal.close()
        await self._relay.close()


def _doorman(world: World, settings: Settings, telemetry: Telemetry, board: Board) -> Doorman:
    bounds = Bounds(
        requests=settings.waiting_max,
        tenant_requests=settings.tenant_waiting_max,
        size=settings.waiting_bytes_max,
        tenant_size=settings.tenant_waiting_bytes_max,
    )
    doorman = Doorman(world, bounds, telemetry, board, limit_ns=int(settings.waiting_timeout_s * 1e9))
    world.on_services, world.on_workers = doorman.cluster_changed, doorman.workers_changed
    return doorman
