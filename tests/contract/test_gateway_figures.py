"""What waits, told to the operator: the gateway's internal port, and the client that merges several gateways."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gpumeter_operator.adapters.gateways import Asked, Gateways, addresses
from gpumeter_operator.gateway.demand import QUIET, Board, Change, Demand
from gpumeter_operator.gateway.internal import Internal
from rigs.gateway import INTERNAL_TOKEN, Rig, gateway_rig, until

ASK: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}
KEY = {"Authorization": "Bearer key-of-acme"}
TOKEN = {"Authorization": f"Bearer {INTERNAL_TOKEN}"}
FIRST = 1_000


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """The service is at zero."""
    async with asyncio.timeout(30), gateway_rig(heartbeat_s=0.05) as one:
        one.cluster.add_service("team-a", "smollm2", "smollm2", scaling={"minReplicas": 0})
        one.cluster.end_worker(one.worker.port)
        yield one


class PolledBoard(Board):
    """Tells after which versions polls have looked at it."""

    def __init__(self, first_version: int) -> None:
        super().__init__(first_version)
        self.looked_after: list[int | None] = []

    def since(self, version: int | None) -> Change:
        self.looked_after.append(version)
        return super().since(version)


@asynccontextmanager
async def figures(*targets: str) -> AsyncIterator[tuple[Gateways, list[frozenset[str]], list[str]]]:
    """A client of these gateways, what it told of changes, and the list of gateways, to be changed by the test."""
    told: list[frozenset[str]] = []
    now = list(targets)
    gateways = Gateways(lambda: now, INTERNAL_TOKEN, told.append)
    polling = asyncio.create_task(gateways.run())
    try:
        yield gateways, told, now
    finally:
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)


@asynccontextmanager
async def internal(board: Board, **pace: float) -> AsyncIterator[tuple[Internal, Callable[..., None]]]:
    """An internal port with a board that the test writes."""
    port = Internal(board, INTERNAL_TOKEN, **pace)

    def put(service: str, demand: Demand, *, urgent: bool = False) -> None:
        if board.put(service, demand, urgent=urgent):
            port.changed(urgent)

    await port.start("127.0.0.1", 0)
    try:
        yield port, put
    finally:
        await port.close()


async def test_a_service_at_zero_with_a_waiting_request_is_known_within_100_ms(rig: Rig) -> None:
    target = f"127.0.0.1:{rig.gateway.internal_port}"
    async with figures(target) as (gateways, told, _), aiohttp.ClientSession(rig.url, headers=KEY) as http:

        async def known_after_ms() -> float:
            told.clear()
            asking = asyncio.create_task(http.post("/v1/chat/completions", json=ASK))
            await until(lambda: rig.gateway.waiting == 1)
            came_s = time.monotonic()
            await until(lambda: bool(told))
            delay_ms = (time.monotonic() - came_s) * 1000
            asked = gateways.asked()["team-a/smollm2"]
            assert (asked.waiting, asked.in_flight) == (1, 0)
            assert asked.waiting_since_ms is not None
            assert abs(asked.waiting_since_ms - time.time() * 1000) < 5_000
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: not gateways.asked())
            return delay_ms

        tries = []
        for _ in range(8):  # a busy machine is slow for a while; one that waits for its pace or a hold, each time
            tries.append([await known_after_ms() for _ in range(5)])
            if statistics.median(tries[-1]) < 100:
                break
        else:
            raise AssertionError(tries)


async def test_what_workers_have_is_told_too_and_what_has_ended_is_gone(rig: Rig) -> None:
    go_on = asyncio.Event()

    async def wait(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        await go_on.wait()
        return await rig.worker.answer(request, asked)

    rig.worker.behaviour = wait
    rig.cluster.set_endpoint("team-a", "smollm2", rig.worker.port)
    async with (
        figures(f"127.0.0.1:{rig.gateway.internal_port}") as (gateways, _, _),
        aiohttp.ClientSession(rig.url, headers=KEY) as http,
    ):
        asking = [asyncio.create_task(http.post("/v1/chat/completions", json=ASK)) for _ in range(3)]
        await until(lambda: gateways.asked().get("team-a/smollm2") == Asked(0, 3))
        go_on.set()
        await asyncio.gather(*asking)
        await until(lambda: not gateways.asked())


async def test_without_the_token_nothing_is_told_and_clients_do_not_find_the_route(rig: Rig) -> None:
    url = f"http://127.0.0.1:{rig.gateway.internal_port}/internal/waiting"
    async with aiohttp.ClientSession() as http:
        for headers, status in (({}, 401), (KEY, 401), ({"Authorization": "Bearer é"}, 401), (TOKEN, 200)):
            async with http.get(url, headers=headers) as answer:
                assert answer.status == status, headers
        for after in ("-1", "x", "9" * 40):
            async with http.get(url, headers=TOKEN, params={"after": after}) as answer:
                assert answer.status == 400
        async with http.get(f"{rig.url}/internal/waiting", headers=TOKEN) as answer:
            assert answer.status == 404


async def test_a_poll_is_held_until_something_changes_and_answers_with_what_changed() -> None:
    board = PolledBoard(FIRST)
    async with (
        asyncio.timeout(20),
        internal(board, hold_s=0.3) as (brief, _),
        internal(board, hold_s=15, pace_s=0.05) as (port, put),
    ):
        put("a/n", Demand(0, 9))
        async with aiohttp.ClientSession(headers=TOKEN) as http:

            async def poll(after: int, at: Internal = port) -> dict[str, Any]:
                url = f"http://127.0.0.1:{at.port}/internal/waiting"
                async with http.get(url, params={"after": str(after)}) as answer:
                    return dict(await answer.json())

            unchanged = await poll(board.version, brief)
            assert unchanged | {"now_ms": 0} == {"version": FIRST + 1, "whole": False, "now_ms": 0, "services": {}}
            board.looked_after.clear()
            held = asyncio.create_task(poll(board.version))
            await until(lambda: bool(board.looked_after))
            put("a/m", Demand(0, 1))
            put("a/m", Demand(0, 2))
            told = await held
            assert (told["version"], told["services"]) == (FIRST + 3, {"a/m": {"waiting": 0, "inflight": 2}})
            put("a/m", QUIET)
            assert (await poll(told["version"]))["services"] == {"a/m": {"waiting": 0, "inflight": 0}}
            whole = await poll(0)
            assert (whole["whole"], whole["services"]) == (True, {"a/n": {"waiting": 0, "inflight": 9}})


async def test_an_urgent_change_does_not_wait_for_the_pace() -> None:
    board = PolledBoard(FIRST)
    async with (
        asyncio.timeout(20),
        internal(board, hold_s=15, pace_s=15) as (port, put),
        figures(f"127.0.0.1:{port.port}") as (gateways, _, _),
    ):
        await until(lambda: FIRST in board.looked_after)  # the first poll is told all at once
        put("a/n", Demand(0, 1))
        await asyncio.sleep(0.1)
        assert not gateways.asked()
        put("a/m", Demand(1, 0, time.monotonic_ns()), urgent=True)
        await until(lambda: set(gateways.asked()) == {"a/m", "a/n"})


async def test_the_figures_of_a_gateway_that_fell_silent_no_longer_count_and_come_back_with_it() -> None:
    silent = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if silent.is_set():
            await asyncio.Event().wait()
        services = {} if request.query.get("after") else {"a/m": {"waiting": 1, "inflight": 0, "waiting_since_ms": 5}}
        return web.json_response({"version": 7, "whole": not request.query, "now_ms": 5, "services": services})

    app = web.Application()
    app.router.add_get("/internal/waiting", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    gateways = Gateways(
        lambda: [f"127.0.0.1:{site.port}"], "t", lambda _: None, silence_max_s=0.4, answer_timeout_s=0.3
    )
    polling = asyncio.create_task(gateways.run())
    try:
        async with asyncio.timeout(20):
            await until(lambda: gateways.asked().get("a/m", Asked()).waiting == 1)
            silent.set()
            await until(lambda: not gateways.asked())
            assert f"127.0.0.1:{site.port} has not answered" in gateways.silent()[0]
            silent.clear()
            await until(lambda: gateways.asked().get("a/m", Asked()).waiting == 1)
            assert gateways.silent() == ()
    finally:
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)
        await runner.cleanup()


async def test_the_figures_of_several_gateways_are_sums_and_the_oldest_wait() -> None:
    async with (
        asyncio.timeout(20),
        internal(Board(FIRST), pace_s=0.01) as (one, put_one),
        internal(Board(FIRST), pace_s=0.01) as (two, put_two),
        figures(f"127.0.0.1:{one.port}", f"127.0.0.1:{two.port}") as (gateways, _, now),
    ):
        now_ns = time.monotonic_ns()
        put_one("a/m", Demand(1, 2, now_ns - 9_000_000_000))
        put_two("a/m", Demand(3, 4, now_ns))
        await until(lambda: gateways.asked().get("a/m", Asked()).waiting == 4)
        asked = gateways.asked()["a/m"]
        assert asked.in_flight == 6
        assert asked.waiting_since_ms is not None
        assert 8_000 < time.time() * 1000 - asked.waiting_since_ms < 14_000
        del now[0]
        gateways.look()
        await until(lambda: gateways.asked()["a/m"].waiting == 3)


async def test_a_gateway_that_starts_anew_at_the_same_address_is_told_from_its_former_self() -> None:
    async with asyncio.timeout(20):
        async with internal(Board(FIRST), pace_s=0.01) as (port, put):
            put("a/m", Demand(0, 1))
            number = port.port
            client = figures(f"127.0.0.1:{number}")
            gateways, _, _ = await client.__aenter__()
            await until(lambda: set(gateways.asked()) == {"a/m"})
        anew = Internal(board := Board(FIRST * 2), INTERNAL_TOKEN, pace_s=0.01)
        board.put("a/n", Demand(0, 1))
        await anew.start("127.0.0.1", number)
        await until(lambda: set(gateways.asked()) == {"a/n"})
        await client.__aexit__(None, None, None)
        await anew.close()


def test_gateways_are_asked_whether_ready_or_not_and_once_each() -> None:
    def one(kind: str, address: str, **conditions: bool) -> dict[str, Any]:
        endpoint = {"addresses": [address], "conditions": conditions, "targetRef": {"uid": "pod-1"}}
        return {"metadata": {"name": f"g-{kind}"}, "addressType": kind, "endpoints": [endpoint]}

    four, six = one("IPv4", "10.0.0.1", ready=False, terminating=True), one("IPv6", "fd00::1")
    assert addresses([six, four]) == {"10.0.0.1"}
    other = one("IPv4", "10.0.0.2") | {"metadata": {"name": "h"}}
    other["endpoints"][0]["targetRef"] = {"uid": "pod-2"}
    assert addresses([four, other]) == {"10.0.0.1", "10.0.0.2"}
    assert addresses([{"metadata": {"name": "g"}, "addressType": "IPv4", "endpoints": None}]) == set()
