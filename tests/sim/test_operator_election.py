"""Several operators and one Lease, on made-up time: never two that write, and always soon one that does."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gpumeter_operator.decide.lease import Lease
from gpumeter_operator.flow.tenure import Tenure
from rigs.candidates import Candidate, LeaseServer
from rigs.virtualtime import now_s, run_virtually

STEP_S = 0.02


@asynccontextmanager
async def two() -> AsyncIterator[tuple[LeaseServer, Candidate, Candidate]]:
    """The first one holds the Lease, the second one stands by."""
    server, chance = LeaseServer(), random.Random(1)
    first = Candidate("a", server, chance)
    await asyncio.sleep(1)
    second = Candidate("b", server, chance)
    await asyncio.sleep(2)
    assert (first.may_write, second.may_write) == (True, False)
    yield server, first, second
    for one in (first, second):
        await one.kill()


async def until(look: Callable[[], bool], within_s: float) -> float:
    begun_s = now_s()
    while not look():
        assert now_s() - begun_s < within_s, f"not within {within_s} s"
        await asyncio.sleep(STEP_S)
    return now_s() - begun_s


def virtually(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        run_virtually(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@virtually
async def test_after_a_crash_the_other_one_takes_over_within_eight_seconds() -> None:
    async with two() as (server, first, second):
        await first.kill()
        assert 5 < await until(lambda: second.may_write, 8) <= 7.6
        assert server.lease is not None
        assert (server.lease.holder, server.lease.transitions) == ("b", 1)


def test_who_stands_by_names_the_holder_once(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with two() as (_, first, second):
            await first.kill()
            await until(lambda: second.may_write, 8)

    with caplog.at_level(logging.INFO):
        run_virtually(story())
    told = [one.getMessage() for one in caplog.records if "LeaseAwaited: b " in one.getMessage()]
    assert [line.partition(";")[2] for line in told if ";" in line] == [" a holds gpumeter-system/gpumeter-operator."]


@virtually
async def test_after_a_clean_stop_the_other_one_takes_over_within_a_second() -> None:
    async with two() as (_, first, second):
        assert await first.stop()
        await until(lambda: second.may_write, 1)


@virtually
async def test_who_cannot_renew_stops_two_seconds_before_the_other_one_begins_and_says_why() -> None:
    async with two() as (_, first, second):
        first.way.cut = True
        stopped_s = await until(lambda: not first.may_write, 6)
        lost = await asyncio.wait_for(first.task, 1)
        assert lost.reason == "LeaseNotRenewed"
        assert "could not be renewed for 5.0 s" in lost.message
        assert "ends before another one may begin" in lost.message
        assert stopped_s + await until(lambda: second.may_write, 8) - stopped_s >= 1.9


@virtually
async def test_a_process_that_was_frozen_for_a_minute_may_write_nothing_when_it_goes_on() -> None:
    async with two() as (_, first, second):
        first.freeze()
        await until(lambda: second.may_write, 9)
        await asyncio.sleep(60)
        assert first.tenure.over(), "at the first write, before its own loop has noticed anything"
        first.go_on()
        lost = await asyncio.wait_for(first.task, 5)
        assert lost.reason == "LeaseNotRenewed"
        assert "the process did not run" in lost.message
        assert second.may_write


@virtually
async def test_an_api_server_that_is_away_for_a_minute_ends_the_holder_once_and_nobody_else() -> None:
    async with two() as (server, first, second):
        server.away = True
        await asyncio.sleep(60)
        assert first.dead
        assert not second.dead, "who stands by waits"
        assert second.election.overdue() is None, "it is well: a restart would cure nothing"
        assert "has not been read for" in (second.election.blind() or "")
        again = Candidate("a2", server, random.Random(2))  # as the kubelet starts it again
        await asyncio.sleep(30)
        assert not again.dead, "no crash loop"
        server.away = False
        await until(lambda: second.may_write or again.may_write, 3)
        assert second.election.blind() is None
        await again.kill()


@virtually
async def test_a_server_that_takes_seconds_for_each_answer_takes_the_lease_from_nobody() -> None:
    async with two() as (server, first, second):
        first.way.slow_s = second.way.slow_s = 2.0
        before = len(server.writes)
        await asyncio.sleep(120)
        assert first.may_write and not second.may_write
        assert len(server.writes) > before + 20, "it was renewed all the time"
        first.way.slow_s = 0.0
        await asyncio.sleep(10)
        assert first.may_write and first.election.overdue() is None


@virtually
async def test_a_lease_that_somebody_else_holds_ends_the_holder_at_its_next_renewal() -> None:
    async with two() as (server, first, _):
        assert server.lease is not None
        server.write(Lease("by-hand", 7, "x", "2026-11-21T10:00:00Z", 9, server.lease.version))
        lost = await asyncio.wait_for(first.task, 2)
        assert lost.reason == "LeaseTaken"
        assert "is held by by-hand since 2026-11-21T10:00:00Z" in lost.message
        assert first.tenure.over()


@virtually
async def test_a_note_on_the_lease_or_its_deletion_costs_the_holder_nothing() -> None:
    async with two() as (server, first, second):
        assert server.lease is not None
        server.version += 1
        server.lease = Lease("a", 7, "x", "x", 0, str(server.version))  # kubectl annotate
        await asyncio.sleep(10)
        assert first.may_write
        assert not second.may_write
        second.way.cut = True
        server.lease = None
        await until(lambda: server.lease is not None, 2)
        assert server.lease.holder == "a"
        assert first.may_write


@virtually
async def test_who_sees_that_the_lease_was_deleted_waits_as_long_as_its_holder_may_act() -> None:
    async with two() as (server, first, second):
        for _ in range(20):  # whoever comes first: the holder's renewal or the other one's look
            server.lease = None
            for _ in range(100):
                await asyncio.sleep(STEP_S)
                assert [one.name for one in (first, second) if one.may_write] == ["a"]
        assert not first.dead
        await first.kill()
        server.lease = None
        assert 5 < await until(lambda: second.may_write, 8) <= 7.6


@virtually
async def test_a_renewal_whose_answer_was_lost_is_no_loss() -> None:
    async with two() as (_, first, second):
        first.way.lossy = 0.4
        await asyncio.sleep(4)
        first.way.lossy = 0.0
        await asyncio.sleep(20)
        assert first.may_write or first.dead
        assert first.may_write != second.may_write


@virtually
async def test_a_claim_whose_answer_was_lost_is_known_as_ours_at_the_next_look() -> None:
    server = LeaseServer()
    server.write(Lease("a", 7, "x", "x", 3))
    one = Candidate("a", server, random.Random(1))
    await until(lambda: one.may_write, 1)
    assert server.lease is not None
    assert server.lease.transitions == 3
    await one.kill()


@virtually
async def test_a_stop_while_standing_by_gives_back_what_a_cut_off_claim_had_taken() -> None:
    server = LeaseServer()
    first = Candidate("a", server, random.Random(1))
    first.way.delay_s = 2.0
    await until(lambda: server.lease is not None, 60)
    assert not first.election.won.is_set(), "the answer is still on its way"
    first.way.delay_s = 0.01
    assert await first.stop()
    assert server.lease is not None
    assert server.lease.holder == ""


@virtually
async def test_a_closed_gate_lets_nobody_through_and_an_open_write_is_waited_for() -> None:
    tenure = Tenure(lambda: int(now_s() * 1e9))
    written: list[str] = []

    async def write(name: str, takes_s: float) -> None:
        async with tenure.writing():
            await asyncio.sleep(takes_s)
            written.append(name)

    early = asyncio.create_task(write("before anything was granted", 0))
    await asyncio.sleep(1)
    assert not written
    tenure = Tenure(lambda: int(now_s() * 1e9))
    tenure.extend(10_000_000_000)
    slow = asyncio.create_task(write("slow", 3))
    await asyncio.sleep(1)
    tenure.close()
    late = asyncio.create_task(write("late", 0))
    assert not await tenure.idle(1)
    assert await tenure.idle(5)
    assert written == ["slow"]
    for one in (early, slow, late):
        one.cancel()


@pytest.mark.parametrize("seed", range(10))
def test_never_two_write_whatever_the_network_the_processes_and_their_clocks_do(seed: int) -> None:
    run_virtually(_turmoil(seed))


async def _turmoil(seed: int) -> None:
    chance = random.Random(seed)
    server = LeaseServer()
    names = iter(f"c{number}" for number in range(10_000))

    def begin() -> Candidate:
        return Candidate(next(names), server, chance, rate=chance.choice([0.9, 1.0, 1.0, 1.15]))

    alive = [begin() for _ in range(3)]
    acting_s = 0.0
    while now_s() < 200:
        for _ in range(chance.randrange(10, 300)):
            await asyncio.sleep(STEP_S)
            writers = [one.name for one in alive if one.may_write]
            assert len(writers) <= 1, f"{writers} at {now_s():.2f} s"
            acting_s += STEP_S * len(writers)
        await _mischief(chance, server, alive)
        for one in [one for one in alive if one.dead]:  # the kubelet starts it again
            alive.remove(one)
            alive.append(begin())
    server.away = False
    for one in alive:
        one.way.cut, one.way.lossy = False, 0.0
        one.go_on()
    await asyncio.sleep(1)
    alive += [begin()]
    await until(lambda: sum(one.may_write for one in alive) == 1, 12)
    assert acting_s > 40, "a simulation in which nobody acts proves nothing"
    for one in alive:
        await one.kill()


async def _mischief(chance: random.Random, server: LeaseServer, alive: list[Candidate]) -> None:
    one = chance.choice(alive)
    holders = [each for each in alive if each.may_write]
    target = holders[0] if holders and chance.random() < 0.6 else one
    what = chance.choice(["kill", "stop", "cut", "mend", "freeze", "thaw", "lossy", "sound", "away", "back", "back"])
    if what == "kill":
        await target.kill()
    elif what == "stop":
        if not target.dead and target.way.hold is None:
            await target.stop()
    elif what in ("cut", "mend"):
        target.way.cut = what == "cut"
    elif what == "freeze":
        target.freeze()
    elif what == "thaw":
        for each in alive:
            each.go_on()
    elif what in ("lossy", "sound"):
        target.way.lossy = 0.3 if what == "lossy" else 0.0
    else:
        server.away = what == "away"
