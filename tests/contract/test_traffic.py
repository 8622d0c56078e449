"""The traffic client against the real gateway and a scripted worker: what it reports is what happened."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from rigs.gateway import Rig, begin_stream, chunk, completion, event, gateway_rig
from traffic.asks import Kind, asks
from traffic.client import AddressRefused, Options, run, target
from traffic.exchange import Outcome, exchange
from traffic.summary import as_json, surprises, table

pytestmark = pytest.mark.shared

KEYS = {"acme": "key-of-acme", "bolt": "key-of-bolt"}


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with asyncio.timeout(60), gateway_rig() as one:
        one.worker.behaviour = like_a_worker
        yield one


async def like_a_worker(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
    tokens = asked.get("max_tokens", 0)
    sound = isinstance(asked["messages"], list) and 0 <= asked["temperature"] <= 2 and 0 < asked.get("top_p", 1) <= 1
    if not sound or tokens < 1 or len(asked["messages"][0]["content"]) > 100_000:
        return web.json_response({"error": {"message": "no", "code": "bad"}}, status=400)
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "gpu_seconds": 0.000000125}
    if not asked.get("stream"):
        return web.json_response(completion("x") | {"usage": usage})
    response = await begin_stream(request)
    for _ in range(tokens):
        await response.write(event(chunk("x")))
    await response.write(event({"choices": [], "usage": usage}))
    await response.write(b"data: [DONE]\n\n")
    return response


def options(url: str, **more: Any) -> Options:
    return Options(base_url=url, keys=KEYS, model="smollm2", quiet=True, **more)


async def test_every_kind_is_sent_for_every_tenant_and_ends_as_it_was_meant_to(rig: Rig) -> None:
    exchanges = await asyncio.to_thread(run, options(rig.url, seconds=1.5))
    assert surprises(exchanges) == []
    for tenant in KEYS:
        own = [one for one in exchanges if one.tenant == tenant]
        assert {one.kind for one in own} == set(Kind)
        assert {one.outcome for one in own} == {Outcome.FINISHED, Outcome.ABORTED, Outcome.REFUSED}
    told = [one for one in exchanges if one.outcome is Outcome.FINISHED]
    assert {one.gpu_seconds for one in told} == {"0.000000125"}
    assert len({one.session for one in exchanges}) == len(exchanges)
    assert {one.session for one in exchanges} == {seen.claims["session"] for seen in rig.worker.seen}
    tenants = {seen.claims["session"]: seen.claims["tenant"] for seen in rig.worker.seen}
    assert all(tenants[one.session] == one.tenant for one in exchanges)
    assert [row["session"] for row in json.loads(as_json(exchanges))] == [one.session for one in exchanges]
    assert table(exchanges).splitlines()[1].startswith("acme")


async def test_a_broken_stream_and_a_wrong_key_are_told(rig: Rig) -> None:
    async def end_early(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event(chunk("x")))
        return response

    streamed = next(ask for ask in asks(1, "acme", "smollm2") if ask.kind is Kind.STREAMED)
    rig.worker.behaviour = end_early
    port = rig.gateway.port
    broken = await asyncio.to_thread(exchange, "127.0.0.1", port, "acme", KEYS["acme"], streamed, timeout_s=10)
    stranger = await asyncio.to_thread(exchange, "127.0.0.1", port, "acme", "wrong", streamed, timeout_s=10)
    assert (broken.outcome, broken.status) == (Outcome.FAILED, 200)
    assert (stranger.outcome, stranger.status) == (Outcome.REFUSED, 401)
    assert len(surprises([broken, stranger])) == 2


def test_the_same_seed_asks_the_same_and_another_something_else() -> None:
    def first(seed: int) -> list[dict[str, Any]]:
        source = asks(seed, "acme", "m")
        return [next(source).body for _ in range(20)]

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_nothing_is_sent_to_another_machine() -> None:
    for url in ("http://192.0.2.1:80", "https://127.0.0.1", "http://"):
        with pytest.raises(AddressRefused):
            target(options(url, seconds=1))
    assert target(options("http://127.0.0.1:8080", seconds=1)) == ("127.0.0.1", 8080)
    assert target(options("http://192.0.2.1", seconds=1, any_address=True)) == ("192.0.2.1", 80)
