"""The real gateway, the real openai client, workers that do what the test says."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from gpumeter_operator.decide.credentials import derive
from gpumeter_worker.api.errors import Refused
from gpumeter_worker.api.identity import caller
from gpumeter_worker.settings import Settings as WorkerSettings
from gpumeter_worker.settings import from_environment
from rigs.gateway import MASTER_KEY, Rig, ScriptedWorker, begin_stream, chunk, event, gateway_rig, serving

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with asyncio.timeout(30), gateway_rig() as one:
        yield one


def client(rig: Rig, key: str = "key-of-acme") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key=key, max_retries=0, timeout=20)


async def ask(rig: Rig, key: str = "key-of-acme", model: str = "smollm2", **more: Any) -> Any:
    async with client(rig, key) as api:
        return await api.chat.completions.with_raw_response.create(model=model, messages=MESSAGES, **more)


async def test_a_plain_answer_comes_back_whole_with_the_session_it_was_metered_under(rig: Rig) -> None:
    raw = await ask(rig)
    answer = raw.parse()
    (seen,) = rig.worker.seen
    assert answer.choices[0].message.content == "Hello you"
    assert answer.usage.gpu_seconds == "0.125"
    assert seen.claims["tenant"] == "acme"
    assert raw.headers["X-Gpumeter-Session"] == seen.claims["session"]
    assert seen.claims["exp"] - seen.claims["iat"] == 60


async def test_the_plain_batch_call_is_metered_like_any_other(rig: Rig) -> None:
    texts = [{"generated_text": "Paris"}, {"generated_text": "Rome", "usage": {"gpu_seconds": 0.125}}]

    async def batch(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(texts)

    rig.worker.behaviour = batch
    key = {"Authorization": "Bearer key-of-acme"}
    body = b'{"model": "smollm2", "inputs": ["France", "Italy"], "parameters": {"max_new_tokens": 3}}'
    async with aiohttp.ClientSession(rig.url) as http:
        async with http.post("/generate", data=body, headers=key) as answer:
            assert answer.status == 200
            assert await answer.json() == texts
            (seen,) = rig.worker.seen
            assert (seen.path, seen.body, seen.claims["tenant"]) == ("/generate", body, "acme")
            assert answer.headers["X-Gpumeter-Session"] == seen.claims["session"]
        async with http.post("/generate", json={"inputs": "France"}, headers=key) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (400, "model_missing")
        async with http.post("/generate", data=body) as answer:
            assert answer.status == 401
        async with http.post("/generate", json={"model": "team-a/smollm2", "inputs": "x"}, headers=key) as answer:
            assert answer.status == 200
    assert json.loads(rig.worker.seen[-1].body) == {"model": "smollm2", "inputs": "x"}


async def test_events_pass_as_they_come(rig: Rig) -> None:
    first_seen = asyncio.Event()

    async def second_word_only_after_the_first_was_read(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event(chunk("first")))
        await first_seen.wait()
        await response.write(event(chunk("second")) + b"data: [DONE]\n\n")
        return response

    rig.worker.behaviour = second_word_only_after_the_first_was_read
    words = []
    async with client(rig) as api:
        async for part in await api.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True):
            words.append(part.choices[0].delta.content)
            first_seen.set()
    assert words == ["first", "second"]


async def test_a_client_cannot_choose_its_tenant_or_session(rig: Rig) -> None:
    stolen = {
        "X-Gpumeter-Tenant": "bolt",
        "X-Gpumeter-Session": "s-stolen",
        "X-Forwarded-For": "10.0.0.1",
        "Proxy-Authorization": "Bearer x",
    }
    await ask(rig, extra_headers=stolen)
    (seen,) = rig.worker.seen
    assert seen.claims["tenant"] == "acme"
    assert seen.claims["session"] != "s-stolen"
    travelled = {name.lower() for name in seen.headers}
    assert not travelled & {name.lower() for name in stolen}
    assert "key-of-acme" not in str(seen.headers)


async def test_two_requests_with_one_request_id_at_the_same_time_are_two_sessions(rig: Rig) -> None:
    both_there = asyncio.Barrier(2)

    async def wait_for_the_other(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        await both_there.wait()
        return await rig.worker.answer(request, asked)

    rig.worker.behaviour = wait_for_the_other
    answers = await asyncio.gather(*(ask(rig, extra_headers={"X-Request-Id": "same"}) for _ in range(2)))
    assert len({seen.claims["session"] for seen in rig.worker.seen}) == 2
    assert len({answer.headers["X-Gpumeter-Session"] for answer in answers}) == 2
    assert {answer.headers["X-Request-Id"] for answer in answers} == {"same"}


async def test_without_a_known_key_nothing_is_forwarded(rig: Rig) -> None:
    for key in ("wrong", "key-of-acme "[:-2]):
        with pytest.raises(openai.AuthenticationError) as refused:
            await ask(rig, key)
        assert refused.value.code == "invalid_api_key"
    assert rig.worker.seen == []


async def test_a_revoked_key_is_refused_at_once_and_other_keys_of_the_tenant_go_on(rig: Rig) -> None:
    rig.cluster.add_key("acme", "second-key")
    await ask(rig)
    rig.cluster.revoke("key-of-acme")
    with pytest.raises(openai.AuthenticationError):
        await ask(rig)
    await ask(rig, "second-key")
    assert [seen.claims["tenant"] for seen in rig.worker.seen] == ["acme", "acme"]


async def test_a_qualified_name_reaches_a_worker_that_knows_only_its_own(rig: Rig) -> None:
    await ask(rig, model="team-a/smollm2", temperature=0.5)
    (seen,) = rig.worker.seen
    assert json.loads(seen.body) == {"model": "smollm2", "messages": MESSAGES, "temperature": 0.5}


async def test_an_unknown_model_is_404_with_near_names_and_an_ambiguous_one_400_with_all(rig: Rig) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean smollm2"):
        await ask(rig, model="smolm2")
    uid = rig.cluster.add_service("team-b", "copy", "smollm2")
    with pytest.raises(openai.BadRequestError, match="team-a/smollm2, team-b/copy") as refused:
        await ask(rig)
    assert (refused.value.code, refused.value.param) == ("model_ambiguous", "model")
    async with serving(ScriptedWorker(uid, "smollm2")) as other:
        rig.cluster.set_endpoint("team-b", "copy", other.port)
        await ask(rig, model="team-b/copy")
        assert (len(rig.worker.seen), len(other.seen)) == (0, 1)


async def test_the_models_of_the_cluster_are_listed_and_found(rig: Rig) -> None:
    rig.cluster.add_service("team-b", "copy", "smollm2")
    rig.cluster.add_service("team-b", "other", "other")
    async with client(rig) as api:
        assert [model.id async for model in api.models.list()] == ["team-a/smollm2", "team-b/copy", "other"]
        assert (await api.models.retrieve("team-b/copy")).owned_by == "team-b"
    async with client(rig, "wrong") as api:
        with pytest.raises(openai.AuthenticationError):
            await api.models.list()


async def test_without_a_ready_worker_the_answer_is_503_and_says_why(rig: Rig) -> None:
    condition = {"type": "Ready", "status": "False", "reason": "ModelNotFound", "message": "There is no model at /x."}
    rig.cluster.add_service("team-a", "smollm2", "smollm2", [condition], state="FailedToLoad")
    rig.cluster.set_endpoint("team-a", "smollm2", rig.worker.port, ready=False)
    with pytest.raises(openai.InternalServerError, match="ModelNotFound: There is no model at /x") as refused:
        await ask(rig)
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["Retry-After"]) > 0


async def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new(rig: Rig) -> None:
    go_on = asyncio.Event()

    async def half_then_wait(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event(chunk("half")))
        await go_on.wait()
        await response.write(event(chunk("rest")) + b"data: [DONE]\n\n")
        return response

    rig.worker.behaviour = half_then_wait
    async with client(rig) as api, serving(ScriptedWorker(rig.worker.uid, "smollm2")) as other:
        stream = await api.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True)
        assert (await anext(stream)).choices[0].delta.content == "half"
        rig.cluster.set_endpoint("team-a", "smollm2", rig.worker.port, ready=False, terminating=True)
        rig.cluster.set_endpoint("team-a", "smollm2", other.port)
        for _ in range(3):
            await ask(rig)
        go_on.set()
        assert [part.choices[0].delta.content async for part in stream] == ["rest"]
    assert (len(rig.worker.seen), len(other.seen)) == (1, 3)


async def test_a_workers_own_refusal_passes_unchanged(rig: Rig) -> None:
    async def too_long(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        error = {"message": "The prompt has 9999 tokens.", "type": "invalid_request_error", "param": "messages"}
        headers = {"Retry-After": "7", "X-Internal": "secret"}
        return web.json_response({"error": error | {"code": "context_length_exceeded"}}, status=400, headers=headers)

    rig.worker.behaviour = too_long
    with pytest.raises(openai.BadRequestError, match="9999 tokens") as refused:
        await ask(rig)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.response.headers["Retry-After"] == "7"
    assert "X-Internal" not in refused.value.response.headers
    assert refused.value.response.headers["X-Gpumeter-Session"].startswith("s-")


async def test_a_stream_that_breaks_raises_in_the_client_after_all_whole_events(rig: Rig) -> None:
    async def break_inside_an_event(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event(chunk("whole")) + event(chunk("cut"))[:-20])
        await asyncio.sleep(0.05)  # two packets: the second is the reset
        assert request.transport is not None
        request.transport.abort()
        return response

    rig.worker.behaviour = break_inside_an_event
    words = []
    with pytest.raises(openai.APIError, match="stopped in the middle") as broken:
        async with client(rig) as api:
            async for part in await api.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True):
                words.append(part.choices[0].delta.content)
    assert broken.value.code == "worker_lost"
    assert words == ["whole"]


async def test_a_stream_that_ends_early_without_a_word_is_an_error_too(rig: Rig) -> None:
    async def end_without_done(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event(chunk("half")))
        return response

    rig.worker.behaviour = end_without_done
    with pytest.raises(openai.APIError, match="stopped in the middle"):
        async with client(rig) as api:
            async for _ in await api.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True):
                pass


async def test_a_worker_that_does_not_know_the_gateway_is_not_the_clients_fault(rig: Rig) -> None:
    rig.worker.uid = "another"
    with pytest.raises(openai.InternalServerError, match="does not accept this gateway") as refused:
        await ask(rig)
    assert (refused.value.status_code, refused.value.code) == (502, "hop_refused")


async def test_the_workers_own_check_accepts_the_token_and_only_for_its_own_service(rig: Rig, tmp_path: Path) -> None:
    await ask(rig, key="key-of-bolt")
    (seen,) = rig.worker.seen
    hop_key = derive(MASTER_KEY, "hop-key", rig.worker.uid)
    (tmp_path / "hop-key").write_text(hop_key)
    (tmp_path / "usage-token").write_text(derive(MASTER_KEY, "usage-token", rig.worker.uid))

    def worker_of(uid: str) -> WorkerSettings:
        environment = {
            "GPUMETER_SERVICE": "team-a/smollm2",
            "GPUMETER_SERVICE_UID": uid,
            "GPUMETER_WORKER_UID": "pod-1",
            "GPUMETER_MODEL_URI": "file:///m",
            "GPUMETER_CREDENTIALS_DIR": str(tmp_path),
        }
        return from_environment(environment)

    called = caller(seen.headers["Authorization"], worker_of(rig.worker.uid))
    assert (called.tenant, called.session_id) == ("bolt", seen.claims["session"])
    with pytest.raises(Refused):
        caller(seen.headers["Authorization"], worker_of("another-uid"))
