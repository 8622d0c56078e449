"""kopf's own session: it reads whenever it likes, and writes only in the tenure."""

import asyncio
from collections.abc import AsyncIterator

import kopf
import pytest
from aiohttp import web

from gpumeter_operator.flow.tenure import Tenure
from gpumeter_operator.login import Session, session_of


class Served:
    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self.now_ns = 0
        self.tenure = Tenure(lambda: self.now_ns)

    def session(self, token: str) -> Session:
        return session_of(kopf.ConnectionInfo(server=self.url, token=token), self.tenure)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async def take(request: web.Request) -> web.Response:
        one.asked.append(f"{request.method} {request.headers['Authorization']}")
        return web.json_response({})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    one = Served(f"http://127.0.0.1:{runner.addresses[0][1]}")
    yield one
    await runner.cleanup()


async def test_a_write_waits_outside_the_tenure_and_a_read_does_not(served: Served) -> None:
    session = served.session("t").aiohttp_session
    async with session:
        await session.get(f"{served.url}/x")
        waits = asyncio.create_task(session.request("PATCH", f"{served.url}/x", json={}))
        done, _ = await asyncio.wait([waits], timeout=0.2)
        assert not done
        assert served.asked == ["GET Bearer t"]
        waits.cancel()
        served.tenure.extend(1_000)
        await session.request("PATCH", f"{served.url}/x", json={})
        assert served.asked == ["GET Bearer t", "PATCH Bearer t"]
        served.now_ns = 1_000
        late = asyncio.create_task(session.delete(f"{served.url}/x"))
        done, _ = await asyncio.wait([late], timeout=0.2)
        assert not done, "the clock is read at each write"
        late.cancel()
        await asyncio.gather(waits, late, return_exceptions=True)
    assert len(served.asked) == 2


async def test_a_token_that_was_refused_is_recognised_in_a_new_session(served: Served) -> None:
    first, again, other = served.session("t"), served.session("t"), served.session("another")
    assert first == again
    assert first != other
    for one in (first, again, other):
        await one.aiohttp_session.close()
