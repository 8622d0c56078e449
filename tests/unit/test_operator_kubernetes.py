"""The Kubernetes adapter against a server that says what a real one rarely says."""

import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager

import pytest
from aiohttp import web

from gpumeter_operator.adapters.access import Access
from gpumeter_operator.adapters.kubernetes import CONFIG_MAPS, PAGE_SIZE, Cluster, Manifest, Refused, Unreachable
from gpumeter_operator.cli.main import LEVELS_MAX, allow_deep_objects


@asynccontextmanager
async def served(answer: object, tokens: tuple[str, ...] = ("first", "second")) -> AsyncIterator[Cluster]:
    """A cluster behind one handler for all paths; its token is renewed when it is refused."""

    async def authorization(refused: bool) -> str:
        return f"Bearer {tokens[int(refused)]}"

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)  # type: ignore[arg-type]
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    cluster = Cluster(Access(f"http://127.0.0.1:{port}", None, authorization))
    try:
        yield cluster
    finally:
        await cluster.close()
        await runner.cleanup()


def item(name: str, version: str = "1", **more: object) -> dict[str, object]:
    fields = [{"manager": "x", "fieldsV1": {}}]
    return {"metadata": {"name": name, "namespace": "n", "resourceVersion": version, "managedFields": fields}, **more}


async def test_a_list_is_read_page_by_page_and_loses_its_managed_fields() -> None:
    asked: list[dict[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        page = len(asked)
        metadata = {"resourceVersion": "77", **({"continue": "more"} if page == 1 else {})}
        return web.json_response({"metadata": metadata, "items": [item(f"m{page}")]})

    async with served(answer) as cluster:
        found, version = await cluster.list_at(CONFIG_MAPS, "n", {"a": "b", "c": None})
    assert version == "77"
    assert [one["metadata"] for one in found] == [
        {"name": "m1", "namespace": "n", "resourceVersion": "1"},
        {"name": "m2", "namespace": "n", "resourceVersion": "1"},
    ]
    assert found[0]["kind"] == "ConfigMap"
    assert asked[0] == {"limit": str(PAGE_SIZE), "labelSelector": "a=b,c"}
    assert asked[1]["continue"] == "more"


async def test_what_is_kept_of_a_page_is_made_before_the_next_page_comes() -> None:
    """Made at the end it would lie among all that is not kept, whose memory then stays with the process."""
    order: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        order.append("page")
        metadata = {"resourceVersion": "77", **({"continue": "more"} if order.count("page") == 1 else {})}
        return web.json_response({"metadata": metadata, "items": [item("m")]})

    def keep(one: Manifest) -> Manifest:
        order.append("kept")
        return {"metadata": {"name": one["metadata"]["name"]}}

    async with served(answer) as cluster:
        found, _ = await cluster.list_at(CONFIG_MAPS, keep=keep)
    assert order == ["page", "kept", "page", "kept"]
    assert found == [{"metadata": {"name": "m"}}] * 2


@pytest.fixture
def as_a_command_is_run() -> Iterator[None]:
    """With the limit of recursion that each command gives its process, whatever ran in this one before."""
    here = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    allow_deep_objects()
    yield
    sys.setrecursionlimit(here)


@pytest.mark.usefixtures("as_a_command_is_run")
async def test_an_object_as_deep_as_the_api_server_takes_it_ends_neither_a_list_nor_a_watch() -> None:
    levels = LEVELS_MAX - 10
    deep = json.dumps(item("deep", "8", data="deep")).replace('"deep"}', f"{'[' * levels}{']' * levels}}}")

    async def answer(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return web.Response(text=f'{{"metadata": {{"resourceVersion": "7"}}, "items": [{deep}]}}')
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(f'{{"type": "ADDED", "object": {deep}}}\n'.encode())
        return response

    async with served(answer) as cluster:
        [listed], _ = await cluster.list_at(CONFIG_MAPS, "n")
        async with aclosing(cluster.watch(CONFIG_MAPS, "n", None, "7")) as changes:
            _, watched = await anext(changes)
    assert listed["metadata"]["name"] == watched["metadata"]["name"] == "deep"
    assert isinstance(listed["data"][0], list)


async def test_a_watch_goes_on_from_what_it_was_told_last() -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        if len(asked) == 1:
            lines = [{"type": "ADDED", "object": item("long", "8", data={"x": "y" * 300_000})}]
            lines.append({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}})
        else:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
            lines = [{"type": "ERROR", "object": gone}]
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        for start in range(0, len(text), 70_001):
            await response.write(text[start : start + 70_001])
        return response

    seen = []
    async with served(answer) as cluster:
        with pytest.raises(Refused, match=r"Expired \(410\): too old"):
            async with aclosing(cluster.watch(CONFIG_MAPS, None, None, "5")) as changes:  # type: ignore[type-var]
                async for change, one in changes:
                    seen.append((change, one["metadata"]["resourceVersion"], "managedFields" in one["metadata"]))
    assert seen == [("ADDED", "8", False), ("BOOKMARK", "9", False)]
    assert asked == ["5", "9"]


async def test_a_watch_that_ends_at_once_is_unreachable_and_not_asked_for_in_a_circle() -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(1)
        return web.Response()

    async with served(answer) as cluster:
        with pytest.raises(Unreachable, match="ended a watch as soon as"):
            await anext(cluster.watch(CONFIG_MAPS, None, None, "5"))  # type: ignore[call-overload]
    assert len(asked) == 1


async def test_a_token_that_was_renewed_is_said_instead_of_the_refused_one() -> None:
    async def answer(request: web.Request) -> web.Response:
        good = request.headers["Authorization"] == "Bearer second"
        return web.json_response(item("one"), status=200 if good else 401)

    async with served(answer) as cluster:
        assert (await cluster.get(CONFIG_MAPS, "one", "n") or {})["metadata"]["name"] == "one"
    async with served(answer, tokens=("first", "first")) as cluster:
        with pytest.raises(Refused, match="401"):
            await cluster.get(CONFIG_MAPS, "one", "n")


async def test_what_is_no_api_server_is_unreachable_and_a_proxys_refusal_keeps_its_words() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="<html>hello</html>", status=200 if request.path.endswith("one") else 502)

    async with served(answer) as cluster:
        with pytest.raises(Unreachable, match="what answered is not an API server"):
            await cluster.get(CONFIG_MAPS, "one", "n")
        with pytest.raises(Refused, match=r"Bad Gateway \(502\): <html>hello") as refused:
            await cluster.get(CONFIG_MAPS, "two", "n")
        assert refused.value.status == 502


async def test_an_answer_that_breaks_off_is_unreachable() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"{")
        assert request.transport is not None
        request.transport.close()
        return response

    async with served(answer) as cluster:
        with pytest.raises(Unreachable):
            await cluster.get(CONFIG_MAPS, "one", "n")


async def test_the_name_of_an_object_cannot_lead_to_another_path() -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.raw_path)
        return web.json_response({}, status=404)

    async with served(answer) as cluster:
        assert await cluster.get(CONFIG_MAPS, "../secrets/x?y", "n") is None
        with pytest.raises(ValueError, match="without its namespace"):
            await cluster.get(CONFIG_MAPS, "one")
    assert asked == ["/api/v1/namespaces/n/configmaps/..%2Fsecrets%2Fx%3Fy"]
