"""What collectors of other systems got wrong, and what a worker, a disk or a network may hand us: each is a clear
error, and nothing is lost."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web
from sqlalchemy import event

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Workers, page_bytes_max
from gpumeter_operator.flow.bounds import Batch, Room
from gpumeter_operator.flow.collect import PAGES_A_TURN, Collector
from gpumeter_operator.flow.turns import REST_MAX_NS, Outcome, Turns
from gpumeter_usage.page import MAX_PAGE_RECORDS, encode_status
from gpumeter_usage.period import SECOND_NS
from gpumeter_usage.record import Account, Kind, Status
from rigs.ledger import START_NS, TOKEN, Clock, FakeNetwork, FakeWorker, inline, open_ledger, started, worker
from rigs.usageport import listening

NOW_NS = START_NS + 50 * SECOND_NS
DAY_NS = 86_400 * SECOND_NS


def a_worker(number: int = 1) -> FakeWorker:
    fake = FakeWorker(worker(number), START_NS)
    fake.spend(Account.LOAD, START_NS + 10 * SECOND_NS)
    return fake


def put(fake: FakeWorker, until_ns: int = START_NS + 11 * SECOND_NS, **values: object) -> None:
    fields = {"session_id": "s-1", "tenant": "acme", "gpu_ns": SECOND_NS, "status": Status.FINISHED} | values
    times = until_ns - SECOND_NS, until_ns
    fake._append(Kind.SESSION, Account.ATTRIBUTED, *times, **fields, prefill_ns=fields["gpu_ns"])
    fake._append(Kind.ACCOUNT, Account.ATTRIBUTED, *times, gpu_ns=fields["gpu_ns"])


@pytest.mark.parametrize(
    ("values", "reason", "told"),
    [
        ({"service": "team-b/other"}, "ForeignRecord", "a record at seq 2 names worker pod-uid-1"),
        ({"worker_uid": "pod-uid-7"}, "ForeignRecord", "names worker pod-uid-7"),
        ({"gpu_ns": -1}, "RecordInvalid", "gpu_ns is -1; it must be a whole number from 0"),
        ({"completion_tokens": -5}, "RecordInvalid", "completion_tokens is -5"),
        ({"gpu_ns": 2**63}, "RecordInvalid", f"gpu_ns is {2**63}"),
        ({"gpu_ns": 2**62}, "CountTooLarge", "a record is a slice of at most a minute"),
        ({"prompt_tokens": 2**50}, "CountTooLarge", "claims counts that no step can reach"),
        ({"until_ns": NOW_NS + DAY_NS}, "FutureTime", "is yet to come"),
        (
            {"until_ns": 2 * SECOND_NS},
            "PastTime",
            "is 1970-01-01T00:00:02Z, before 2020-01-01T00:00:00Z; check the clock",
        ),
        ({"tenant": "_platform\0"}, "RecordInvalid", "tenant"),
    ],
)
async def test_a_record_that_cannot_be_true_is_refused_in_a_sentence_and_what_came_before_is_kept(
    values: dict[str, object], reason: str, told: str, tmp_path: Path
) -> None:
    ledger, fake, network = open_ledger(tmp_path / "ledger.db"), a_worker(), FakeNetwork(page_limit=1)
    put(fake, **values)  # type: ignore[arg-type]
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    target = network.add("10.0.0.1", fake)
    for _ in range(2):
        assert not await Collector(ledger, network, inline, Clock(NOW_NS)).pull(fake.identity, target)
    ((found, uid, message),) = ledger.alarms()
    assert (found, uid) == (reason, fake.identity.worker_uid) and told in message
    assert ledger.boots(fake.identity.worker_uid)[0].committed_seq == 1
    assert fake.boot.acknowledged_seq == 1, "what is not in the ledger stays with the worker"
    assert told in ledger.not_gone()[0].problem


@pytest.mark.parametrize(("limit", "taken"), [(5000, 0), (1, 2)], ids=["one page", "cut within the flush"])
@pytest.mark.parametrize("too_much_ns", [1, 30 * SECOND_NS])
async def test_sessions_that_claim_more_than_their_pod_booked_are_refused_and_their_worker_is_missing(
    limit: int, taken: int, too_much_ns: int, tmp_path: Path
) -> None:
    ledger, fake, network = open_ledger(tmp_path / "ledger.db"), a_worker(), FakeNetwork(page_limit=limit)
    until_ns = START_NS + 11 * SECOND_NS
    put(fake, gpu_ns=SECOND_NS + too_much_ns)
    fake.boot.links.pop()
    fake._append(Kind.ACCOUNT, Account.ATTRIBUTED, until_ns - SECOND_NS, until_ns, gpu_ns=SECOND_NS)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    target = network.add("10.0.0.1", fake)
    for _ in range(2):
        assert not await Collector(ledger, network, inline, Clock(NOW_NS)).pull(fake.identity, target)
    ((reason, _, message),) = ledger.alarms()
    told = f"sum to {SECOND_NS + too_much_ns} ns, the account attributed changed by {SECOND_NS} ns"
    assert reason == "SlicesDisagree" and told in message
    assert fake.boot.acknowledged_seq == taken, "what is not in the ledger stays with the worker"
    assert told in ledger.not_gone()[0].problem


async def test_two_sessions_of_one_id_are_two_facts(tmp_path: Path) -> None:
    """Elsewhere ids that clients chose were keys, and rows were dropped or merged."""
    ledger, network = open_ledger(tmp_path / "ledger.db"), FakeNetwork()
    for number in (1, 2):
        fake = a_worker(number)
        put(fake)
        put(fake)
        ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
        assert await Collector(ledger, network, inline, Clock(NOW_NS)).pull(
            fake.identity, network.add(f"10.0.0.{number}", fake)
        )
    lines = [line for line in ledger.lines("team-a", "smollm2", START_NS + 60 * SECOND_NS) if line.tenant == "acme"]
    assert sum(line.sessions for line in lines) == 4
    assert sum(line.gpu_ns for line in lines) == 4 * SECOND_NS


async def test_a_page_of_a_gigabyte_is_read_no_further_than_what_was_asked_for_can_be_long(tmp_path: Path) -> None:
    ledger, workers, fake, sent = open_ledger(tmp_path / "ledger.db"), Workers(), a_worker(), 0
    asked = page_bytes_max(len(fake.boot.links))

    async def flood(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        if request.path.endswith("/status"):
            return web.Response(body=encode_status(fake.status()))
        assert request.query["limit"] == str(len(fake.boot.links))
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(2**30 // 2**16):
            await answer.write(b" " * 2**16)
            sent += 2**16
        return answer

    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    async with listening(flood, TOKEN) as target:
        assert not await Collector(ledger, workers, inline, Clock(NOW_NS)).pull(fake.identity, target)
    await workers.close()
    assert f"larger than {asked} bytes" in ledger.alarms()[0][2]
    assert sent < 2**25, "more than the sockets' buffers was read"


@contextmanager
def full_disk(ledger: Ledger) -> Iterator[None]:
    """The ledger's file may not grow by a page; SQLite says then what it says on a disk without room."""

    def cap(connection: object, *_: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]  # type: ignore[attr-defined]
        connection.execute(f"PRAGMA max_page_count = {pages}")  # type: ignore[attr-defined]

    ledger.engine.dispose()
    event.listen(ledger.engine, "connect", cap)
    try:
        yield
    finally:
        event.remove(ledger.engine, "connect", cap)
        ledger.engine.dispose()


async def test_a_page_that_could_not_be_written_is_not_acknowledged_as_if_it_had_been(tmp_path: Path) -> None:
    """Elsewhere a duplicate was claimed before the write: metered zero times, and told that all is well."""
    ledger, fake, network = open_ledger(tmp_path / "ledger.db"), a_worker(), FakeNetwork()
    for _ in range(300):
        put(fake, gpu_ns=1)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    target, collector = network.add("10.0.0.1", fake), Collector(ledger, network, inline, Clock(NOW_NS))
    with full_disk(ledger):
        assert not await collector.pull(fake.identity, target)
        assert "disk is full" in collector.counters.ledger_problem
        assert fake.acknowledgements == [] and fake.boot.acknowledged_seq == 0
    assert await collector.pull(fake.identity, target)
    assert collector.counters.ledger_problem == ""
    held = [(seq, digest) for _, seq, digest, *_ in ledger.bodies(fake.identity.worker_uid)]
    assert held == [(seq, link.hash) for seq, link in enumerate(fake.boot.links, start=1)]


async def test_whoever_acknowledges_everything_with_the_service_s_token_is_noticed_and_the_hour_is_held(
    tmp_path: Path,
) -> None:
    ledger, fake, network = open_ledger(tmp_path / "ledger.db"), a_worker(), FakeNetwork()
    put(fake)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    fake.boot.trimmed = fake.boot.acknowledged_seq = len(fake.boot.links)
    assert not await Collector(ledger, network, inline, Clock(NOW_NS)).pull(
        fake.identity, network.add("10.0.0.1", fake)
    )
    ((reason, _, message),) = ledger.alarms()
    assert reason == "AcknowledgedAhead" and "were acknowledged and trimmed" in message
    assert ledger.not_gone()[0].settled_ns == 0, "its hour would be closed as if nothing was missing"


# ---- turns -----------------------------------------------------------------------------------------------------------


async def test_a_worker_with_a_huge_backlog_has_four_pages_a_turn_and_the_others_go_between(tmp_path: Path) -> None:
    ledger, network, order = open_ledger(tmp_path / "ledger.db"), FakeNetwork(page_limit=1), list[str]()
    late, others = a_worker(1), [a_worker(number) for number in range(2, 302)]
    for _ in range(10):
        put(late, gpu_ns=1)
    fleet = []
    for number, fake in enumerate([late, *others]):
        ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
        fleet.append((fake.identity, network.add(f"10.0.0.{number}", fake)))
        fake.acknowledge = lambda given, of=fake, was=fake.acknowledge: (order.append(of.identity.pod), was(given))  # type: ignore[method-assign]
    collector = Collector(ledger, network, inline, Clock(NOW_NS))
    collector.start_pulls(fleet)
    await collector.finish()
    assert len(late.boot.links) == late.boot.acknowledged_seq == 21
    of_late = [at for at, pod in enumerate(order) if pod == "smollm2-1"]
    assert all(fake.boot.acknowledged_seq for fake in others)
    assert of_late[PAGES_A_TURN] > 250, "it went on before the others had their first turn"


def test_a_silent_worker_is_asked_ever_less_often_and_at_once_when_its_pod_ends() -> None:
    turns, clock_ns, asked = Turns(), 0, 0
    fleet = [(worker(), None)]
    for _ in range(60):  # two minutes
        turns.offer(fleet, clock_ns)  # type: ignore[arg-type]
        if turns.next():
            asked += 1
            turns.ended("pod-uid-1", Outcome.SILENT, clock_ns)
        clock_ns += 2 * SECOND_NS
    assert 5 < asked < 12
    assert turns.silent["pod-uid-1"].since_ns == 0
    turns.offer(fleet, clock_ns - REST_MAX_NS + 1, urgent={"pod-uid-1"})  # type: ignore[arg-type]
    assert turns.next()
    turns.ended("pod-uid-1", Outcome.DONE, clock_ns)
    turns.offer(fleet, clock_ns)  # type: ignore[arg-type]
    assert turns.next(), "it answered, and rests no more"
    assert turns.silent == {}


async def test_room_is_lent_in_order_and_never_beyond_what_there_is() -> None:
    room, held, most, done = Room(10), 0, 0, list[int]()

    async def hold(number: int, size: int) -> None:
        nonlocal held, most
        async with room.of(size):
            held += min(size, 10)
            most = max(most, held)
            await asyncio.sleep(0)
            held -= min(size, 10)
            done.append(number)

    sizes = (4, 4, 4, 100, 1, 9)
    tasks = [asyncio.create_task(hold(number, size)) for number, size in enumerate(sizes)]
    await asyncio.sleep(0)
    tasks[2].cancel()  # one that waits goes away
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most <= 10 and done == [0, 1, 3, 4, 5]
    async with room.of(10):
        pass


async def test_what_comes_during_a_write_is_written_together_and_one_refusal_is_one_s_own() -> None:
    batches: list[list[int]] = []

    async def write(items):  # type: ignore[no-untyped-def]
        batches.append(list(items))
        await asyncio.sleep(0)
        return [ValueError(str(item)) if item == 3 else item * 10 for item in items]

    batch: Batch[int, int] = Batch(write, 4)
    found = await asyncio.gather(*(batch.put(number) for number in range(6)), return_exceptions=True)
    assert found[:3] == [0, 10, 20] and isinstance(found[3], ValueError) and found[4:] == [40, 50]
    assert batches == [[0, 1, 2, 3], [4, 5]]


async def test_no_more_writes_are_under_way_than_allowed_and_none_is_left_waiting() -> None:
    under_way, most = 0, 0

    async def write(items):  # type: ignore[no-untyped-def]
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        return items

    batch: Batch[int, int] = Batch(write, 3, 2)
    for _ in range(3):  # the writers end, and begin anew
        assert await asyncio.gather(*(batch.put(number) for number in range(20))) == list(range(20))
    assert most == 2 and under_way == 0


def test_a_turn_s_page_is_bounded_by_the_records_that_it_was_asked_for() -> None:
    assert page_bytes_max(20) < 200_000 < page_bytes_max(MAX_PAGE_RECORDS)
