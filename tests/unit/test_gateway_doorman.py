"""The doorman with a cluster that a test writes by hand: seats are never lost, never doubled, never above the limit."""

import asyncio
import random
import time
from collections.abc import Callable

import pytest

from gpumeter_operator.gateway.demand import Board
from gpumeter_operator.gateway.doorman import Doorman
from gpumeter_operator.gateway.endpoints import Endpoint
from gpumeter_operator.gateway.models import Catalogue, Service
from gpumeter_operator.gateway.outlook import Outlook
from gpumeter_operator.gateway.refusal import Refusal
from gpumeter_operator.gateway.room import Bounds
from gpumeter_operator.gateway.routing import Failure
from gpumeter_operator.gateway.telemetry import Telemetry
from rigs.gateway import until

A, B, C = (Endpoint(f"10.0.0.{n}", 8000) for n in (1, 2, 3))
SERVICE = Service("team-a", "m", "uid-1", "m", worker_requests=3)
WIDE = Bounds(10**6, 10**6, 10**9, 10**9)


class WrittenCluster:
    """One service, and whatever workers the test says."""

    def __init__(self) -> None:
        self.ready: tuple[Endpoint, ...] = ()

    def catalogue(self) -> Catalogue:
        return Catalogue({SERVICE.qualified: SERVICE}, {"m": (SERVICE,)})

    def endpoints(self, service: Service) -> tuple[Endpoint, ...]:
        return self.ready

    def all_endpoints(self) -> frozenset[Endpoint]:
        return frozenset(self.ready)

    def outlook(self, service: Service) -> Outlook:
        return Outlook(True)


def doorman_of(cluster: WrittenCluster, limit_s: float = 30) -> tuple[Doorman, Board]:
    board = Board(1)
    return Doorman(cluster, WIDE, Telemetry(), board, limit_ns=int(limit_s * 1e9)), board


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_clients_and_workers_do_every_seat_comes_back_and_none_is_given_beyond_the_limit(
    seed: int,
) -> None:
    chance, cluster = random.Random(seed), WrittenCluster()
    doorman, board = doorman_of(cluster)
    busy = dict.fromkeys((A, B, C), 0)
    served = 0

    async def request(tenant: str) -> None:
        nonlocal served
        with doorman.visit(SERVICE, tenant, 10) as visit:
            while True:
                while (endpoint := await visit.seat(0.01)) is None:
                    pass
                busy[endpoint] += 1
                try:
                    assert busy[endpoint] <= SERVICE.worker_requests
                    await asyncio.sleep(chance.random() * 0.01)
                finally:
                    busy[endpoint] -= 1
                if chance.random() < 0.7:
                    visit.worked()
                    served += 1
                    return
                assert visit.failed(chance.choice((Failure.NOT_CONNECTED, Failure.UNAVAILABLE))).allowed

    async with asyncio.timeout(25):
        running = [asyncio.create_task(request(chance.choice("abc"))) for _ in range(60)]
        left = chance.sample(running, 15)
        for task in left:
            cluster.ready = tuple(chance.sample((A, B, C), chance.randrange(4)))
            doorman.workers_changed()
            await asyncio.sleep(chance.random() * 0.004)
            task.cancel()
        cluster.ready = (A, B, C)
        doorman.workers_changed()
        ends = await asyncio.gather(*running, return_exceptions=True)
    assert [end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)] == []
    assert served >= 45
    assert doorman.waiting == 0
    assert board.since(None).services == {}
    assert set(busy.values()) == {0}


async def test_a_burst_from_zero_is_let_in_no_faster_than_the_workers_take_it() -> None:
    cluster = WrittenCluster()
    doorman, board = doorman_of(cluster)
    seated: list[Endpoint] = []
    go_on = asyncio.Event()

    async def request() -> None:
        with doorman.visit(SERVICE, "acme", 10) as visit:
            while (endpoint := await visit.seat(10)) is None:
                pass
            seated.append(endpoint)
            await go_on.wait()

    async with asyncio.timeout(20):
        running = [asyncio.create_task(request()) for _ in range(20)]
        await until(lambda: doorman.waiting == 20)
        cluster.ready = (A, B)
        doorman.workers_changed()
        await until(lambda: len(seated) == 6)
        assert (seated.count(A), seated.count(B), doorman.waiting) == (3, 3, 14)
        demand = board.since(None).services[SERVICE.qualified]
        assert (demand.waiting, demand.in_flight) == (14, 6)
        go_on.set()
        await asyncio.gather(*running)
    assert len(seated) == 20


async def test_a_seat_that_comes_as_its_client_leaves_goes_to_the_next() -> None:
    cluster = WrittenCluster()
    doorman, _ = doorman_of(cluster)
    seated: list[str] = []

    async def request(name: str) -> None:
        with doorman.visit(SERVICE, "acme", 10) as visit:
            while await visit.seat(10) is None:
                pass
            seated.append(name)

    async with asyncio.timeout(20):
        leaves = asyncio.create_task(request("leaves"))
        await until(lambda: doorman.waiting == 1)
        cluster.ready = (A,)
        doorman.workers_changed()  # the seat is taken for it, and it has not woken yet
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        for number in range(SERVICE.worker_requests + 1):
            await request(str(number))
    assert seated == ["0", "1", "2", "3"]


async def test_only_a_wait_without_any_ready_worker_is_urgent() -> None:
    cluster = WrittenCluster()
    doorman, board = doorman_of(cluster)

    async def while_waiting(look: Callable[[], None]) -> None:
        with doorman.visit(SERVICE, "acme", 10) as visit:
            assert await visit.seat(0.001) is None
            look()

    await while_waiting(lambda: None)
    urgent = board.urgent_version
    assert urgent > 1
    cluster.ready = (A,)
    with (
        doorman.visit(SERVICE, "a", 1) as one,
        doorman.visit(SERVICE, "a", 1) as two,
        doorman.visit(SERVICE, "a", 1) as three,
    ):
        for visit in (one, two, three):
            assert await visit.seat(1) == A
        await while_waiting(lambda: None)
    assert board.urgent_version == urgent


async def test_the_limit_counts_from_a_requests_coming_whatever_workers_say_meanwhile() -> None:
    cluster = WrittenCluster()
    cluster.ready = (A,)
    doorman, _ = doorman_of(cluster, limit_s=0.3)
    began_s = time.monotonic()
    with (
        pytest.raises(Refusal, match="The worker could not be reached") as refused,
        doorman.visit(SERVICE, "acme", 10) as visit,
    ):
        while True:
            while await visit.seat(10) is None:
                pass
            visit.failed(Failure.NOT_CONNECTED)
    assert refused.value.code == "waited_too_long"
    assert time.monotonic() - began_s >= 0.3
