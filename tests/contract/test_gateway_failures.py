"""The real gateway against clients and workers that break off, stall, send too much or are not there."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gpumeter_operator.gateway.app import Gateway
from rigs.gateway import (
    SETTINGS,
    HandMadeCluster,
    Rig,
    ScriptedWorker,
    begin_stream,
    chunk,
    event,
    gateway_rig,
    serving,
    until,
)
from rigs.ports import hold_port

KEY = {"Authorization": "Bearer key-of-acme"}
ASK: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}
PATH = "/v1/chat/completions"


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with asyncio.timeout(30), gateway_rig(body_timeout_s=0.5, write_timeout_s=0.5, silence_timeout_s=1) as one:
        yield one


@pytest.fixture
async def patient() -> AsyncIterator[Rig]:
    """A gateway that no limit of time makes do anything while a test runs."""
    async with asyncio.timeout(30), gateway_rig() as one:
        yield one


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(rig.url, headers=KEY, timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session


async def never_answer(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def one_event_then_silence(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
    response = await begin_stream(request)
    await response.write(event(chunk("one")))
    await asyncio.Event().wait()
    raise AssertionError


async def metric(http: aiohttp.ClientSession, line: str) -> float:
    async with http.get("/metrics") as answer:
        for each in (await answer.text()).splitlines():
            if each.startswith(line + " "):
                return float(each.rsplit(" ", 1)[1])
    return 0.0


async def until_metric(http: aiohttp.ClientSession, line: str, value: float) -> None:
    async with asyncio.timeout(5):
        while await metric(http, line) != value:  # noqa: ASYNC110 - the gateway's metrics tell nobody
            await asyncio.sleep(0.01)


def requests(code: int, service: str = "team-a/smollm2") -> str:
    return f'gpumeter_gateway_requests_total{{code="{code}",service="{service}",tenant="acme"}}'


# Clients


async def test_a_client_that_leaves_in_mid_stream_ends_the_workers_request_at_once(patient: Rig) -> None:
    patient.worker.behaviour = one_event_then_silence
    async with aiohttp.ClientSession(patient.url, headers=KEY) as http:
        async with http.post(PATH, json=ASK | {"stream": True}) as answer:
            assert b"one" in await answer.content.readany()
            answer.close()
        await asyncio.wait_for(patient.worker.gone.wait(), 10)
        await until_metric(http, requests(499), 1)
        await until_metric(http, 'gpumeter_gateway_in_flight{service="team-a/smollm2"}', 0)


async def test_a_client_that_leaves_before_a_plain_answer_ends_the_workers_request_at_once(patient: Rig) -> None:
    patient.worker.behaviour = never_answer
    async with aiohttp.ClientSession(patient.url, headers=KEY) as http:
        waiting = asyncio.create_task(http.post(PATH, json=ASK))
        await until_metric(http, 'gpumeter_gateway_in_flight{service="team-a/smollm2"}', 1)
        await until(lambda: bool(patient.worker.seen))
        waiting.cancel()
        await asyncio.wait_for(patient.worker.gone.wait(), 10)
        await until_metric(http, requests(499), 1)


async def test_a_client_that_does_not_read_is_left_and_stops_costing_gpu_time(
    rig: Rig, http: aiohttp.ClientSession
) -> None:
    async def endless(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        while True:
            await response.write(event(chunk("x" * 10_000)))

    rig.worker.behaviour = endless
    body = json.dumps(ASK | {"stream": True}).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-of-acme\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", rig.gateway.port)) as connection:
        connection.sendall(head.encode() + body)
        await asyncio.wait_for(rig.worker.gone.wait(), 10)
    await until_metric(http, requests(499), 1)


async def test_a_body_that_is_too_large_is_refused_whether_announced_or_not(patient: Rig) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * (1 << 20)

    async with aiohttp.ClientSession(patient.url, headers=KEY) as http:
        for data in (b" " * (11 << 20), pieces()):
            async with http.post(PATH, data=data) as answer:
                assert answer.status == 413
                assert (await answer.json())["error"]["code"] == "request_too_large"
    assert patient.worker.seen == []


async def test_a_large_body_below_the_limit_passes_unchanged(patient: Rig) -> None:
    body = json.dumps(ASK | {"x": "é" * (4 << 20)}, ensure_ascii=False).encode()
    async with aiohttp.ClientSession(patient.url, headers=KEY) as http, http.post(PATH, data=body) as answer:
        assert answer.status == 200
    assert patient.worker.seen[0].body == body


async def test_a_stranger_is_refused_before_its_body_is_read(patient: Rig) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nContent-Length: 1000000\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", patient.gateway.port)
    writer.write(head.encode())
    assert b" 401 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


async def test_a_body_that_does_not_arrive_is_given_up(rig: Rig) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-of-acme\r\nContent-Length: 1000\r\n\r\n{{"
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.gateway.port)
    writer.write(head.encode())
    assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_headers_that_are_too_large_are_refused(rig: Rig, http: aiohttp.ClientSession) -> None:
    async with http.post(PATH, json=ASK, headers={"X-Big": "x" * 20_000}) as answer:
        assert answer.status == 400
    assert rig.worker.seen == []


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "smollm2", "temperature": NaN}', b"\xff"])
async def test_broken_json_is_refused_in_openais_shape(rig: Rig, http: aiohttp.ClientSession, body: bytes) -> None:
    async with http.post(PATH, data=body) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "invalid_json"
    assert rig.worker.seen == []


async def test_unknown_routes_and_methods_have_openais_shape_too(http: aiohttp.ClientSession) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", PATH, 405), ("DELETE", "/v1/models", 405)):
        async with http.request(method, path) as answer:
            assert answer.status == status
            assert (await answer.json())["error"]["type"] == "invalid_request_error"


async def test_more_requests_than_the_gateway_may_hold_are_refused_and_not_queued() -> None:
    async with asyncio.timeout(30), gateway_rig(in_flight_max=2) as rig:
        rig.worker.behaviour = never_answer
        async with aiohttp.ClientSession(rig.url, headers=KEY) as http:
            waiting = [asyncio.create_task(http.post(PATH, json=ASK)) for _ in range(2)]
            await until_metric(http, 'gpumeter_gateway_in_flight{service="team-a/smollm2"}', 2)
            async with http.post(PATH, json=ASK) as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"] == "1"
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


MIB = 1 << 20
BUDGET = {"body_bytes_max": 2 * MIB, "tenant_held_bytes_max": 2 * MIB, "held_bytes_max": 3 * MIB}
HELD = "gpumeter_gateway_held_bytes"
BOLT = {"Authorization": "Bearer key-of-bolt"}


def of_size(size: int) -> bytes:
    return json.dumps(ASK).encode().ljust(size)


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(body), 50_000):
        yield body[at : at + 50_000]


async def code_of(answer: aiohttp.ClientResponse) -> str:
    return str((await answer.json())["error"]["code"])


@pytest.mark.parametrize("announced", [True, False])
async def test_bytes_beyond_a_tenants_share_and_beyond_the_whole_are_refused_and_come_back(announced: bool) -> None:
    def data(size: int) -> Any:
        return of_size(size) if announced else in_pieces(of_size(size))

    async with asyncio.timeout(30), gateway_rig(**BUDGET) as rig, aiohttp.ClientSession(rig.url) as http:
        rig.worker.behaviour = never_answer
        waiting = [asyncio.create_task(http.post(PATH, data=data(3 * MIB // 2), headers=KEY))]
        await until_metric(http, HELD, 3 * MIB // 2)
        async with http.post(PATH, data=data(MIB), headers=KEY) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert await code_of(answer) == "tenant_busy"
        waiting.append(asyncio.create_task(http.post(PATH, data=data(MIB), headers=BOLT)))  # another's share is free
        await until_metric(http, HELD, 5 * MIB // 2)
        async with http.post(PATH, data=data(MIB), headers=BOLT) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert await code_of(answer) == "gateway_busy"
        assert len(rig.worker.seen) == 2
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until_metric(http, HELD, 0)
        rig.worker.behaviour = rig.worker.answer
        async with http.post(PATH, data=data(3 * MIB // 2), headers=KEY) as answer:
            assert answer.status == 200
        await until_metric(http, HELD, 0)


async def test_bytes_that_are_announced_and_not_sent_take_no_room() -> None:
    async with asyncio.timeout(30), gateway_rig(**BUDGET) as rig, aiohttp.ClientSession(rig.url, headers=KEY) as http:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY['Authorization']}\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", rig.gateway.port)
        writer.write(f"{head}Content-Length: {2 * MIB}\r\n\r\n{{".encode())
        await until_metric(http, HELD, 1)
        async with http.post(PATH, data=of_size(3 * MIB // 2)) as answer:
            assert answer.status == 200
        writer.close()
        await until_metric(http, HELD, 0)


# Workers


async def test_a_worker_that_cannot_be_reached_costs_no_request(rig: Rig, http: aiohttp.ClientSession) -> None:
    rig.cluster.set_endpoint("team-a", "smollm2", hold_port())
    for _ in range(6):
        async with http.post(PATH, json=ASK) as answer:
            assert answer.status == 200
    assert len(rig.worker.seen) == 6
    assert await metric(http, 'gpumeter_gateway_retries_total{failure="not_connected"}') >= 1


async def test_with_no_worker_in_reach_the_answer_is_503_after_the_limit_of_waiting_time() -> None:
    async with asyncio.timeout(30), gateway_rig(waiting_timeout_s=0.5) as rig:
        rig.cluster.end_worker(rig.worker.port)
        rig.cluster.set_endpoint("team-a", "smollm2", hold_port())
        async with aiohttp.ClientSession(rig.url, headers=KEY) as http, http.post(PATH, json=ASK) as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert "The worker could not be reached." in await answer.text()


async def test_a_request_that_a_worker_had_when_it_died_is_not_sent_to_another(
    rig: Rig, http: aiohttp.ClientSession
) -> None:
    async def die(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        raise ConnectionResetError

    async with serving(ScriptedWorker(rig.worker.uid, "smollm2")) as other:
        rig.worker.behaviour = other.behaviour = die
        rig.cluster.set_endpoint("team-a", "smollm2", other.port)
        async with http.post(PATH, json=ASK) as answer:
            assert answer.status == 502
            assert (await answer.json())["error"]["code"] == "worker_lost"
    assert len(rig.worker.seen) + len(other.seen) == 1


PLAIN_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: ([0-9]+)", head, re.IGNORECASE)
    assert length
    return await reader.readexactly(int(length[1]))


@asynccontextmanager
async def raw_worker(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[aiohttp.ClientSession]:
    """A gateway whose only worker is this handler of connections, and a client of the gateway."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with asyncio.timeout(20), server, gateway_rig() as rig:
        rig.cluster.slices.remove("team-a", f"smollm2-{rig.worker.port}")
        rig.cluster.set_endpoint("team-a", "smollm2", server.sockets[0].getsockname()[1])
        async with aiohttp.ClientSession(rig.url, headers=KEY) as http:
            yield http


@pytest.mark.parametrize("orderly", [True, False])
async def test_a_request_that_a_worker_read_over_a_kept_connection_before_it_died_is_not_sent_again(
    orderly: bool,
) -> None:
    bodies: list[bytes] = []

    async def answer_once_then_die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bodies.append(await read_request(reader))
        writer.write(PLAIN_ANSWER)
        bodies.append(await read_request(reader))  # the next request over the kept connection
        if orderly:
            writer.close()
        else:
            writer.transport.abort()

    async with raw_worker(answer_once_then_die) as http:
        async with http.post(PATH, json=ASK) as answer:
            assert (answer.status, await answer.read()) == (200, b"{}")
        async with http.post(PATH, json=ASK) as answer:
            assert answer.status == 502
            assert (await answer.json())["error"]["code"] == "worker_lost"
    assert len(bodies) == 2


async def test_a_kept_connection_that_a_worker_closed_while_nothing_was_on_it_costs_no_request() -> None:
    close, gone = asyncio.Event(), asyncio.Event()

    async def answer_then_close_when_told(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(PLAIN_ANSWER)
        await close.wait()
        writer.write_eof()
        assert await reader.read() == b""  # the gateway has noticed and closed its side
        gone.set()

    async with raw_worker(answer_then_close_when_told) as http:
        for _ in range(2):
            async with http.post(PATH, json=ASK) as answer:
                assert (answer.status, await answer.read()) == (200, b"{}")
            close.set()
            await gone.wait()


async def test_a_plain_answer_that_breaks_off_is_502_and_never_half_an_answer(
    rig: Rig, http: aiohttp.ClientSession
) -> None:
    async def half(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"id": "half')
        assert request.transport is not None
        request.transport.close()
        return response

    rig.worker.behaviour = half
    async with http.post(PATH, json=ASK) as answer:
        assert answer.status == 502
        assert (await answer.json())["error"]["code"] == "worker_lost"


async def test_a_worker_that_goes_silent_is_given_up(rig: Rig, http: aiohttp.ClientSession) -> None:
    rig.worker.behaviour = never_answer
    async with http.post(PATH, json=ASK) as answer:
        assert answer.status == 504
    rig.worker.behaviour = one_event_then_silence
    async with http.post(PATH, json=ASK | {"stream": True}) as answer:
        assert answer.status == 200
        *_, last = (await answer.read()).strip().split(b"\n\n")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "worker_timeout"
    await until_metric(http, requests(504), 2)


async def test_equal_workers_share_the_load(rig: Rig, http: aiohttp.ClientSession) -> None:
    hold = asyncio.Event()

    async def wait(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        await hold.wait()
        return await rig.worker.answer(request, asked)

    async with serving(ScriptedWorker(rig.worker.uid, "smollm2")) as other:
        rig.cluster.set_endpoint("team-a", "smollm2", other.port)
        rig.worker.behaviour = other.behaviour = wait
        running = [asyncio.create_task(http.post(PATH, json=ASK)) for _ in range(10)]
        await until(lambda: len(rig.worker.seen) + len(other.seen) == 10)
        hold.set()
        for answer in await asyncio.gather(*running):
            answer.release()
        assert (len(rig.worker.seen), len(other.seen)) == (5, 5)


# Start and stop


async def test_it_is_not_ready_before_all_three_mirrors_are_complete_and_says_so() -> None:
    cluster = HandMadeCluster()
    world = cluster.world()
    cluster.add_key("acme", "key-of-acme")
    gateway = Gateway(world, SETTINGS, lambda uid: uid, "token")
    await gateway.start()
    mirrors = asyncio.create_task(world.run())
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{gateway.port}", headers=KEY) as http:
            for mirror in (cluster.services, cluster.keys, cluster.slices):
                for path, status in (("/readyz", 503), ("/healthz", 200), ("/v1/models", 503)):
                    async with http.get(path) as answer:
                        assert answer.status == status, path
                mirror.complete.set()
            await until(lambda: world.synced)
            for path in ("/readyz", "/v1/models"):
                async with http.get(path) as answer:
                    assert answer.status == 200
    finally:
        mirrors.cancel()
        await asyncio.gather(mirrors, return_exceptions=True)
        await gateway.close()


async def test_a_stop_turns_readiness_off_and_finishes_what_runs(rig: Rig, http: aiohttp.ClientSession) -> None:
    go_on = asyncio.Event()

    async def half_then_wait(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event(chunk("half")))
        await go_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    rig.worker.behaviour = half_then_wait
    async with http.post(PATH, json=ASK | {"stream": True}) as answer:
        await answer.content.readany()
        stopping = asyncio.create_task(rig.gateway.stop())
        await asyncio.sleep(0)
        async with http.get("/readyz") as ready:
            assert ready.status == 503
        go_on.set()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")
    await asyncio.wait_for(stopping, 5)
    with pytest.raises(aiohttp.ClientConnectorError):
        async with aiohttp.ClientSession() as fresh:
            await fresh.get(rig.url + "/healthz")


async def test_what_outlasts_the_drain_ends_with_an_error_and_not_in_silence() -> None:
    async with asyncio.timeout(30), gateway_rig(drain_timeout_s=0.1) as rig:
        rig.worker.behaviour = one_event_then_silence
        async with (
            aiohttp.ClientSession(rig.url, headers=KEY) as http,
            http.post(PATH, json=ASK | {"stream": True}) as answer,
        ):
            await answer.content.readany()
            await rig.gateway.stop()
            assert b'"code": "worker_lost"' in await answer.read()
        await asyncio.wait_for(rig.worker.gone.wait(), 5)
