"""The operator asks workers that start: nobody waits for an answer, and nonsense never becomes a status."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from gpumeter_operator.adapters.starting import ASK_EVERY_S, SENTENCE_MAX, StartingWorkers, sentence

FAR = "fetching the model: 1,234 of 4,000 MB (30 %)"


class Worker:
    """A /readyz that a test decides."""

    def __init__(self) -> None:
        self.document: Any = {"ready": False, "reason": "Loading", "message": FAR}
        self.asked = 0
        self.port = 0

    async def readyz(self, _: web.Request) -> web.Response:
        self.asked += 1
        return web.json_response(self.document, status=503)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    one = Worker()
    app = web.Application()
    app.router.add_get("/readyz", one.readyz)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    one.port = runner.addresses[0][1]
    yield one
    await runner.cleanup()


async def becomes(starting: StartingWorkers, expected: str) -> None:
    async with asyncio.timeout(10):
        while starting.told("127.0.0.1") != expected:  # noqa: ASYNC110 - it has no event; nobody waits for it
            await asyncio.sleep(0.01)


async def test_an_answer_is_there_at_a_later_look_and_asked_for_again_when_it_is_old(worker: Worker) -> None:
    now_s = [100.0]
    starting = StartingWorkers(worker.port, lambda: now_s[0])
    assert starting.told("127.0.0.1") == ""
    await becomes(starting, FAR)
    assert worker.asked == 1, "looks in between ask nobody"
    worker.document["message"] = "loading 269 MB of weights for 2 s"
    now_s[0] += ASK_EVERY_S
    await becomes(starting, "loading 269 MB of weights for 2 s")
    assert worker.asked == 2
    await starting.close()


async def test_a_worker_that_does_not_listen_says_nothing(worker: Worker) -> None:
    starting = StartingWorkers(1)
    assert starting.told("127.0.0.1") == ""
    await asyncio.gather(*starting._tasks)
    assert starting.told("127.0.0.1") == ""
    await starting.close()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (json.dumps({"reason": "Loading", "message": "half of it."}).encode(), "half of it"),
        (json.dumps({"reason": "WarmingUp", "message": "a\nb\u0007c"}).encode(), "a b c"),
        (json.dumps({"reason": "Draining", "message": "it leaves"}).encode(), ""),
        (json.dumps({"reason": "Loading", "message": 7}).encode(), ""),
        (json.dumps(["Loading"]).encode(), ""),
        (b"<html>", ""),
        (b"\xff", ""),
    ],
)
def test_only_what_a_starting_worker_says_is_told(body: bytes, told: str) -> None:
    assert sentence(body) == told
    assert len(sentence(json.dumps({"reason": "Loading", "message": "x" * 5000}).encode())) == SENTENCE_MAX
