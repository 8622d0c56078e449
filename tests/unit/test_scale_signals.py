"""What is a load, how old it may be, and that a worker that hangs holds up nobody."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from gpumeter_operator.adapters.signals import PARALLEL, TIMEOUT_S, TOO_OLD_MS, Signals, read_load
from gpumeter_operator.decide.crew import Load

TEXT = b"""# HELP vllm:num_requests_waiting Requests that no step has held yet
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="a \\"b} 9 c"} 3.0
vllm:num_requests_running{model_name="x"} 7.0
gpumeter_gpu_utilization_ratio{gpu="GPU-1"} 0.83
gpumeter_gpu_utilization_ratio{gpu="GPU-2"} 0.61
gpumeter_sessions_total{status="finished"} 11.0
gpumeter_sessions_total{status="failed"} 2.0
gpumeter_sessions_created{status="failed"} 1.7e+09
"""


def test_a_load_is_read_from_what_every_engine_and_our_own_tells() -> None:
    assert read_load(TEXT, 5) == Load(5, 3, 7, 72, 13)
    assert read_load(b"vllm:num_requests_waiting 4\nvllm:num_requests_running 1e1\n", 5) == Load(5, 4, 10, None, 0)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not metrics",
        b"vllm:num_requests_waiting 4\n",
        b"vllm:num_requests_waiting NaN\nvllm:num_requests_running 1\n",
        b"vllm:num_requests_waiting -1\nvllm:num_requests_running 1\n",
        b"vllm:num_requests_waiting 1e99\nvllm:num_requests_running 1",
    ],
)
def test_what_does_not_tell_a_queue_is_no_load(text: bytes) -> None:
    assert read_load(text, 5) is None


@dataclass
class StandIn:
    """A worker's HTTP side whose answer the test sets."""

    answer: bytes | None = TEXT
    asked_s: list[float] = field(default_factory=list)
    hangs: asyncio.Event | None = None
    hung: int | None = None  # with `hangs`: only so many of the first do; None: all
    runner: web.AppRunner | None = field(default=None, repr=False)
    port: int = 0

    @property
    def asked(self) -> int:
        return len(self.asked_s)

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        self.runner = web.AppRunner(app, access_log=None)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _metrics(self, _: web.Request) -> web.Response:
        self.asked_s.append(time.monotonic())
        if self.hangs is not None and (self.hung is None or self.asked <= self.hung):
            await self.hangs.wait()
        return web.Response(body=self.answer) if self.answer is not None else web.Response(status=503)


@pytest.fixture
async def worker() -> AsyncIterator[StandIn]:
    one = StandIn()
    await one.start()
    yield one
    if one.hangs is not None:
        one.hangs.set()
    assert one.runner is not None
    await one.runner.cleanup()


async def test_a_worker_that_falls_silent_is_known_for_six_seconds_and_then_not(worker: StandIn) -> None:
    now_ms = [1_000]
    signals = Signals(worker.port, lambda: now_ms[0])
    await signals.ask({"u": "127.0.0.1"}, 5)
    assert signals.load("u") == Load(1_000, 3, 7, 72, 13)
    worker.answer = None
    now_ms[0] += TOO_OLD_MS
    await signals.ask({"u": "127.0.0.1"}, 5)
    assert signals.load("u") is not None, "its last answer still counts"
    now_ms[0] += 1
    assert signals.load("u") is None
    await signals.close()


async def test_one_that_leaves_two_questions_unanswered_is_silent_since_the_first_of_them_until_it_answers(
    worker: StandIn,
) -> None:
    now_ms = [1_000]
    signals = Signals(worker.port, lambda: now_ms[0])
    worker.answer = None
    await signals.ask({"u": "127.0.0.1"}, 5)
    assert signals.silent_since("u") is None, "one may be lost"
    now_ms[0] += 2_000
    await signals.ask({"u": "127.0.0.1"}, 5)
    assert signals.silent_since("u") == 1_000
    worker.answer = TEXT
    now_ms[0] += 4_000
    await signals.ask({"u": "127.0.0.1"}, 5)
    assert signals.silent_since("u") is None
    await signals.close()


async def test_one_that_does_not_answer_is_asked_ever_less_often_until_it_does(worker: StandIn) -> None:
    now_ms = [0]
    signals = Signals(worker.port, lambda: now_ms[0])
    worker.answer = None
    for _ in range(60):
        await signals.ask({"u": "127.0.0.1"}, 5)
        now_ms[0] += 2_000
    assert 8 <= worker.asked <= 14
    worker.answer = TEXT
    for _ in range(20):
        await signals.ask({"u": "127.0.0.1"}, 5)
        now_ms[0] += 2_000
    assert worker.asked >= 20
    await signals.close()


async def test_a_worker_that_hangs_holds_up_neither_the_others_nor_the_round(worker: StandIn) -> None:
    worker.hangs = asyncio.Event()
    signals = Signals(worker.port)
    begun_s = time.monotonic()
    await signals.ask({"u": "127.0.0.1"}, 0.05)
    rounds_s = [time.monotonic() - begun_s]
    await eventually(lambda: worker.asked == 1)
    begun_s = time.monotonic()
    await signals.ask({"u": "127.0.0.1"}, 0.05)
    rounds_s.append(time.monotonic() - begun_s)
    assert max(rounds_s) < 0.9 * TIMEOUT_S
    assert worker.asked == 1, "not asked again while it is being asked"
    assert signals.load("u") is None
    await signals.close()


async def test_so_many_are_asked_at_a_time_and_who_hangs_makes_room_for_the_next(worker: StandIn) -> None:
    worker.hangs = asyncio.Event()
    signals = Signals(worker.port)
    begun_s = time.monotonic()  # not when the first was heard of, which a busy machine tells late
    await signals.ask({f"u{number}": "127.0.0.1" for number in range(PARALLEL + 1)}, 0.05)
    await eventually(lambda: worker.asked > PARALLEL)
    assert worker.asked_s[PARALLEL] - begun_s > 0.9 * TIMEOUT_S
    await signals.close()


async def test_a_round_is_over_when_its_own_workers_have_answered_though_one_of_an_earlier_one_hangs(
    worker: StandIn,
) -> None:
    worker.hangs = asyncio.Event()
    worker.hung = 1
    signals = Signals(worker.port)
    await signals.ask({"u0": "127.0.0.1"}, 0.05)
    await eventually(lambda: worker.asked == 1)  # or it might be u1 who hangs
    begun_s = time.monotonic()
    await signals.ask({"u0": "127.0.0.1", "u1": "127.0.0.1"}, 60)
    assert time.monotonic() - begun_s < 0.9 * TIMEOUT_S
    assert (signals.load("u0") is None, signals.load("u1") is None) == (True, False)
    await signals.close()


async def test_closing_ends_a_round_at_once_though_some_wait_for_their_turn(worker: StandIn) -> None:
    worker.hangs = asyncio.Event()
    signals = Signals(worker.port)
    asking = asyncio.create_task(signals.ask({f"u{number}": "127.0.0.1" for number in range(2 * PARALLEL)}, 60))
    await eventually(lambda: worker.asked > 0)
    async with asyncio.timeout(10):
        await signals.close()
        await asking


async def test_a_round_that_begins_as_the_one_before_it_ends_is_asked(worker: StandIn) -> None:
    signals = Signals(worker.port)
    async with asyncio.timeout(30):
        for number in range(5):
            uids = {f"u{number}-{each}": "127.0.0.1" for each in range(PARALLEL)}
            await signals.ask(uids, 60)  # over sooner only when each was asked; who is heard in time is the machine's
            assert any(signals.load(uid) for uid in uids), number
    await signals.close()


async def eventually(seen: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not seen():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_workers_that_are_gone_are_forgotten(worker: StandIn) -> None:
    signals = Signals(worker.port)
    await signals.ask({"u": "127.0.0.1"}, 5)
    await signals.ask({}, 5)
    assert signals.load("u") is None
    await signals.close()
