"""Probes: what is wrong is said in the answer."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from gpumeter_operator.adapters.health import HealthServer
from rigs.ports import hold_port


class Sentences:
    alive: str | None = None
    ready: str | None = None


@pytest.fixture
async def served() -> AsyncIterator[tuple[str, Sentences]]:
    sentences = Sentences()
    server = HealthServer(lambda: sentences.alive, lambda: sentences.ready, lambda: b"gpumeter_x 1\n")
    port = hold_port()
    await server.start("127.0.0.1", port)
    yield f"http://127.0.0.1:{port}", sentences
    await server.close()


async def answer(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_an_operator_that_is_well_says_ok(served: tuple[str, Sentences]) -> None:
    url, _ = served
    assert await answer(f"{url}/healthz") == (200, "ok\n")
    assert await answer(f"{url}/readyz") == (200, "ok\n")
    assert await answer(f"{url}/metrics") == (200, "gpumeter_x 1\n")


async def test_not_ready_is_not_dead(served: tuple[str, Sentences]) -> None:
    url, sentences = served
    sentences.ready = "The first list is missing of: pods."
    assert await answer(f"{url}/healthz") == (200, "ok\n")
    assert await answer(f"{url}/readyz") == (503, "The first list is missing of: pods.\n")


async def test_a_frozen_loop_fails_both_probes(served: tuple[str, Sentences]) -> None:
    url, sentences = served
    sentences.alive = "3 services were not looked at for more than 60 s."
    assert (await answer(f"{url}/healthz"))[0] == 503
    assert (await answer(f"{url}/readyz"))[0] == 503
