"""What a profile_hash means stays in the ledger after the worker's pod, over real HTTP; a worker that does not tell it,
or tells something else, is collected all the same."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner

from gpumeter_operator.adapters.ledger.store import MAX_PROFILES_PER_WORKER, Ledger
from gpumeter_operator.adapters.workers import PROFILES_BYTES_MAX, Target, Workers
from gpumeter_operator.cli.profile import profile
from gpumeter_operator.flow.collect import Collector
from gpumeter_operator.flow.profiles import ANSWER_TIMEOUT_S, ASK_AGAIN_NS, MAX_PROFILE_BYTES, ProfileKeeper, believed
from gpumeter_usage.page import encode_page
from gpumeter_usage.period import SECOND_NS
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.profiles import Profiles, adopt
from rigs.ledger import START_NS, TOKEN, Clock, FakeWorker, inline, open_ledger, started, worker
from rigs.usageport import listening, told_by

NOW_NS = START_NS + 50 * SECOND_NS
PROFILE = uncalibrated(Rule.KNEE, "cuda")
Answer = Callable[[], Awaitable[web.StreamResponse]]


def document(tmp_path: Path) -> dict[str, Any]:
    """What a worker tells: made by the worker's own code."""
    kept = Profiles(tmp_path)
    kept.use(adopt(None, Rule.KNEE, "cuda", "smollm2"))
    return kept.document()


def a_worker() -> FakeWorker:
    fake = FakeWorker(worker(), START_NS)
    fake.profile_hash = PROFILE.hash
    for number in (1, 2):
        fake.serve("s-1", "acme", START_NS + number * SECOND_NS)
    return fake


class Told:
    """How often profiles were asked for, and how it is answered."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.count = 0


def telling(anything: Any) -> Answer:
    async def answer() -> web.StreamResponse:
        return web.Response(body=anything if isinstance(anything, bytes) else json.dumps(anything).encode())

    return answer


@asynccontextmanager
async def serving(fake: FakeWorker, told: Told) -> AsyncIterator[Target]:
    async def handle(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        if request.path.endswith("/profile"):
            told.count += 1
            return await told.answer()
        return await told_by(fake, request, lambda page: web.Response(body=encode_page(page)))

    async with listening(handle, TOKEN) as target:
        yield target


@asynccontextmanager
async def collecting(path: Path, told: Told) -> AsyncIterator[tuple[Ledger, Clock, Callable[[], Awaitable[bool]]]]:
    """The ledger, the clock, and one pull of the worker with all that it started."""
    ledger, workers, fake, clock = open_ledger(path / "ledger.db"), Workers(), a_worker(), Clock(NOW_NS)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    collector = Collector(ledger, workers, inline, clock, ProfileKeeper(ledger, workers, inline, clock))
    async with serving(fake, told) as target:

        async def pull() -> bool:
            done = await collector.pull(fake.identity, target)
            await collector.finish()
            return done

        yield ledger, clock, pull
        await workers.close()


async def test_a_profile_is_kept_once_and_printed_in_the_bytes_of_its_hash(tmp_path: Path) -> None:
    told = Told(telling(document(tmp_path)))
    async with collecting(tmp_path, told) as (_, clock, pull):
        for _ in range(3):
            assert await pull()
            clock.now_ns += 2 * ASK_AGAIN_NS
        assert told.count == 1, "what is known is not asked for again"
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    printed = CliRunner().invoke(profile, [PROFILE.hash, "--ledger", url])
    assert (printed.exit_code, sha256(printed.stdout_bytes).hexdigest()) == (0, PROFILE.hash)
    assert json.loads(printed.stdout)["phi_ps"] == PROFILE.phi_ps
    unknown = CliRunner().invoke(profile, ["0" * 64, "--ledger", url])
    assert unknown.exit_code == 1
    assert "keeps no profile" in unknown.output


def forged(of: dict[str, Any]) -> dict[str, Any]:
    (entry,) = of["profiles"]
    return {"profiles": [entry | {"profile": entry["profile"] | {"phi_ps": 1}}]}


@pytest.mark.parametrize(
    "broken",
    [forged, lambda _: b"[" * 100_000, lambda _: {"profiles": [7]}, lambda _: b" " * (PROFILES_BYTES_MAX + 1)],
    ids=["forged", "nested", "no profiles", "too large"],
)
async def test_what_is_not_what_its_hash_says_is_told_and_not_kept_and_asked_for_again_later(
    broken: Callable[[dict[str, Any]], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    true = document(tmp_path)
    told = Told(telling(broken(true)))
    async with collecting(tmp_path, told) as (ledger, clock, pull):
        for _ in range(3):
            assert await pull(), "a page is taken all the same"
        raw = sqlite3.connect(tmp_path / "ledger.db")
        assert raw.execute("SELECT count(*) FROM profiles").fetchone() == (0,)
        raw.close()
        assert len(list(ledger.bodies(worker().worker_uid))) == 4
        assert told.count == 1
        assert [each.message for each in caplog.records if "Not every profile of pod" in each.message]
        told.answer = telling(true)
        clock.now_ns += ASK_AGAIN_NS
        assert await pull()
        assert ledger.profile(PROFILE.hash) is not None


async def test_a_worker_without_the_route_is_collected_and_no_alarm(tmp_path: Path) -> None:
    async def absent() -> web.StreamResponse:
        return web.Response(status=404, text="Not Found")

    async with collecting(tmp_path, Told(absent)) as (ledger, _, pull):
        assert await pull()
        assert ledger.alarms() == []


async def test_a_worker_that_hangs_on_its_profiles_delays_no_pull(tmp_path: Path) -> None:
    released = asyncio.Event()

    async def hanging() -> web.StreamResponse:
        await released.wait()
        return web.Response(status=500)

    ledger, workers, fake, clock = open_ledger(tmp_path / "ledger.db"), Workers(), a_worker(), Clock(NOW_NS)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    collector = Collector(ledger, workers, inline, clock, ProfileKeeper(ledger, workers, inline, clock))
    told = Told(hanging)
    async with serving(fake, told) as target:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S / 2):
                for _ in range(3):
                    assert await collector.pull(fake.identity, target)
        finally:
            released.set()
        assert fake.boot.acknowledged_seq == 4
        assert told.count <= 1
        await collector.finish()
        await workers.close()


def test_a_worker_that_tells_too_many_profiles_fills_no_ledger(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db")
    bodies = [json.dumps({"phi_ps": number}, separators=(",", ":")).encode() for number in range(200)]
    many = [(sha256(body).hexdigest(), body) for body in bodies]
    assert ledger.keep_profiles("uid-1", many, NOW_NS) == {digest for digest, _ in many[:MAX_PROFILES_PER_WORKER]}
    assert len(ledger.keep_profiles("uid-1", many, NOW_NS)) == MAX_PROFILES_PER_WORKER
    assert len(ledger.keep_profiles("uid-2", many[64:70], NOW_NS)) == 6


def test_a_profile_that_is_larger_than_any_is_not_believed() -> None:
    large = {"name": "x" * MAX_PROFILE_BYTES}
    body = json.dumps(large, sort_keys=True, separators=(",", ":")).encode()
    found, refused = believed(json.dumps({"profiles": [{"hash": sha256(body).hexdigest(), "profile": large}]}).encode())
    assert (found, len(refused)) == ({}, 1)
