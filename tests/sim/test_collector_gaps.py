"""Records that nobody has any more: told as a gap, billed to nobody, and the chain goes on behind them."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.billing.facts import Gap
from gpumeter_operator.billing.gaps import MAX_GAPS
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.digests import Digester
from gpumeter_usage.page import JournalStatus
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import Account
from rigs.audited import DIGESTED_NS, audited, found_by_script, key
from rigs.databases import Database
from rigs.ledger import (
    START_NS,
    Crash,
    CrashAt,
    FakeNetwork,
    FakeWorker,
    ended,
    finals,
    gone,
    inline,
    started,
    worker,
)
from rigs.pulled import Pulled

SERVICE = ("team-a", "smollm2")
NOW_NS = START_NS + 10 * MINUTE_NS
GRACE_NS = 5 * MINUTE_NS


def second(number: int) -> int:
    return START_NS + number * SECOND_NS


def a_worker(until: int = 0) -> FakeWorker:
    """A worker that serves a second and idles a second, in turns."""
    fake = FakeWorker(worker(), START_NS)
    work(fake, until)
    return fake


def work(fake: FakeWorker, until: int) -> None:
    while fake.frontier_ns < second(until):
        at = (fake.frontier_ns - START_NS) // SECOND_NS
        fake.serve(f"s-{at:032x}", "acme", second(at + 1))
        fake.spend(Account.IDLE, second(at + 2))


async def pull(ledger: Ledger, fake: FakeWorker) -> bool:
    return await Pulled(ledger, fake, NOW_NS).pull()


async def a_ledger_that_missed(url: str | Path, *, after: int, until: int) -> tuple[Ledger, FakeWorker]:
    """A ledger that has a worker's first `after` seconds; what came up to `until` was acknowledged to another."""
    one = Pulled(url, a_worker(after), NOW_NS)
    one.observe(started("c", START_NS))
    if one.fake.boot.links:
        assert await one.pull()
    work(one.fake, until)
    acknowledge_all(one.fake)
    return one.ledger, one.fake


def acknowledge_all(fake: FakeWorker) -> None:
    fake.boot.acknowledged_seq = fake.boot.trimmed = len(fake.boot.links)


def gaps(ledger: Ledger) -> tuple[Gap, ...]:
    (pod,) = ledger.pods(*SERVICE, 0)
    return pod.gaps


async def test_what_is_gone_is_unaccounted_in_its_periods_and_the_chain_goes_on_behind_it(database: Database) -> None:
    ledger, fake = await a_ledger_that_missed(database.url, after=30, until=80)
    ours, theirs = ledger.boots("pod-uid-1")[0].committed_seq, fake.boot.acknowledged_seq
    work(fake, 180)
    fake.seal()
    assert await pull(ledger, fake), "it would be refused until its pod starts anew"
    assert fake.boot.acknowledged_seq == len(fake.boot.links)
    (gap,) = gaps(ledger)
    assert (gap.first_seq, gap.last_seq) == (ours + 1, theirs)
    assert gap.last_hash == fake.boot.links[theirs - 1].hash
    assert (gap.after_ns, gap.until_ns) == (second(30), second(81))
    assert [alarm[0] for alarm in ledger.alarms()] == ["AcknowledgedAhead"]
    held = [row[1] for row in ledger.bodies("pod-uid-1")]
    assert held == [*range(1, ours + 1), *range(theirs + 1, len(fake.boot.links) + 1)]

    ledger.observe(fake.identity, [ended("c", second(180)), gone(NOW_NS)], NOW_NS)
    closer = Closer(ledger, GRACE_NS)
    waiting = closer.close_all(Pricing({}, {}), START_NS + 4 * MINUTE_NS)
    first = next(each for each in waiting if each["spec"]["period"]["start"].endswith("10:00:00Z"))
    assert first["status"]["phase"] == "Closing", "a gap holds its hour"
    closer.close_all(Pricing({}, {}), NOW_NS)
    platform = {end: report["status"] for (end, tenant), report in finals(ledger).items() if tenant == "_platform"}
    seen = []
    for minute, lost_s in ((1, 30), (2, 20), (3, 0)):
        status = platform[START_NS + minute * MINUTE_NS]
        complete = next(each for each in status["conditions"] if each["type"] == "Complete")
        seen.append((complete["status"], complete["reason"]))
        assert status["accounts"]["unaccounted"] == str(lost_s * SECOND_NS)
        if lost_s:
            (missing,) = status["completeness"]["missing"]
            assert (missing["first"], missing["last"], missing["bootId"]) == (ours + 1, theirs, "boot-1")
            assert "billed to nobody" in missing["message"]
    assert seen == [("False", "SequenceGap"), ("False", "SequenceGap"), ("True", "AllRecordsCommitted")]
    assert audit(ledger, SERVICE) == []
    await Digester(ledger, inline, key(), None).run(DIGESTED_NS)
    assert audited(ledger) == [], "a gap is a fact, and no difference"
    ledger.close()


async def test_a_boot_whose_whole_beginning_is_gone_goes_on(tmp_path: Path) -> None:
    ledger, fake = await a_ledger_that_missed(tmp_path / "ledger.db", after=0, until=40)
    work(fake, 60)
    assert await pull(ledger, fake)
    (gap,) = gaps(ledger)
    assert (gap.first_seq, gap.after_ns) == (1, 0)
    assert ledger.boots("pod-uid-1")[0].started_ns == second(40)
    assert audit(ledger, SERVICE) == []


async def test_as_long_as_nothing_follows_what_is_gone_the_worker_is_not_settled(tmp_path: Path) -> None:
    ledger, fake = await a_ledger_that_missed(tmp_path / "ledger.db", after=30, until=70)
    assert not await pull(ledger, fake)
    (pod,) = ledger.pods(*SERVICE, 0)
    assert pod.settled_ns == second(30) and pod.gaps == (), "its minute would be closed as if nothing was missing"
    assert "as soon as there is a record after them" in pod.problem
    work(fake, 72)
    assert await pull(ledger, fake)
    assert [(gap.first_seq, gap.last_seq) for gap in gaps(ledger)] == [(46, 105)]


async def test_a_worker_that_does_not_tell_what_its_chain_goes_on_from_stays_refused(tmp_path: Path) -> None:
    ledger, fake = await a_ledger_that_missed(tmp_path / "ledger.db", after=30, until=40)
    work(fake, 60)
    fake.tells_acknowledged = False
    assert not await pull(ledger, fake)
    (pod,) = ledger.pods(*SERVICE, 0)
    assert pod.gaps == () and "restart the pod" in pod.problem


async def test_a_record_that_does_not_follow_the_hash_that_was_told_is_refused(tmp_path: Path) -> None:
    ledger, fake = await a_ledger_that_missed(tmp_path / "ledger.db", after=30, until=40)
    work(fake, 60)
    at = fake.boot.acknowledged_seq - 1
    fake.boot.links[at] = fake.boot.links[at]._replace(hash="f" * 64)
    assert not await pull(ledger, fake)
    assert gaps(ledger) == () and "ChainBroken" in {alarm[0] for alarm in ledger.alarms()}


async def test_another_record_under_a_key_that_the_ledger_has_is_a_fork_and_no_gap(tmp_path: Path) -> None:
    ledger, fake = await a_ledger_that_missed(tmp_path / "ledger.db", after=30, until=30)
    work(fake, 40)

    class Forked(FakeNetwork):
        async def status(self, target: Target) -> JournalStatus:
            status = await super().status(target)
            return replace(status, boots=tuple(replace(boot, acknowledged_hash="f" * 64) for boot in status.boots))

    before = len(list(ledger.bodies("pod-uid-1")))
    assert not await Pulled(ledger, fake, NOW_NS, Forked()).pull()
    assert [alarm[0] for alarm in ledger.alarms()] == ["ChainForked"]
    assert gaps(ledger) == () and len(list(ledger.bodies("pod-uid-1"))) == before


async def test_whoever_acknowledges_in_the_collector_s_place_again_and_again_stops_the_service(tmp_path: Path) -> None:
    ledger, fake = await a_ledger_that_missed(tmp_path / "ledger.db", after=2, until=4)
    for number in range(MAX_GAPS):
        work(fake, 6 + 4 * number)
        assert await pull(ledger, fake)
        work(fake, 8 + 4 * number)
        acknowledge_all(fake)
    work(fake, 60)
    assert not await pull(ledger, fake), "what is used would never be billed"
    assert len(gaps(ledger)) == MAX_GAPS
    (pod,) = ledger.pods(*SERVICE, 0)
    assert "usage token" in pod.problem and "restart the pod" in pod.problem


@pytest.mark.parametrize("cut", [1, 2], ids=["after a slice", "between flushes"])
async def test_a_gap_that_cuts_a_flush_in_two_is_told_and_no_fault_of_the_ledger(tmp_path: Path, cut: int) -> None:
    ledger, fake = await a_ledger_that_missed(tmp_path / "ledger.db", after=30, until=40)
    work(fake, 60)
    fake.boot.acknowledged_seq = fake.boot.trimmed = fake.boot.acknowledged_seq + cut
    fake.seal()
    assert await pull(ledger, fake)
    ledger.observe(fake.identity, [ended("c", second(60)), gone(NOW_NS)], NOW_NS)
    Closer(ledger, GRACE_NS).close_all(Pricing({}, {}), NOW_NS)
    conditions = finals(ledger)[START_NS + MINUTE_NS, "_platform"]["status"]["conditions"]
    assert "SlicesDisagree" in {each["reason"] for each in conditions} or cut == 2
    assert audit(ledger, SERVICE) == []
    assert found_by_script(tmp_path / "ledger.db") == []


async def test_a_crash_before_any_statement_leaves_a_gap_and_what_follows_it_or_neither(tmp_path: Path) -> None:
    at, happened = 1, True
    while happened:
        ledger, fake = await a_ledger_that_missed(tmp_path / f"ledger-{at}.db", after=6, until=10)
        work(fake, 14)
        ours = ledger.boots("pod-uid-1")[0].committed_seq
        crash = CrashAt(at)
        crash.watch(ledger)
        with suppress(Crash):
            await pull(ledger, fake)
        happened = crash.happened
        crash.at = 0
        cursor = ledger.boots("pod-uid-1")[0].committed_seq
        assert (cursor > ours) == bool(gaps(ledger)), f"killed before statement {at}"
        assert await pull(ledger, fake)
        assert [(gap.first_seq, gap.last_seq) for gap in gaps(ledger)] == [(ours + 1, ours + 6)]
        assert audit(ledger, SERVICE) == []
        ledger.close()
        at += 1
    assert at > 10, "the kill never met a statement"
