"""Workers that misbehave, over real HTTP: each is an alarm with a sentence, and nobody else is hurt."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from aiohttp import web

from gpumeter_operator.adapters.workers import Target, Workers, WorkerSilent
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.decide.names import DEVELOPMENT_ANNOTATION
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.collect import Collector
from gpumeter_operator.flow.discover import NotAWorker, events_of, events_of_removed, worker_of
from gpumeter_operator.flow.rounds import CollectRound
from gpumeter_usage.page import MAX_PAGE_BYTES, JournalStatus, Page, encode_page
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, rfc3339
from gpumeter_usage.record import Account
from rigs.ledger import (
    START_NS,
    TOKEN,
    Clock,
    FakeWorker,
    ended,
    finals,
    gone,
    inline,
    open_ledger,
    pod_manifest,
    service_manifest,
    started,
    worker,
)
from rigs.usageport import listening, told_by

Answer = Callable[[Page], web.StreamResponse]
NOW_NS = START_NS + 50 * SECOND_NS


def honest(page: Page) -> web.Response:
    return web.Response(body=encode_page(page))


@asynccontextmanager
async def serving(fake: FakeWorker, answer: Answer = honest, token: str = TOKEN) -> AsyncIterator[Target]:
    """A worker's port on a free port of this machine; `answer` makes the response out of the true page."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {token}":
            return web.Response(status=401, text="the token is not this worker's")
        return await told_by(fake, request, answer)

    async with listening(handle, TOKEN) as target:
        yield target


async def nowhere(_namespace: str, _name: str) -> None:
    """The API server knows no pod of this name."""


def a_worker(number: int) -> FakeWorker:
    fake = FakeWorker(worker(number), START_NS)
    fake.spend(Account.LOAD, START_NS + 10 * SECOND_NS)
    fake.serve(f"s-{number}", "acme", START_NS + 30 * SECOND_NS)
    return fake


def cut_short(page: Page) -> web.Response:
    return web.Response(body=encode_page(page)[:-20])


def too_large(_: Page) -> web.Response:
    return web.Response(body=b" " * (MAX_PAGE_BYTES + 1))


def of_another_service(page: Page) -> web.Response:
    return honest(replace(page, service="team-b/other"))


def of_another_worker(page: Page) -> web.Response:
    return honest(replace(page, worker_uid="pod-uid-7"))


def of_another_boot(page: Page) -> web.Response:
    return honest(replace(page, boot_id="boot-7"))


def with_a_gap(page: Page) -> web.Response:
    return honest(replace(page, after=page.after + 1, links=page.links[1:]))


def empty(page: Page) -> web.Response:
    return honest(replace(page, links=()))


def reordered(page: Page) -> web.Response:
    return honest(replace(page, links=page.links[::-1]))


def broken(_: Page) -> web.Response:
    return web.Response(status=500, text="the journal is damaged")


def elsewhere(_: Page) -> web.Response:
    return web.Response(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data"})


@pytest.mark.parametrize(
    ("answer", "reason", "told"),
    [
        (cut_short, "PageInvalid", "cut short"),
        (too_large, "WorkerRefuses", "larger than"),
        (of_another_service, "ForeignService", "it speaks for the service team-b/other"),
        (of_another_worker, "ForeignWorker", "it speaks for the worker pod-uid-7"),
        (of_another_boot, "ForeignBoot", "boot-7 was sent"),
        (with_a_gap, "SequenceGap", "records 1 to 1 are missing"),
        (empty, "NothingNew", "nothing after seq 0 was sent"),
        (reordered, "ChainBroken", "the chain requires"),
        (broken, "WorkerRefuses", "answered with 500: the journal is damaged"),
        (elsewhere, "WorkerRefuses", "answered with 302"),
    ],
)
async def test_a_worker_that_misbehaves_is_an_alarm_and_hurts_nobody_else(
    answer: Answer, reason: str, told: str, tmp_path: Path
) -> None:
    ledger, workers = open_ledger(tmp_path / "ledger.db"), Workers()
    bad, good = a_worker(1), a_worker(2)
    for fake in (bad, good):
        ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    collector = Collector(ledger, workers, inline, Clock(NOW_NS))
    async with serving(bad, answer) as to_bad, serving(good) as to_good:
        for _ in range(2):  # the same trouble twice is one alarm
            collector.start_pulls([(bad.identity, to_bad), (good.identity, to_good)])
            await collector.finish()
    await workers.close()
    assert [alarm[:2] for alarm in ledger.alarms()] == [(reason, bad.identity.worker_uid)]
    assert told in ledger.alarms()[0][2]
    assert ledger.boots(bad.identity.worker_uid) == ()
    assert bad.acknowledgements == []
    assert ledger.boots(good.identity.worker_uid)[0].committed_seq == good.boot.acknowledged_seq == len(good.boot.links)
    held = next(pod for pod in ledger.pods("team-a", "smollm2", 0) if pod.worker == bad.identity)
    assert told in held.problem


async def test_a_fault_that_is_told_with_another_number_in_every_pull_is_one_alarm_of_each_boot(tmp_path: Path) -> None:
    ledger, workers, fake = open_ledger(tmp_path / "ledger.db"), Workers(), a_worker(1)
    fake.restart("boot-2", START_NS + 31 * SECOND_NS)
    fake.spend(Account.LOAD, START_NS + 40 * SECOND_NS)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    collector, asked = Collector(ledger, workers, inline, Clock(NOW_NS)), count(1)

    def damaged(_: Page) -> web.Response:
        return web.Response(status=500, text=f"seq {next(asked)} cannot be read")

    async with serving(fake, damaged) as target:
        for _ in range(3):
            assert not await collector.pull(fake.identity, target)
    await workers.close()
    assert [alarm[0] for alarm in ledger.alarms()] == ["WorkerRefuses", "WorkerRefuses"]
    assert collector.counters.alarms == {"WorkerRefuses": 6}


async def test_a_worker_with_anothers_token_is_not_believed(tmp_path: Path) -> None:
    ledger, workers, fake = open_ledger(tmp_path / "ledger.db"), Workers(), a_worker(1)
    async with serving(fake, token="another's") as target:
        assert not await Collector(ledger, workers, inline, Clock(NOW_NS)).pull(fake.identity, target)
    await workers.close()
    assert "answered with 401" in ledger.alarms()[0][2]


async def test_a_worker_that_is_not_there_is_waited_for_without_an_alarm(tmp_path: Path) -> None:
    ledger, workers, fake = open_ledger(tmp_path / "ledger.db"), Workers(), a_worker(1)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    async with serving(fake) as target:
        pass
    assert not await Collector(ledger, workers, inline, Clock(NOW_NS)).pull(fake.identity, target)
    await workers.close()
    assert ledger.alarms() == []
    assert "cannot be reached" in ledger.pods("team-a", "smollm2", 0)[0].problem


async def test_a_slow_worker_delays_only_itself(tmp_path: Path) -> None:
    ledger, fast, clock = open_ledger(tmp_path / "ledger.db"), a_worker(1), Clock(NOW_NS)
    slow, released = a_worker(2), asyncio.Event()

    class Slow(Workers):
        async def status(self, target: Target):  # type: ignore[no-untyped-def]
            if target == to_slow:
                await released.wait()
            return await super().status(target)

    workers = Slow()
    collector = Collector(ledger, workers, inline, clock)
    async with serving(fast) as to_fast, serving(slow) as to_slow:
        fleet = [(slow.identity, to_slow), (fast.identity, to_fast)]
        for size in (4, 6):
            fast.spend(Account.IDLE, fast.frontier_ns + SECOND_NS)
            fast.spend(Account.IDLE, fast.frontier_ns + SECOND_NS)
            async with asyncio.timeout(10):
                while fast.boot.acknowledged_seq < len(fast.boot.links):
                    collector.start_pulls(fleet)
                    await asyncio.sleep(0)
            assert fast.boot.acknowledged_seq >= size
        assert slow.acknowledgements == []
        released.set()
        await collector.finish()
        assert slow.boot.acknowledged_seq == len(slow.boot.links)
    await workers.close()


async def test_pods_that_went_while_nobody_watched_accrue_nothing_more(tmp_path: Path) -> None:
    ledger, fake = open_ledger(tmp_path / "ledger.db"), a_worker(1)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0), NOW_NS)
    ledger.settle(fake.identity.worker_uid, fake.frontier_ns)
    later_ns = START_NS + 10 * MINUTE_NS
    collector = Collector(ledger, Workers(), inline, Clock(later_ns))
    await CollectRound(ledger, collector, inline, pods=dict, services=dict, lookup=nowhere).recover(later_ns)
    Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), later_ns)
    bill = finals(ledger)
    assert {end for end, _ in bill} == {START_NS + MINUTE_NS}, "a pod that is gone has no further periods"
    status = bill[START_NS + MINUTE_NS, PLATFORM]["status"]
    assert (status["accounts"]["allocated"], status["accounts"]["unaccounted"]) == (str(30 * SECOND_NS), "0")
    assert status["completeness"]["missing"][0]["reason"] == "SealMissing"


async def test_a_pod_that_went_unseen_takes_nothing_back_from_the_final_periods_that_saw_it_run(tmp_path: Path) -> None:
    """Its worker fell silent at 30 s; the pod stood until the first minute was closed without it, and was gone then."""
    ledger, fake = open_ledger(tmp_path / "ledger.db"), a_worker(1)
    ledger.observe(fake.identity, [started("c", START_NS)], NOW_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0), NOW_NS)
    ledger.settle(fake.identity.worker_uid, fake.frontier_ns)
    closer = Closer(ledger, MINUTE_NS)
    closer.close_all(Pricing({}, {}), START_NS + 2 * MINUTE_NS + SECOND_NS)
    later_ns = START_NS + 10 * MINUTE_NS
    collector = Collector(ledger, Workers(), inline, Clock(later_ns))
    await CollectRound(ledger, collector, inline, pods=dict, services=dict, lookup=nowhere).recover(later_ns)
    closer.close_all(Pricing({}, {}), later_ns)
    pod = ledger.pods("team-a", "smollm2", 0)[0]
    assert (pod.gone, pod.spans[0].ended_ns, pod.spans[0].end_known) == (True, START_NS + MINUTE_NS, False)
    assert ledger.adjustments("team-a", "smollm2") == []
    rows = ledger.pod_accounts(fake.identity.worker_uid)
    assert [(end, accounts.allocated) for end, accounts in rows] == [(START_NS + MINUTE_NS, MINUTE_NS)]


async def test_of_two_lives_of_a_pod_that_went_unseen_the_first_ended_when_the_second_began(tmp_path: Path) -> None:
    """An earlier version kept no end of the first; the upgrade found the pod gone."""
    ledger, fake = open_ledger(tmp_path / "ledger.db"), a_worker(1)
    next_ns = START_NS + 20 * SECOND_NS
    ledger.observe(fake.identity, [started("c1", START_NS), started("c2", next_ns)], NOW_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0), NOW_NS)
    ledger.settle(fake.identity.worker_uid, fake.frontier_ns)
    later_ns = START_NS + 10 * MINUTE_NS
    collector = Collector(ledger, Workers(), inline, Clock(later_ns))
    await CollectRound(ledger, collector, inline, pods=dict, services=dict, lookup=nowhere).recover(later_ns)
    [pod] = ledger.pods("team-a", "smollm2", 0)
    assert (pod.gone, [span.ended_ns for span in pod.spans]) == (True, [next_ns, fake.frontier_ns])
    Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), later_ns)
    [(_, accounts)] = ledger.pod_accounts(fake.identity.worker_uid)
    assert accounts.allocated == 30 * SECOND_NS, "and not the ten seconds of both twice"


class Asked(Workers):
    """Nobody answers; keeps who was sent a token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens_by_host: dict[str, str] = {}

    async def status(self, target: Target) -> JournalStatus:
        self.tokens_by_host[target.host] = target.token
        raise WorkerSilent("It does not answer.")


async def test_a_notebook_is_sent_no_token_and_its_time_is_allocated_and_unaccounted(tmp_path: Path) -> None:
    ledger, workers = open_ledger(tmp_path / "ledger.db"), Asked()
    notebook, at_work = worker(1), worker(2)
    services = {("team-a", "smollm2"): service_manifest(notebook)}
    pods = {
        ("team-a", of.pod): pod_manifest(of, f"10.0.0.{number}", (f"c-{number}", START_NS, None))
        for number, of in ((1, notebook), (2, at_work))
    }
    pods["team-a", notebook.pod]["metadata"]["annotations"][DEVELOPMENT_ANNOTATION] = "true"
    collector = Collector(ledger, workers, inline, Clock(NOW_NS))
    round_ = CollectRound(ledger, collector, inline, pods=lambda: pods, services=lambda: services, lookup=nowhere)
    for _ in range(2):  # also once it is known
        await round_.run(lambda _: TOKEN, NOW_NS)
        await collector.finish()
    await workers.close()
    assert workers.tokens_by_host == {"10.0.0.2": TOKEN}
    Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), START_NS + 2 * MINUTE_NS + SECOND_NS)
    [(_, accounts)] = ledger.pod_accounts(notebook.worker_uid)
    assert (accounts.allocated, accounts.unaccounted) == (MINUTE_NS, MINUTE_NS)


async def test_the_last_state_of_a_removed_pod_is_kept(tmp_path: Path) -> None:
    ledger, fake = open_ledger(tmp_path / "ledger.db"), a_worker(1)
    of, services = fake.identity, {("team-a", "smollm2"): service_manifest(fake.identity)}
    pods = {("team-a", of.pod): pod_manifest(of, "10.0.0.1", ("c", START_NS, None))}
    collector = Collector(ledger, Workers(), inline, Clock(NOW_NS))
    round_ = CollectRound(ledger, collector, inline, pods=lambda: pods, services=lambda: services, lookup=nowhere)
    await round_.run(lambda _: TOKEN, NOW_NS)
    await collector.finish()
    pods.clear()
    round_.removed(pod_manifest(of, "10.0.0.1", ("c", START_NS, START_NS + 45 * SECOND_NS)), NOW_NS)
    await round_.run(lambda _: TOKEN, NOW_NS)
    pod = ledger.pods("team-a", "smollm2", 0)[0]
    assert (pod.gone, pod.spans[0].ended_ns, pod.spans[0].end_known) == (True, START_NS + 45 * SECOND_NS, True)


def test_a_pod_is_a_worker_only_of_a_service_that_exists_in_its_own_namespace() -> None:
    of = worker()
    pod, services = pod_manifest(of, "10.0.0.1"), {("team-a", "smollm2"): service_manifest(of)}
    assert worker_of(pod, services) == of
    elsewhere_ = worker_of(pod, {("team-b", "smollm2"): service_manifest(of)})
    assert isinstance(elsewhere_, NotAWorker) and "does not exist in its namespace" in elsewhere_.message
    other = service_manifest(replace(of, service_uid="another"))
    replaced = worker_of(pod, {("team-a", "smollm2"): other})
    assert isinstance(replaced, NotAWorker) and replaced.reason == "ServiceReplaced"
    pod["metadata"]["annotations"]["gpumeter.io/devices"] = "-1"
    invalid = worker_of(pod, services)
    assert isinstance(invalid, NotAWorker) and "must be a number from 1" in invalid.message


def test_a_restarted_container_is_two_spans_and_one_that_nobody_saw_end_has_vanished() -> None:
    of = worker()
    restarted = pod_manifest(of, "", ("c1", START_NS, START_NS + SECOND_NS), ("c2", START_NS + 2 * SECOND_NS, None))
    assert events_of(restarted, NOW_NS) == (
        started("c1", START_NS),
        ended("c1", START_NS + SECOND_NS),
        started("c2", START_NS + 2 * SECOND_NS),
    )
    assert [event.event for event in events_of_removed(restarted, NOW_NS)][-2:] == ["vanished", "gone"]
    unknown = {"name": "main", "state": {"terminated": {"containerID": "c1", "startedAt": None, "finishedAt": None}}}
    restarted["status"] = {"phase": "Failed", "containerStatuses": [unknown]}
    assert [(event.event, event.at_ns) for event in events_of(restarted, NOW_NS)] == [
        ("vanished", NOW_NS),
        ("gone", NOW_NS),
    ]
    assert gone(NOW_NS) in events_of(restarted, NOW_NS)


def test_a_container_that_nobody_saw_end_was_over_when_the_next_one_of_its_pod_started() -> None:
    """Its node came back: the runtime does not know when it died, the collector looks only later."""
    next_ns = START_NS + 20 * SECOND_NS
    pod = pod_manifest(worker(), "10.0.0.1", ("c1", START_NS, None), ("c2", next_ns, None))
    [container] = pod["status"]["containerStatuses"]
    container["lastState"] = {"terminated": {"containerID": "c1", "startedAt": rfc3339(START_NS), "finishedAt": None}}
    assert [(event.container_id, event.event, event.at_ns) for event in events_of(pod, NOW_NS)] == [
        ("c1", "started", START_NS),
        ("c1", "vanished", next_ns),
        ("c2", "started", next_ns),
    ]


RAN_ON = {"exitCode": 0, "reason": "Completed"}
NO_TRACE = {"exitCode": 255, "reason": "Unknown"}
"""containerd of a container that died with its node: as its end it writes the time at which it was started again."""


@pytest.mark.parametrize("told", [RAN_ON, NO_TRACE], ids=["it ran on", "no trace of it"])
async def test_a_node_that_comes_back_corrects_when_its_container_ended_only_if_it_knows(
    tmp_path: Path, told: dict[str, object]
) -> None:
    """Heard last at 30 s, given up after minutes; ten minutes later the node is back."""
    ledger, fake = open_ledger(tmp_path / "ledger.db"), a_worker(1)
    of, services = fake.identity, {("team-a", "smollm2"): service_manifest(fake.identity)}
    ledger.observe(of, [started("c", START_NS)], NOW_NS)
    ledger.take(of, fake.page("boot-1", 0), NOW_NS)
    ledger.settle(of.worker_uid, fake.frontier_ns)
    pods = {("team-a", of.pod): pod_manifest(of, "", ("c", START_NS, None))}
    pods["team-a", of.pod]["metadata"]["deletionTimestamp"] = rfc3339(START_NS + MINUTE_NS)
    collector = Collector(ledger, Workers(), inline, Clock(NOW_NS))
    round_ = CollectRound(ledger, collector, inline, pods=lambda: pods, services=lambda: services, lookup=nowhere)
    await round_.run(lambda _: TOKEN, START_NS + 5 * MINUTE_NS)
    assert ledger.pods("team-a", "smollm2", 0)[0].spans[0].ended_ns == fake.frontier_ns
    back_ns = START_NS + 10 * MINUTE_NS
    pods["team-a", of.pod] = pod_manifest(of, "", ("c", START_NS, back_ns))
    [container] = pods["team-a", of.pod]["status"]["containerStatuses"]
    container["state"]["terminated"] |= told
    await round_.run(lambda _: TOKEN, back_ns + SECOND_NS)
    [span] = ledger.pods("team-a", "smollm2", 0)[0].spans
    assert (span.ended_ns, span.end_known) == ((back_ns, True) if told is RAN_ON else (fake.frontier_ns, False))


@pytest.mark.parametrize("restarted", [False, True], ids=["while it could not look", "while it was away"])
async def test_a_worker_that_dies_twice_unseen_is_not_allocated_twice(tmp_path: Path, *, restarted: bool) -> None:
    """Its pod's status names the last two containers, and nobody ever says when the first one ended."""
    ledger, of = open_ledger(tmp_path / "ledger.db"), worker(1)
    services = {("team-a", "smollm2"): service_manifest(of)}
    pods = {("team-a", of.pod): pod_manifest(of, "", ("c1", START_NS, None))}
    collector = Collector(ledger, Workers(), inline, Clock(NOW_NS))

    def rounds() -> CollectRound:
        return CollectRound(ledger, collector, inline, pods=lambda: pods, services=lambda: services, lookup=nowhere)

    round_ = rounds()
    await round_.run(lambda _: TOKEN, NOW_NS)
    lives = (("c2", START_NS + 20 * SECOND_NS, START_NS + 25 * SECOND_NS), ("c3", START_NS + 30 * SECOND_NS, None))
    pods["team-a", of.pod] = pod_manifest(of, "", *lives)
    if restarted:
        round_ = rounds()
        await round_.recover(NOW_NS)
    for later_ns in (NOW_NS, NOW_NS + SECOND_NS):
        await round_.run(lambda _: TOKEN, later_ns)
    [pod] = ledger.pods("team-a", "smollm2", 0)
    assert [(span.container_id, span.ended_ns, span.end_known) for span in pod.spans] == [
        ("c1", START_NS + 20 * SECOND_NS, False),
        ("c2", START_NS + 25 * SECOND_NS, True),
        ("c3", None, False),
    ]
    Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), START_NS + 2 * MINUTE_NS + SECOND_NS)
    [(_, accounts)] = ledger.pod_accounts(of.worker_uid)
    assert accounts.allocated == 55 * SECOND_NS, "the minute without the 5 s in which no container ran"


@pytest.mark.parametrize("removed", [False, True], ids=["it failed", "it is removed"])
async def test_a_pod_that_is_over_and_names_no_container_any_more_keeps_what_it_was_allocated(
    tmp_path: Path, *, removed: bool
) -> None:
    """A node came back without its GPUs and the kubelet refused the pod: its status is Failed and tells of nothing."""
    ledger, of = open_ledger(tmp_path / "ledger.db"), worker(1)
    services = {("team-a", "smollm2"): service_manifest(of)}
    pods = {("team-a", of.pod): pod_manifest(of, "", ("c1", START_NS, None))}
    collector = Collector(ledger, Workers(), inline, Clock(NOW_NS))
    round_ = CollectRound(ledger, collector, inline, pods=lambda: pods, services=lambda: services, lookup=nowhere)
    await round_.run(lambda _: TOKEN, START_NS + 10 * SECOND_NS)
    refused = pod_manifest(of, "")
    if removed:
        pods.clear()
        round_.removed(refused, NOW_NS)
    else:
        pods["team-a", of.pod] = refused | {"status": {"phase": "Failed", "reason": "UnexpectedAdmissionError"}}
    await round_.run(lambda _: TOKEN, NOW_NS)
    [pod] = ledger.pods("team-a", "smollm2", 0)
    assert (pod.gone, [span.ended_ns for span in pod.spans]) == (True, [NOW_NS])
    Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), START_NS + 10 * MINUTE_NS)
    [(_, accounts)] = ledger.pod_accounts(of.worker_uid)
    assert (accounts.allocated, accounts.unaccounted) == (NOW_NS - START_NS, NOW_NS - START_NS)
