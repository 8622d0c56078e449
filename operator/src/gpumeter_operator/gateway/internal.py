"""The port for the operator: who waits for which service, told as it changes.

Owns the long poll `GET /internal/waiting?after=VERSION` and its pace. The port is not one of the gateway's Service, and
asks for a token that operator and gateway derive from the release's master key. Does not know what is done with the
figures.
"""

import asyncio
import hmac
import json
import time

from aiohttp import web

from gpumeter_operator.gateway.demand import Board, Change

HOLD_S = 20.0  # an answer that says nothing new; sooner than anybody on the way cuts a silent connection off
PACE_S = 0.25  # changes that are not urgent are collected for so long
_LAST_WORDS_S = 0.5


class Internal:
    """Answers long polls from a board."""

    def __init__(self, board: Board, token: str, *, hold_s: float = HOLD_S, pace_s: float = PACE_S) -> None:
        self._board = board
        self._token = token.encode()
        self._hold_s = hold_s
        self._pace_s = pace_s
        self._changed = asyncio.Event()
        self._urgent = asyncio.Event()
        self._runner: web.AppRunner
        self.port = 0

    def changed(self, urgent: bool) -> None:
        """The board has changed. Polls that collect changes sleep on, unless it is urgent."""
        self._changed.set()
        if urgent:
            self._urgent.set()

    async def start(self, host: str, port: int) -> None:
        """Listen; raises OSError when the port is taken."""
        app = web.Application()
        app.router.add_get("/internal/waiting", self._waiting)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_LAST_WORDS_S)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = site.port

    async def close(self) -> None:
        """Stop listening, and end the polls that wait."""
        await self._runner.cleanup()

    async def _waiting(self, request: web.Request) -> web.Response:
        """{"version": N, "whole": bool, "now_ms": T, "services": {"namespace/name": {"waiting", "inflight", ...}}}.

        `whole` false: only what changed after VERSION, zeros too; true: all that is not zero, and what is not named is
        zero. `waiting_since_ms` is in Unix milliseconds by this gateway's clock, as `now_ms`, and absent where nobody
        waits. 401 without the token, 400 for an `after` that is no number.
        """
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(errors="surrogateescape"), self._token):
            return web.Response(status=401, text="This port wants the token of the release.\n")
        text = request.query.get("after", "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 20):
            return web.Response(status=400, text="after must be the version of a former answer, or be left out.\n")
        change = await self._next(int(text) if text else None)
        return web.Response(body=_encoded(change), content_type="application/json")

    async def _next(self, after: int | None) -> Change:
        """What changed after a version: an urgent change at once, others when the pace allows, nothing after a hold."""
        board = self._board
        held_until_s = time.monotonic() + self._hold_s
        paced_until_s = None
        while not (change := board.since(after)).whole:
            now_s = time.monotonic()
            if after is not None and board.urgent_version > after:
                break
            if change.services and paced_until_s is None:
                paced_until_s = now_s + self._pace_s
            until_s = held_until_s if paced_until_s is None else min(held_until_s, paced_until_s)
            if now_s >= until_s:
                break
            waited_for = self._changed if paced_until_s is None else self._urgent
            waited_for.clear()  # nothing is awaited between since and here, so no change is missed
            try:
                async with asyncio.timeout(until_s - now_s):
                    await waited_for.wait()
            except TimeoutError:
                continue
        return change


def _encoded(change: Change) -> bytes:
    now_ns, now_ms = time.monotonic_ns(), time.time_ns() // 1_000_000
    services: dict[str, dict[str, int]] = {}
    for name, demand in change.services.items():
        services[name] = {"waiting": demand.waiting, "inflight": demand.in_flight}
        if demand.since_ns is not None:
            services[name]["waiting_since_ms"] = now_ms - (now_ns - demand.since_ns) // 1_000_000
    told = {"version": change.version, "whole": change.whole, "now_ms": now_ms, "services": services}
    return json.dumps(told, separators=(",", ":")).encode()
