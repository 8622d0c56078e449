"""A worker's usage port on a free port of this machine; what it answers is the test's.

Owns that it listens and is gone afterwards, and the answers in which no test wants to lie.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from gpumeter_operator.adapters.workers import Target
from gpumeter_usage.page import Page, decode_acknowledgement, encode_status
from rigs.ledger import FakeWorker


@asynccontextmanager
async def listening(
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]], token: str
) -> AsyncIterator[Target]:
    """Where `handle` answers for everything below /usage/v1."""
    app = web.Application()
    app.router.add_route("*", "/usage/v1/{what}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield Target("127.0.0.1", token, runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def told_by(
    fake: FakeWorker, request: web.Request, answer: Callable[[Page], web.StreamResponse]
) -> web.StreamResponse:
    """Status, acknowledgement or page, as a worker tells it; `answer` makes the response out of the true page."""
    if request.path.endswith("/status"):
        return web.Response(body=encode_status(fake.status()))
    if request.path.endswith("/acknowledge"):
        fake.acknowledge(decode_acknowledgement(await request.read()))
        return web.Response(status=204)
    return answer(fake.page(request.query["boot"], int(request.query["after"])))
