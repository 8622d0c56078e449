"""Requests for a service without a free worker: the real gateway, the real openai client, workers that come later."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from gpumeter_operator.gateway.app import Gateway
from rigs.gateway import Rig, ScriptedWorker, gateway_rig, serving, until

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
ASK: dict[str, Any] = {"model": "smollm2", "messages": MESSAGES}
PATH = "/v1/chat/completions"
ACME, BOLT = ({"Authorization": f"Bearer key-of-{tenant}"} for tenant in ("acme", "bolt"))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """The service is at zero, and its worker, which listens already, is nobody's endpoint yet."""
    async with (
        asyncio.timeout(30),
        gateway_rig(heartbeat_s=0.05, waiting_max=6, tenant_waiting_max=4, waiting_timeout_s=20) as one,
    ):
        at_zero(one)
        yield one


def at_zero(rig: Rig, **changes: Any) -> None:
    zero = {"type": "Ready", "status": "False", "reason": "ScaledToZero", "message": "Nobody asks."}
    rig.cluster.add_service("team-a", "smollm2", "smollm2", [zero], scaling={"minReplicas": 0}, **changes)
    if rig.cluster.slices.objects:
        rig.cluster.end_worker(rig.worker.port)


def start_worker(rig: Rig) -> None:
    rig.cluster.set_endpoint("team-a", "smollm2", rig.worker.port)


def client(rig: Rig) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="key-of-acme", max_retries=0, timeout=20)


async def until_waiting(rig: Rig, number: int) -> None:
    await until(lambda: rig.gateway.waiting == number)


async def test_a_request_at_zero_waits_and_is_answered_by_the_first_worker(rig: Rig) -> None:
    async with client(rig) as api:
        asking = asyncio.create_task(api.chat.completions.create(model="smollm2", messages=MESSAGES))
        await until_waiting(rig, 1)
        start_worker(rig)
        assert (await asking).choices[0].message.content == "Hello you"
    assert rig.gateway.waiting == 0


async def test_never_404_instead_of_503_at_zero(rig: Rig) -> None:
    async with aiohttp.ClientSession(rig.url, headers=ACME) as http:
        asking = [asyncio.create_task(http.post(PATH, json=ASK)) for _ in range(4)]
        await until_waiting(rig, 4)
        for model, status in (("smollm2", 503), ("team-a/smollm2", 503), ("nothing", 404)):
            async with http.post(PATH, json=ASK | {"model": model}) as answer:
                assert answer.status == status, model
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until_waiting(rig, 0)


async def test_a_stream_that_waits_gets_heartbeats_that_the_openai_client_passes_over(rig: Rig) -> None:
    words = []
    async with client(rig) as api:
        # The client has the status line, and so has read heartbeats, before there is a worker.
        stream = await api.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True)
        assert rig.gateway.waiting == 1
        start_worker(rig)
        async for part in stream:
            words.append(part.choices[0].delta.content)
        session = stream.response.headers["X-Gpumeter-Session"]
    assert words == ["Hello", " you"]
    assert [seen.claims["session"] for seen in rig.worker.seen] == [session]


async def test_heartbeats_are_comments_and_come_again_and_again(rig: Rig) -> None:
    async with (
        aiohttp.ClientSession(rig.url, headers=ACME) as http,
        http.post(PATH, json=ASK | {"stream": True}) as answer,
    ):
        for _ in range(3):
            assert (await answer.content.readuntil(b"\n\n")) == b": waiting for a worker\n\n"
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        start_worker(rig)
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_an_error_after_heartbeats_reaches_the_openai_client_as_an_error(rig: Rig) -> None:
    async with client(rig) as api:
        stream = await api.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True)
        failed = {"type": "Ready", "status": "False", "reason": "ModelNotFound", "message": "There is no model at /x."}
        rig.cluster.add_service("team-a", "smollm2", "smollm2", [failed], state="FailedToLoad")
        with pytest.raises(openai.APIError, match="ModelNotFound: There is no model at /x") as refused:
            async for _ in stream:
                pass
    assert refused.value.code == "no_ready_worker"


async def test_a_workers_plain_error_after_heartbeats_reaches_the_openai_client_as_its_own(rig: Rig) -> None:
    async def too_long(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        error = {"message": "The prompt has 9999 tokens.", "type": "invalid_request_error", "param": "messages"}
        return web.json_response({"error": error | {"code": "context_length_exceeded"}}, status=400)

    rig.worker.behaviour = too_long
    async with client(rig) as api:
        stream = await api.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True)
        start_worker(rig)
        with pytest.raises(openai.APIError, match="9999 tokens") as refused:
            async for _ in stream:
                pass
    assert refused.value.code == "context_length_exceeded"


async def test_a_full_room_is_503_in_openais_shape_and_says_when_to_come_back(rig: Rig) -> None:
    async with aiohttp.ClientSession(rig.url) as http:
        asking = [asyncio.create_task(http.post(PATH, json=ASK, headers=ACME)) for _ in range(4)]
        await until_waiting(rig, 4)
        async with http.post(PATH, json=ASK, headers=ACME) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
            assert (await answer.json())["error"]["code"] == "tenant_waiting_room_full"
        asking += [asyncio.create_task(http.post(PATH, json=ASK, headers=BOLT)) for _ in range(2)]
        await until_waiting(rig, 6)
        async with http.post(PATH, json=ASK, headers=BOLT) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
            assert (await answer.json())["error"]["code"] == "waiting_room_full"
        async with http.get("/metrics") as answer:
            told = await answer.text()
        assert 'gpumeter_gateway_waiting{service="team-a/smollm2"} 6.0' in told
        assert 'gpumeter_gateway_turned_away_total{reason="waiting_room_full"} 1.0' in told
        start_worker(rig)
        assert {answer.status for answer in await asyncio.gather(*asking)} == {200}
        async with http.get("/metrics") as answer:
            assert 'gpumeter_gateway_waited_seconds_count{outcome="seated"} 6.0' in await answer.text()


async def test_who_waits_too_long_is_told_so_and_why() -> None:
    async with asyncio.timeout(30), gateway_rig(waiting_timeout_s=0.2, heartbeat_s=0.05) as rig:
        at_zero(rig)
        async with client(rig) as api:
            with pytest.raises(openai.InternalServerError, match=r"within 0\.2 s\. ScaledToZero: Nobody asks") as plain:
                await api.chat.completions.create(model="smollm2", messages=MESSAGES)
            assert int(plain.value.response.headers["Retry-After"]) > 0
            stream = await api.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True)
            with pytest.raises(openai.APIError) as streamed:
                async for _ in stream:
                    pass
        assert plain.value.code == streamed.value.code == "waited_too_long"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_gives_its_place_back_at_once(rig: Rig, stream: bool) -> None:
    async with aiohttp.ClientSession(rig.url, headers=ACME) as http:
        asking = asyncio.create_task(http.post(PATH, json=ASK | {"stream": stream}))
        await until_waiting(rig, 1)
        if stream:
            (await asking).close()
        else:
            asking.cancel()
        await until(lambda: rig.gateway.waiting == 0)  # long before it has waited too long
        start_worker(rig)
        async with http.post(PATH, json=ASK) as answer:
            assert answer.status == 200
    assert len(rig.worker.seen) == 1


async def test_tenants_take_turns_and_a_tenants_oldest_goes_first(rig: Rig) -> None:
    rig.cluster.add_service("team-a", "smollm2", "smollm2", engine={"maxBatchSize": 1, "maxQueueLength": 0})
    async with aiohttp.ClientSession(rig.url) as http:
        asking = []
        for tenant, number in (("acme", 1), ("acme", 2), ("acme", 3), ("bolt", 1), ("bolt", 2)):
            body = ASK | {"user": f"{tenant}-{number}"}
            headers = {"Authorization": f"Bearer key-of-{tenant}"}
            asking.append(asyncio.create_task(http.post(PATH, json=body, headers=headers)))
            await until_waiting(rig, len(asking))
        start_worker(rig)
        await asyncio.gather(*asking)
    order = [json.loads(seen.body)["user"] for seen in rig.worker.seen]
    assert order == ["acme-1", "bolt-1", "acme-2", "bolt-2", "acme-3"]


async def test_a_worker_gets_no_more_at_once_than_it_computes_and_queues(rig: Rig) -> None:
    now, most = 0, 0

    async def count(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return await rig.worker.answer(request, asked)

    rig.worker.behaviour = count
    rig.cluster.add_service("team-a", "smollm2", "smollm2", engine={"maxBatchSize": 1, "maxQueueLength": 1})
    async with aiohttp.ClientSession(rig.url) as http:
        asking = [asyncio.create_task(http.post(PATH, json=ASK, headers=BOLT)) for _ in range(2)]
        asking += [asyncio.create_task(http.post(PATH, json=ASK, headers=ACME)) for _ in range(4)]
        await until_waiting(rig, 6)
        start_worker(rig)
        assert {answer.status for answer in await asyncio.gather(*asking)} == {200}
    assert most == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"annotations": {"gpumeter.io/stop": "true"}}, "Stopped: Stopped by the annotation"),
        ({"replicas": 0}, "ScaledToZero: spec.replicas is 0"),
    ],
)
async def test_who_would_wait_in_vain_is_told_at_once_with_the_services_own_reason(
    rig: Rig, changes: dict[str, Any], told: str
) -> None:
    async with client(rig) as api:
        asking = asyncio.create_task(api.chat.completions.create(model="smollm2", messages=MESSAGES))
        await until_waiting(rig, 1)
        rig.cluster.add_service("team-a", "smollm2", "smollm2", **changes)
        for wait in (asking, api.chat.completions.create(model="smollm2", messages=MESSAGES)):
            with pytest.raises(openai.InternalServerError, match=told) as refused:
                await wait
            assert (refused.value.status_code, refused.value.code) == (503, "no_ready_worker")


async def test_who_waits_for_a_service_that_is_deleted_is_told_so(rig: Rig) -> None:
    async with client(rig) as api:
        asking = asyncio.create_task(api.chat.completions.create(model="smollm2", messages=MESSAGES))
        await until_waiting(rig, 1)
        rig.cluster.services.remove("team-a", "smollm2")
        with pytest.raises(openai.InternalServerError, match="was deleted while the request waited"):
            await asking


async def test_a_token_is_made_when_the_wait_is_over(rig: Rig) -> None:
    async with client(rig) as api:
        asking = asyncio.create_task(api.chat.completions.create(model="smollm2", messages=MESSAGES))
        await until_waiting(rig, 1)
        came_s = time.time()
        await until(lambda: int(time.time()) > int(came_s))
        start_worker(rig)
        await asking
    assert rig.worker.seen[0].claims["iat"] > int(came_s)


# Workers that refuse


@pytest.mark.parametrize(
    ("status", "code"), [(503, "Draining"), (503, "EngineRestarting"), (429, "queue_full"), (401, "unauthorized")]
)
async def test_what_one_worker_refuses_another_answers_and_the_first_is_left_alone(
    rig: Rig, status: int, code: str
) -> None:
    refused = 0

    async def refuse(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        nonlocal refused
        refused += 1
        error = {"error": {"message": "Not now.", "code": code}}
        return web.json_response(error, status=status, headers={"Retry-After": "5"})

    async with serving(ScriptedWorker(rig.worker.uid, "smollm2")) as other:
        other.behaviour = refuse
        rig.cluster.set_endpoint("team-a", "smollm2", other.port)
        start_worker(rig)
        async with aiohttp.ClientSession(rig.url, headers=ACME) as http:
            for _ in range(40):
                async with http.post(PATH, json=ASK) as answer:
                    assert answer.status == 200
    assert 1 <= refused <= 8  # taking turns it would be twenty; it is tried again after 50 ms, 250 ms, half a second


async def test_a_worker_that_serves_again_gets_requests_again(rig: Rig) -> None:
    refusing = True

    async def refuse_at_first(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        nonlocal refusing
        if refusing:
            refusing = False
            error = {"error": {"message": "Starting.", "code": "EngineRestarting"}}
            return web.json_response(error, status=503, headers={"Retry-After": "5"})
        return await rig.worker.answer(request, asked)

    rig.worker.behaviour = refuse_at_first
    start_worker(rig)
    async with client(rig) as api:
        answer = await api.chat.completions.create(model="smollm2", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello you"


async def test_a_503_of_a_worker_that_had_begun_is_not_asked_again(rig: Rig) -> None:
    async def cut_off(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        error = {"error": {"message": "Stopping.", "code": "cut_off"}}
        return web.json_response(error, status=503, headers={"Retry-After": "1"})

    rig.worker.behaviour = cut_off
    start_worker(rig)
    async with client(rig) as api:
        with pytest.raises(openai.InternalServerError) as refused:
            await api.chat.completions.create(model="smollm2", messages=MESSAGES)
    assert refused.value.code == "cut_off"
    assert len(rig.worker.seen) == 1


# Stop


async def test_who_waits_while_the_gateway_stops_gets_a_worker_or_is_told_to_come_again() -> None:
    async with asyncio.timeout(30), gateway_rig(drain_timeout_s=0.3) as rig:
        at_zero(rig)
        async with aiohttp.ClientSession(rig.url, headers=ACME) as http:
            asking = [asyncio.create_task(http.post(PATH, json=ASK)) for _ in range(2)]
            await until_waiting(rig, 2)
            gateway: Gateway = rig.gateway
            await gateway.stop()
            for answer in await asyncio.gather(*asking):
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
                assert (await answer.json())["error"]["code"] == "gateway_stopping"
