"""/healthz, /readyz and /metrics over HTTP.

Owns the server and how a check's answer becomes a status code. Does not know what is checked: a check is a function
that returns a sentence when something is wrong, and None when all is well.
"""

from collections.abc import Callable

from aiohttp import web

Check = Callable[[], str | None]


class HealthServer:
    """Serves probes and metrics until closed. Liveness asks `alive`, readiness asks both."""

    def __init__(self, alive: Check, ready: Check, metrics: Callable[[], bytes]) -> None:
        self._checks = {"/healthz": (alive,), "/readyz": (alive, ready)}
        self._metrics = metrics
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen; raises OSError when the port is taken."""
        app = web.Application()
        for path in self._checks:
            app.router.add_get(path, self._probe)
        app.router.add_get("/metrics", self._render)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _probe(self, request: web.Request) -> web.Response:
        sentences = [sentence for check in self._checks[request.path] if (sentence := check()) is not None]
        return web.Response(status=503 if sentences else 200, text="\n".join(sentences or ["ok"]) + "\n")

    async def _render(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
