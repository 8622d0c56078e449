"""Which loop stands still: each is named in the answer of /healthz, and who stands by is judged by the Lease alone."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import aiohttp
import pytest

from gpumeter_operator.decide.workload import Installation
from gpumeter_operator.flow.election import Election
from gpumeter_operator.flow.liveness import Deliveries
from gpumeter_operator.flow.operation import Operation
from gpumeter_operator.flow.tenure import InTenure, Tenure
from rigs.ports import hold_port
from rigs.sharedapi import SharedApi


def service(uid: str, generation: int = 1) -> dict[str, Any]:
    return {"metadata": {"namespace": "a", "name": uid, "uid": uid, "generation": generation}}


class Brought:
    """A watch that brings what the test says."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.services: list[dict[str, Any]] = []
        self.deliveries = Deliveries(lambda: self.now_s)

    def late(self, at_s: float) -> str | None:
        self.now_s = at_s
        return self.deliveries.late(self.services, 60)

    def bring(self, uid: str, generation: int | None) -> None:
        self.deliveries.hear(uid, generation)


def test_a_watch_that_brings_no_edit_any_more_is_told_with_what_waits() -> None:
    world = Brought()
    world.services = [service("x", 1), service("y", 4)]
    world.bring("x", 1)
    world.bring("y", 4)
    assert world.late(0) is None
    world.services[1] = service("y", 5)
    assert world.late(100) is None, "noticed just now"
    assert world.late(150) is None
    assert world.late(161) == (
        "The watch of InferenceServices has brought nothing for 61 s, but 1 of them are new or edited (the first: a/y)."
    )
    world.bring("y", 5)
    assert world.late(162) is None


def test_a_long_queue_that_gets_shorter_is_no_frozen_watch() -> None:
    world = Brought()
    world.services = [service(f"s{number}") for number in range(20)]
    for number in range(20):
        assert world.late(number * 30) is None
        world.bring(f"s{number}", 1)
    assert world.late(10_000) is None


def test_a_service_that_is_gone_and_comes_again_is_waited_for_again() -> None:
    world = Brought()
    world.services = [service("x")]
    world.bring("x", 1)
    assert world.late(0) is None
    world.bring("x", None)
    assert world.late(1) is None
    assert "a/x" in (world.late(62) or "")


def test_an_edit_of_a_service_that_is_being_deleted_is_not_waited_for_but_one_of_others_is() -> None:
    world = Brought()
    world.services = [service("x"), service("y")]
    world.bring("x", 1)
    world.bring("y", 1)
    world.services[0] = service("x", 2)
    world.services[0]["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"
    assert world.late(0) is None
    assert world.late(100) is None
    world.services[1] = service("y", 2)
    assert world.late(101) is None
    assert "a/y" in (world.late(162) or "")


class Absent:
    """A Lease that cannot be read."""

    reference = "gpumeter-system/gpumeter-operator"

    async def read(self) -> None:
        raise TimeoutError

    async def write(self, lease: Any) -> None:
        raise TimeoutError


class EndingDoors:
    """Gateways whose loop ends when the test says so."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.sentence: str | None = None

    def asked(self) -> dict[str, Any]:
        return {}

    def silent(self) -> tuple[str, ...]:
        return ()

    def overdue(self) -> str | None:
        return self.sentence

    async def run(self) -> None:
        await self.end.wait()


class Served:
    """An operation that answers probes; `clock_ns` is that of its election."""

    def __init__(self) -> None:
        self.clock_ns = 0
        self.doors = EndingDoors()
        tenure = Tenure(lambda: self.clock_ns)
        self.election = Election(Absent(), tenure, "me", clock_ns=lambda: self.clock_ns)
        self.port = hold_port()
        self.operation = Operation(
            InTenure(SharedApi(lambda: "2026-11-21T10:00:00Z"), tenure),
            Installation("worker:1", "IfNotPresent", "http://gateway"),
            b"k" * 32,
            interval_s=3,
            deletion_margin=timedelta(seconds=60),
            http=("127.0.0.1", self.port),
            open_doors=lambda on_change: self.doors,
            election=self.election,
        )

    async def answer(self, path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.port}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.text()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    one = Served()
    await one.operation.serve()
    yield one
    await one.operation.stop()


async def test_who_stands_by_and_cannot_read_the_lease_is_alive_and_not_ready(served: Served) -> None:
    standing = asyncio.create_task(served.election.run())
    await asyncio.sleep(0)
    served.clock_ns = 12_000_000_000
    assert await served.answer("/healthz") == (200, "ok\n")
    code, text = await served.answer("/readyz")
    assert code == 503
    assert text.startswith("The lease gpumeter-system/gpumeter-operator has not been read for 12 s")
    assert "gpumeter_operator_active 0.0" in (await served.answer("/metrics"))[1]
    standing.cancel()
    await asyncio.gather(standing, return_exceptions=True)


async def test_a_look_at_the_lease_that_hangs_is_named(served: Served) -> None:
    served.clock_ns = 31_000_000_000
    sentence = "The last look at the lease gpumeter-system/gpumeter-operator was 31 s ago.\n"
    assert await served.answer("/healthz") == (503, sentence)


async def test_who_acts_is_judged_by_all_its_loops(served: Served) -> None:
    await served.operation.start()
    assert await served.answer("/healthz") == (200, "ok\n")
    assert await served.answer("/readyz") == (200, "ok\n")
    assert "gpumeter_operator_active 1.0" in (await served.answer("/metrics"))[1]
    served.doors.sentence = "The loop that asks the gateways last came round 31 s ago."
    assert await served.answer("/healthz") == (503, f"{served.doors.sentence}\n")
    served.doors.sentence = None
    served.doors.end.set()
    await asyncio.sleep(0.01)
    assert await served.answer("/healthz") == (503, "The loop 'gateways' has ended, though it never should.\n")
