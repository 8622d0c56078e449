"""Several collectors on one ledger: the workers are shared, one closes, one dies and the others take over, and whatever
they do at the same time, each record is in the ledger once."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest

from gpumeter_operator.adapters.ledger.engine import has_one_writer
from gpumeter_operator.adapters.ledger.members import Members
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.decide.shares import CLOCKS_NS, LIFE_NS, owner_of
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.collect import Collector
from gpumeter_operator.flow.share import Share
from gpumeter_usage.page import JournalStatus
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account
from rigs.databases import Database
from rigs.ledger import START_NS, Clock, FakeNetwork, FakeWorker, finals, inline, started, worker

T = TypeVar("T")
NOW_NS = START_NS + 50 * SECOND_NS


def test_only_the_workers_of_a_collector_that_left_change_hands() -> None:
    uids = [f"uid-{number}" for number in range(3000)]
    before = {uid: owner_of(uid, ["a", "b", "c"]) for uid in uids}
    after = {uid: owner_of(uid, ["a", "c"]) for uid in uids}
    assert all(after[uid] == owner for uid, owner in before.items() if owner != "b")
    assert all(900 < count < 1100 for count in Counter(before.values()).values())
    assert owner_of("uid-1", []) == ""


class Standing:
    """One collector's membership on a virtual clock; `lag_ns` is how far its process is behind (it may stall)."""

    def __init__(self, name: str, ledger: Ledger, clock: Clock, *, one_works: bool = False) -> None:
        members = Members(ledger, name, name, lambda _: clock())
        self.name = name
        self.share = Share(name, members, inline, clock, one_works=one_works)


@pytest.mark.parametrize("seed", range(3))
async def test_never_do_two_lead_whoever_stalls_dies_or_comes_back(seed: int, database: Database) -> None:
    random_, clock, ledger = random.Random(seed), Clock(), Ledger(database.url)
    standings = [Standing(name, ledger, clock) for name in "abc"]
    led: Counter[str] = Counter()
    stalled_until_ns = dict.fromkeys("abc", 0)
    alone_ns = 0
    for _ in range(400):
        clock.now_ns += random_.randrange(SECOND_NS)
        for standing in random_.sample(standings, 3):
            if clock() < stalled_until_ns[standing.name] or random_.random() < 0.3:
                continue
            if random_.random() < 0.02:
                stalled_until_ns[standing.name] = clock() + random_.randrange(30) * SECOND_NS
                continue
            await standing.share.beat()
        leaders = [standing.name for standing in standings if standing.share.leads]
        assert len(leaders) <= 1
        led.update(leaders)
        alone_ns = 0 if leaders or min(stalled_until_ns.values()) > clock() else alone_ns + 1
        assert alone_ns < 60, "nobody leads"
    assert len(led) > 1, "nobody ever took over; give it another seed"
    ledger.close()


async def test_a_collector_that_ends_in_order_is_replaced_at_the_next_beat(database: Database) -> None:
    clock, ledger = Clock(), Ledger(database.url)
    first, second = Standing("a", ledger, clock), Standing("b", ledger, clock)
    for standing in (first, second):
        clock.now_ns += 1_000_000
        await standing.share.beat()
    assert first.share.leads and not second.share.leads
    await first.share.leave()
    await second.share.beat()
    assert second.share.leads and second.share.mine("anybody")
    ledger.close()


async def test_where_one_writes_the_second_collector_stands_by_and_says_for_whom(database: Database) -> None:
    clock, ledger = Clock(), Ledger(database.url)
    assert has_one_writer(ledger.engine) is (database.kind == "sqlite")
    first, second = (Standing(name, ledger, clock, one_works=True) for name in ("gpumeter-collector-1", "late"))
    for standing in (first, second):
        clock.now_ns += 1_000_000
        await standing.share.beat()
    assert first.share.works and first.share.mine("uid") and first.share.stands_by() is None
    assert not second.share.works and not second.share.mine("uid")
    assert "gpumeter-collector-1 works on this ledger" in (second.share.stands_by() or "")
    clock.now_ns += LIFE_NS + SECOND_NS  # the first was killed
    await second.share.beat()
    assert second.share.works and second.share.mine("uid") and second.share.stands_by() is None
    assert not first.share.works, "it has not noticed yet that it was given up, and must not go on"
    ledger.close()


async def test_a_collector_that_starts_anew_in_its_pod_does_not_wait_for_its_former_life(database: Database) -> None:
    clock, ledger = Clock(), Ledger(database.url)
    lives = [
        Share(
            f"pod-{number}", Members(ledger, f"pod-{number}", "pod", lambda _: clock()), inline, clock, one_works=True
        )
        for number in (1, 2)
    ]
    await lives[0].beat()
    clock.now_ns += SECOND_NS  # killed, and started again at once
    await lives[1].beat()
    assert lives[1].works and len(lives[1].members) == 1
    ledger.close()


async def test_a_collector_whose_clock_is_an_hour_behind_leaves_the_work_to_the_others(database: Database) -> None:
    clock, ledger = Clock(), Ledger(database.url)
    off_ns = -CLOCKS_NS - SECOND_NS
    behind = Share(
        "behind", Members(ledger, "behind", "behind", lambda _: clock(), lambda: clock() + off_ns), inline, clock
    )
    right = Share("right", Members(ledger, "right", "right", lambda _: clock(), clock), inline, clock)
    await behind.beat()
    assert behind.leads and behind.stands_by() is None, "alone, it goes on: its facts are in order by its own clock"
    clock.now_ns += SECOND_NS
    await right.beat()
    assert right.works and not right.leads
    for share in (behind, right):
        clock.now_ns += SECOND_NS
        await share.beat()
    assert right.leads and right.mine("uid") and len(right.members) == 1
    assert not behind.works and not behind.mine("uid") and not behind.leads
    assert "Set the node's clock by NTP" in (behind.stands_by() or "")
    off_ns = CLOCKS_NS
    await behind.beat()
    assert behind.works and not behind.leads and behind.stands_by() is None
    ledger.close()


class Post:
    """A collector with its share of a fleet, on its own connections and threads."""

    def __init__(self, name: str, database: Database, network: FakeNetwork, clock: Clock) -> None:
        self.ledger = Ledger(database.url)
        self.threads = ThreadPoolExecutor(4)
        self.standing = Standing(name, self.ledger, clock)
        self.collector = Collector(self.ledger, network, self.execute, clock)

    async def execute(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, call)

    async def round(self, fleet: list[tuple[Worker, Target]], *, all_of_it: bool = False) -> None:
        await self.standing.share.beat()
        mine = [each for each in fleet if all_of_it or self.standing.share.mine(each[0].worker_uid)]
        self.collector.start_pulls(mine)
        await self.collector.finish()

    def close(self) -> None:
        self.threads.shutdown()
        self.ledger.close()


@contextmanager
def posts(database: Database, network: FakeNetwork, clock: Clock, *names: str) -> Iterator[list[Post]]:
    ledger = Ledger(database.url)
    ledger.set_granularity(Granularity.MINUTE, START_NS)
    ledger.close()
    opened = [Post(name, database, network, clock) for name in names]
    try:
        yield opened
    finally:
        for post in opened:
            post.close()


def a_fleet(post: Post, network: FakeNetwork, count: int) -> tuple[list[FakeWorker], list[tuple[Worker, Target]]]:
    fakes, fleet = [], []
    for number in range(count):
        fake = FakeWorker(worker(number), START_NS)
        fake.spend(Account.LOAD, START_NS + 10 * SECOND_NS)
        fake.serve(f"s-{number}", "acme", START_NS + 30 * SECOND_NS)
        post.ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
        fakes.append(fake)
        fleet.append((fake.identity, network.add(f"10.0.0.{number}", fake)))
    return fakes, fleet


def assert_each_record_once(ledger: Ledger, fakes: list[FakeWorker]) -> None:
    for fake in fakes:
        held = [(boot, seq, digest) for boot, seq, digest, *_ in ledger.bodies(fake.identity.worker_uid)]
        journal = [
            (boot.boot_id, seq, link.hash) for boot in fake.boots for seq, link in enumerate(boot.links, start=1)
        ]
        assert held == sorted(journal)
        assert fake.boot.acknowledged_seq == len(fake.boot.links)


async def test_collectors_share_the_workers_and_one_that_dies_is_taken_over_from(database: Database) -> None:
    network, clock = FakeNetwork(page_limit=2), Clock(NOW_NS)
    with posts(database, network, clock, "a", "b", "c") as (first, second, third):
        fakes, fleet = a_fleet(first, network, 24)
        for post in (first, second, third):
            await post.standing.share.beat()
        for post in (first, second, third):
            await post.round(fleet)
        assert all(post.collector.counters.records for post in (first, second, third)), "somebody had no share"
        assert_each_record_once(first.ledger, fakes)
        pulls = second.collector.counters.pages + third.collector.counters.pages

        for fake in fakes:  # the first dies here; what its workers do from now on waits
            fake.spend(Account.IDLE, START_NS + 45 * SECOND_NS)
        for _ in range(int(LIFE_NS // (2 * SECOND_NS)) + 1):
            clock.now_ns += 2 * SECOND_NS
            for post in (second, third):
                await post.round(fleet)
        assert_each_record_once(second.ledger, fakes)
        assert second.collector.counters.pages + third.collector.counters.pages - pulls >= len(fakes)
        assert first.collector.counters.alarms == second.collector.counters.alarms == {}


async def test_collectors_that_pull_the_same_workers_at_the_same_time_double_nothing(database: Database) -> None:
    """As they do for a moment whenever one comes or goes: each believes that all workers are its own."""
    network, clock = FakeNetwork(page_limit=1), Clock(NOW_NS)
    with posts(database, network, clock, "a", "b") as both:
        fakes, fleet = a_fleet(both[0], network, 6)
        await asyncio.gather(*(post.round(fleet, all_of_it=True) for post in both))
        await both[0].round(fleet, all_of_it=True)
        assert_each_record_once(both[0].ledger, fakes)
        assert both[0].ledger.alarms() == []
        inserted = sum(post.collector.counters.records for post in both)
        assert inserted == sum(len(fake.boot.links) for fake in fakes)


def grew(fake: FakeWorker) -> None:
    fake.spend(Account.IDLE, START_NS + 40 * SECOND_NS)


def started_anew(fake: FakeWorker) -> None:
    fake.restart("boot-2", START_NS + 35 * SECOND_NS)
    fake.spend(Account.LOAD, START_NS + 40 * SECOND_NS)


def drained(fake: FakeWorker) -> None:
    started_anew(fake)
    fake.seal()


@pytest.mark.parametrize("change", [grew, started_anew, drained])
async def test_a_collector_that_another_one_overtakes_takes_its_work_for_no_fault_of_the_worker(
    change: Callable[[FakeWorker], None], database: Database
) -> None:
    network, clock = FakeNetwork(page_limit=2), Clock(NOW_NS)
    with posts(database, network, clock, "slow", "fast") as (slow, fast):
        fakes, ((of, target),) = a_fleet(slow, network, 1)

        class Overtaken(FakeNetwork):
            overtaken = 0

            async def status(self, target: Target) -> JournalStatus:
                status = network.workers[target.host].status()
                if not self.overtaken:
                    self.overtaken = 1
                    change(fakes[0])
                    assert await fast.collector.pull(of, target)
                return status

        behind = Overtaken(page_limit=2)
        behind.workers = network.workers
        for _ in range(2):
            assert await Collector(slow.ledger, behind, slow.execute, clock).pull(of, target)
            behind.overtaken = 0 if not behind.overtaken else 2
        assert slow.ledger.alarms() == []
        assert_each_record_once(slow.ledger, fakes)


async def test_two_that_close_at_the_same_time_make_one_bill(database: Database) -> None:
    """The rule lets one close; should it ever fail, the ledger still keeps one Final report of each period."""
    network, clock = FakeNetwork(), Clock(NOW_NS)
    with posts(database, network, clock, "a", "b") as both:
        fakes, fleet = a_fleet(both[0], network, 2)
        for fake in fakes:
            fake.spend(Account.IDLE, START_NS + 70 * SECOND_NS)
        clock.now_ns = START_NS + 75 * SECOND_NS
        await both[0].round(fleet, all_of_it=True)
        later_ns = START_NS + 80 * SECOND_NS
        closers = [Closer(post.ledger, 10 * MINUTE_NS) for post in both]
        await asyncio.gather(
            *(
                post.execute(lambda closer=one: closer.close_all(Pricing({}, {}), later_ns))
                for post, one in zip(both, closers, strict=True)
            )
        )
        bill = finals(both[0].ledger)
        assert {tenant for _, tenant in bill} == {"acme", "_platform"}
        accounts = both[0].ledger.pod_accounts(fakes[0].identity.worker_uid)
        assert [end_ns for end_ns, _ in accounts] == [START_NS + MINUTE_NS]
