"""The operator asks workers that start: nobody waits for an answer, and nonsense never becomes a status."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from gpumeter_operator.adapters.starting import (
    ASK_EVERY_S,
    ASK_SERVING_EVERY_S,
    SENTENCE_MAX,
    Answer,
    StartingWorkers,
    read,
)

FAR = "fetching the model: 1,234 of 4,000 MB (30 %)"


class Worker:
    """A /readyz that a test decides."""

    def __init__(self) -> None:
        self.document: Any = {"ready": False, "reason": "Loading", "message": FAR}
        self.asked = 0
        self.port = 0

    async def readyz(self, _: web.Request) -> web.Response:
        self.asked += 1
        return web.json_response(self.document, status=503)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    one = Worker()
    app = web.Application()
    app.router.add_get("/readyz", one.readyz)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    one.port = runner.addresses[0][1]
    yield one
    await runner.cleanup()


async def becomes(starting: StartingWorkers, expected: Answer, *, serves: bool = False) -> None:
    async with asyncio.timeout(10):
        while starting.told("pod", "127.0.0.1", serves) != expected:  # noqa: ASYNC110 - it has no event; nobody waits for it
            await asyncio.sleep(0.01)


async def test_an_answer_is_there_at_a_later_look_and_asked_for_again_when_it_is_old(worker: Worker) -> None:
    now_s = [100.0]
    starting = StartingWorkers(worker.port, lambda: now_s[0])
    assert starting.told("pod", "127.0.0.1", False) == Answer()
    await becomes(starting, Answer(progress=FAR))
    assert worker.asked == 1, "looks in between ask nobody"
    worker.document["message"] = "loading 269 MB of weights for 2 s"
    now_s[0] += ASK_EVERY_S
    await becomes(starting, Answer(progress="loading 269 MB of weights for 2 s"))
    assert worker.asked == 2
    await starting.close()


async def test_what_a_pod_said_is_not_told_of_the_next_one_that_gets_its_address(worker: Worker) -> None:
    starting = StartingWorkers(worker.port)
    await becomes(starting, Answer(progress=FAR))
    assert starting.told("another pod", "127.0.0.1", False) == Answer()
    await starting.close()


async def test_a_worker_that_does_not_listen_says_nothing(worker: Worker) -> None:
    starting = StartingWorkers(1)
    assert starting.told("pod", "127.0.0.1", False) == Answer()
    await asyncio.gather(*starting._tasks)
    assert starting.told("pod", "127.0.0.1", False) == Answer()
    await starting.close()


POOR = {"reason": "CalibrationPoor", "message": "half of 31 steps are predicted within 40 %."}


async def test_a_worker_that_serves_is_asked_seldom_how_it_splits_steps_and_its_start_is_forgotten(
    worker: Worker,
) -> None:
    now_s = [100.0]
    starting = StartingWorkers(worker.port, lambda: now_s[0])
    await becomes(starting, Answer(progress=FAR))
    worker.document = {"ready": True, "reason": "Ready", "message": "", "attribution": POOR}
    assert starting.told("pod", "127.0.0.1", True) == Answer()
    answer = Answer(stand_in=(POOR["reason"], POOR["message"]))
    await becomes(starting, answer, serves=True)
    now_s[0] += ASK_SERVING_EVERY_S - 1
    assert starting.told("pod", "127.0.0.1", True) == answer
    assert worker.asked == 2
    worker.document["attribution"] = {"reason": "Calibrated", "message": "as it should be"}
    now_s[0] += 1
    await becomes(starting, Answer(), serves=True)
    await starting.close()


@pytest.mark.parametrize(
    ("attribution", "stand_in"),
    [
        (POOR, ("CalibrationPoor", "half of 31 steps are predicted within 40 %.")),
        ({"reason": "CalibrationPoor", "message": "a\nb"}, ("CalibrationPoor", "a b.")),
        ({"reason": "Calibrated", "message": "well"}, None),
        ({"reason": "CalibrationOff", "message": "as asked"}, None),
        ({"reason": "CalibrationPoor", "message": 7}, None),
        ({"reason": ["CalibrationPoor"], "message": "x"}, None),
        ("CalibrationPoor", None),
        (None, None),
    ],
)
def test_of_a_worker_that_serves_only_a_stand_in_is_told(attribution: Any, stand_in: tuple[str, str] | None) -> None:
    document = {"ready": True, "reason": "Ready", "message": "", "attribution": attribution}
    assert read(json.dumps(document).encode()) == Answer(stand_in=stand_in)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (json.dumps({"ready": False, "reason": "Loading", "message": "half of it."}).encode(), "half of it"),
        (json.dumps({"ready": False, "reason": "WarmingUp", "message": "a\nb\u0007c"}).encode(), "a b c"),
        (json.dumps({"ready": False, "reason": "Draining", "message": "it leaves"}).encode(), ""),
        (json.dumps({"ready": False, "reason": "Loading", "message": 7}).encode(), ""),
        (json.dumps(["Loading"]).encode(), ""),
        (b"<html>", ""),
        (b"\xff", ""),
    ],
)
def test_only_what_a_starting_worker_says_is_told(body: bytes, told: str) -> None:
    assert read(body) == Answer(progress=told)
    assert (
        len(read(json.dumps({"ready": False, "reason": "Loading", "message": "x" * 5000}).encode()).progress)
        == SENTENCE_MAX
    )


CAPACITY = {
    "profileHash": "p-1",
    "gpuClass": "cpu",
    "boundBy": "MaxBatchSize",
    "contextTokens": 512,
    "memoryHeadroomBytes": 7,
    "batches": [{"batchSize": 1, "tokensPerSecond": "20.5", "gpuSecondsPerThousandTokens": "48.780488"}],
}


def serving(capacity: Any) -> Answer:
    return read(json.dumps({"ready": True, "reason": "Ready", "message": "", "capacity": capacity}).encode())


def test_what_a_worker_can_do_is_taken_as_it_says_without_what_no_status_has() -> None:
    assert serving(CAPACITY).capacity == CAPACITY
    batch = {**CAPACITY["batches"][0], "more": 1}  # type: ignore[index, dict-item]
    assert serving({**CAPACITY, "more": 1, "batches": [batch]}).capacity == CAPACITY


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        "x",
        {**CAPACITY, "batches": None},
        {**CAPACITY, "batches": [{"batchSize": "1"}]},
        {**CAPACITY, "batches": [{"batchSize": 1, "tokensPerSecond": "fast", "gpuSecondsPerThousandTokens": "1"}]},
        {**CAPACITY, "boundBy": 7},
        {**CAPACITY, "profileHash": "p" * 1_000},
        {**CAPACITY, "contextTokens": True},
    ],
)
def test_a_capacity_that_is_broken_anywhere_is_none(broken: Any) -> None:
    assert serving(broken) == Answer()
