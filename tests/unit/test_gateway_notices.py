"""What is said of API keys' Secrets that are left out: once in the log, once at each Secret, in the same words."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest

from gpumeter_operator.adapters.kubernetes import Refused, Unreachable
from gpumeter_operator.decide.events import SECRET, event
from gpumeter_operator.gateway.keys import Ignored
from gpumeter_operator.gateway.notices import Notices
from rigs.gateway import gateway_rig, until

NOW = datetime(2026, 11, 22, 10, tzinfo=UTC)
BAD = Ignored("ApiKeyInvalid", "The API key Secret gpumeter/a is ignored: it has no label.", "gpumeter", "a", "uid-a")
TWINS = tuple(
    Ignored("ApiKeyShared", "The API key Secrets gpumeter/b, gpumeter/c are ignored.", "gpumeter", name, f"uid-{name}")
    for name in "bc"
)


class ApiServer:
    """Keeps events as an API server does: a name once."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.calls = 0
        self.fail: list[Exception] = []

    async def create(self, manifest: dict[str, Any]) -> None:
        self.calls += 1
        await asyncio.sleep(0)
        if self.fail:
            raise self.fail.pop()
        if manifest["metadata"]["name"] in self.events:
            raise Refused(409, "AlreadyExists", "it is there")
        self.events[manifest["metadata"]["name"]] = manifest

    def told(self) -> list[tuple[str, str, str]]:
        return sorted((one["involvedObject"]["name"], one["reason"], one["message"]) for one in self.events.values())


@asynccontextmanager
async def running(server: ApiServer) -> AsyncIterator[Notices]:
    notices = Notices(server.create, clock=lambda: NOW, retry_s=0.01)
    task = asyncio.create_task(notices.run())
    try:
        async with asyncio.timeout(10):
            yield notices
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == Notices.__module__]


async def calls(server: ApiServer, number: int) -> None:
    """Wait for so many calls, and see that no other one comes."""
    await until(lambda: server.calls >= number)
    for _ in range(20):
        await asyncio.sleep(0)
    assert server.calls == number


async def test_a_secret_hears_the_sentence_of_the_log_once_however_often_the_keys_are_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = ApiServer()
    async with running(server) as notices:
        for _ in range(3):
            notices.show([BAD])
            await calls(server, 1)
    [one] = server.events.values()
    assert one["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Secret",
        "namespace": "gpumeter",
        "name": "a",
        "uid": "uid-a",
    }
    assert (one["type"], one["reason"], one["message"]) == ("Warning", BAD.reason, BAD.message)
    assert (one["metadata"]["namespace"], one["lastTimestamp"]) == ("gpumeter", "2026-11-22T10:00:00Z")
    assert one["source"] == {"component": "gpumeter-gateway"}
    assert lines(caplog) == [f"ApiKeyInvalid: {BAD.message}"]


async def test_secrets_with_one_key_hear_it_each_and_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    server = ApiServer()
    async with running(server) as notices:
        notices.show(TWINS)
        await calls(server, 2)
    assert server.told() == [(one.name, one.reason, one.message) for one in TWINS]
    assert lines(caplog) == [f"ApiKeyShared: {TWINS[0].message}"]


async def test_a_fault_that_comes_back_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    server = ApiServer()
    async with running(server) as notices:
        for number, shown in enumerate(([BAD], [], [BAD]), 1):
            notices.show(shown)
            await calls(server, (number + 1) // 2)
    assert len(lines(caplog)) == 2


async def test_two_gateways_write_one_event_and_neither_complains(caplog: pytest.LogCaptureFixture) -> None:
    server = ApiServer()
    async with running(server) as one, running(server) as other:
        one.show([BAD])
        other.show([BAD])
        await calls(server, 2)
    assert len(server.events) == 1
    assert not [line for line in lines(caplog) if "No event" in line]


async def test_an_event_that_is_refused_is_left_and_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    server = ApiServer()
    server.fail = [Refused(403, "Forbidden", "events is forbidden")]
    async with running(server) as notices:
        notices.show([BAD, *TWINS])
        await calls(server, 3)
    assert [name for name, *_ in server.told()] == ["b", "c"]
    assert "No event at the Secret gpumeter/a: Forbidden (403): events is forbidden" in lines(caplog)


async def test_an_event_waits_for_an_api_server_that_is_away_unless_its_secret_is_mended() -> None:
    server = ApiServer()
    server.fail = [Unreachable("no answer"), Unreachable("no answer")]
    async with running(server) as notices:
        notices.show([BAD])
        await until(lambda: server.calls == 1)
        notices.show(TWINS[:1])
        await until(lambda: bool(server.events))
    assert [name for name, *_ in server.told()] == ["b"]


def test_the_event_of_a_secret_with_the_longest_name_has_a_name_that_is_accepted() -> None:
    for name in ("a" * 253, "a" * 235 + "." + "a" * 17):
        about = {"metadata": {"namespace": "gpumeter", "name": name, "uid": "u"}}
        named = event(about, "Warning", "ApiKeyInvalid", "Why.", NOW, of=SECRET)["metadata"]["name"]
        assert len(named) <= 253 and ".." not in named


async def test_a_wrong_secret_is_told_and_counted_and_a_mended_one_no_longer() -> None:
    async with asyncio.timeout(30), gateway_rig() as rig, aiohttp.ClientSession(rig.url) as http:

        async def ignored() -> str:
            async with http.get("/metrics") as answer:
                text = await answer.text()
            return next(line for line in text.splitlines() if line.startswith("gpumeter_gateway_ignored_keys "))

        assert await ignored() == "gpumeter_gateway_ignored_keys 0.0"
        rig.cluster.add_key("Acme", "key-of-nobody")
        await until(lambda: bool(rig.cluster.events))
        assert await ignored() == "gpumeter_gateway_ignored_keys 1.0"
        [one] = rig.cluster.events
        assert one["involvedObject"]["name"] == "key-key-of-nobody" and "Acme" in one["message"]
        rig.cluster.revoke("key-of-nobody")
        assert await ignored() == "gpumeter_gateway_ignored_keys 0.0"
