"""The rules of the bill that need the ledger: the hour of a step, and reports that add up to the allocation.

A real engine runs a real (tiny) model; its journal goes through the real ledger and the closing of periods, and what is
judged is the Final UsageReports.
"""

import time
from decimal import Decimal
from pathlib import Path

import pytest

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.tariff import AMOUNT_STEP
from gpumeter_usage.period import LENGTH_NS, SECOND_NS, Granularity
from gpumeter_worker.engine.blocks import PagedBlocks
from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import Event, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.clock import Anchor, HostClock
from rigs.billing import BLOCK_TOKENS, Bill, Billed, Books, load_runner, publish
from rigs.ledger import START_NS, open_ledger

RATE = "3.6"
"""A price per GPU-hour at which a GPU-second costs a thousandth, so that figures can be read off."""


def ledger_of(folder: Path, granularity: Granularity) -> Ledger:
    return open_ledger(folder / "ledger.db", granularity)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [(7 * seed + 3 * place) % 97 + 3 for place in range(tokens)]


@pytest.fixture(scope="module")
def bill(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bill, Books]:
    """A life with everything in it: waiting, a cancel, a preemption, idling, an ordered end."""
    folder = tmp_path_factory.mktemp("life")
    one = Billed(folder, limits=Limits(2, 64), blocks=PagedBlocks(6, BLOCK_TOKENS, prefix=False))
    for number, tenant in enumerate(("acme", "beta", "acme")):
        one.ask(f"s{number}", tenant, prompt(30, number), 40)
    one.turn(10)
    one.cancel("s2")
    one.run_out()
    sealed_ns = one.books.seal(time.monotonic_ns())
    until_ns = -(-sealed_ns // SECOND_NS) * SECOND_NS
    ledger = ledger_of(folder, Granularity.HOUR)
    try:
        return publish(ledger, one.books, from_ns=START_NS, until_ns=until_ns, per_gpu_hour=RATE), one.books
    finally:
        ledger.close()
        one.books.close()


def test_the_reports_of_a_service_add_up_to_its_allocation_because_the_platforms_share_is_one_of_them(
    bill: tuple[Bill, Books],
) -> None:
    reports, books = bill
    assert sum(reports.by_tenant_ns.values()) == reports.allocated_ns
    for tenant, sessions in {"acme": ("s0", "s2"), "beta": ("s1",)}.items():
        assert reports.by_tenant_ns[tenant] == sum(map(books.earned_ns, sessions)) > 0
    ((_, own),) = [(key, report) for key, report in reports.reports.items() if key[1] == PLATFORM]
    accounts = {name: int(value) for name, value in own["status"]["accounts"].items()}
    names = ("init", "load", "warmup", "attributed", "nonbillable", "idle", "drain", "unaccounted")
    assert accounts["allocated"] == reports.allocated_ns == sum(accounts[name] for name in names)
    assert reports.by_tenant_ns[PLATFORM] == accounts["allocated"] - accounts["attributed"]
    assert min(accounts[name] for name in ("init", "load", "warmup", "nonbillable", "drain")) >= 0
    assert accounts["nonbillable"] > 0, "a preemption was to be in this life"
    assert accounts["unaccounted"] == 5, "the line of UTC began 5 ns after the container did"


def test_the_amounts_of_a_service_add_up_to_the_price_of_its_allocation(bill: tuple[Bill, Books]) -> None:
    reports, _ = bill
    amounts = [Decimal(report["status"]["amount"]) for report in reports.reports.values()]
    whole = Decimal(reports.allocated_ns) * Decimal(RATE) / (3600 * SECOND_NS)
    assert len(amounts) == 3
    assert abs(sum(amounts) - whole) <= len(amounts) * AMOUNT_STEP / 2


def test_a_cancelled_request_is_a_session_on_the_bill_with_what_it_used(bill: tuple[Bill, Books]) -> None:
    reports, books = bill
    (acme,) = [report["status"] for (_, tenant), report in reports.reports.items() if tenant == "acme"]
    assert acme["sessions"] == 2
    assert books.ended["s2"].gpu_ns < books.ended["s0"].gpu_ns
    assert int(acme["gpuNanoseconds"]) == books.ended["s0"].gpu_ns + books.ended["s2"].gpu_ns


@pytest.mark.parametrize("granularity", [Granularity.MINUTE, Granularity.HOUR])
def test_a_step_belongs_to_the_minute_or_hour_of_its_end(tmp_path: Path, granularity: Granularity) -> None:
    clock = HostClock()
    began_ns = time.monotonic_ns()
    blocks = PagedBlocks(40, BLOCK_TOKENS, prefix=False)
    engine = Engine(load_runner(), clock, Limits(8, 64), frozenset(), 200, blocks)
    ready_ns = time.monotonic_ns()
    engine.submit(Submit("one", prompt(20), Sampling(8, temperature=0.0, ignore_eos=True), tenant="acme"))
    events: list[Event] = []
    while engine.busy:
        events += engine.turn()
    ended_ns = time.monotonic_ns()
    steps = [event for event in events if isinstance(event, StepReport)]
    straddling = steps[4]
    edge_ns = START_NS + LENGTH_NS[granularity]
    # The line of UTC is laid so that the edge falls into the middle of the fifth step.
    anchor = Anchor(edge_ns - (straddling.started_ns + straddling.ended_ns) // 2)

    books = Books(tmp_path, began_ns, anchor)
    books.enter(Phase.SERVING, ready_ns)
    books.begin("one", "acme", ready_ns)
    books.book(events, ended_ns)
    sealed_ns = books.seal(ended_ns)
    from_ns = anchor.utc_ns(began_ns) // SECOND_NS * SECOND_NS
    until_ns = -(-sealed_ns // SECOND_NS) * SECOND_NS
    ledger = ledger_of(tmp_path, granularity)
    reports = publish(ledger, books, from_ns=from_ns, until_ns=until_ns, per_gpu_hour=RATE)
    ledger.close()
    books.close()

    before_ns, after_ns = (sum(step.gpu_ns for step in half) for half in (steps[:4], steps[4:]))
    later_ns = edge_ns + LENGTH_NS[granularity]
    billed = {
        end_ns: int(r["status"]["gpuNanoseconds"]) for (end_ns, who), r in reports.reports.items() if who == "acme"
    }
    assert billed == {edge_ns: before_ns, later_ns: after_ns}
    rest = {
        end_ns: int(report["status"]["accounts"]["unaccounted"])
        for (end_ns, who), report in reports.reports.items()
        if who == PLATFORM
    }
    lent_ns = edge_ns - anchor.utc_ns(straddling.started_ns)
    assert rest[later_ns] == -lent_ns, "what the step began before the edge, the next period gives back"
    assert rest[edge_ns] == lent_ns + anchor.utc_ns(began_ns) - from_ns
    assert sum(reports.by_tenant_ns.values()) == reports.allocated_ns


def test_what_nobody_measured_is_unaccounted_and_on_no_tenants_bill(tmp_path: Path) -> None:
    """The worker is killed: what was not journaled is gone, and its container's time is the platform's."""
    one = Billed(tmp_path)
    one.ask("unlucky", "acme", prompt(20), 30)
    one.turn(5)
    one.books.flush(time.monotonic_ns())
    journaled_ns = one.books.billed_ns("unlucky")
    one.turn(5)
    lost_ns = one.books.earned_ns("unlucky") - journaled_ns
    frontier_ns = one.books.journal.head().frontier_ns
    until_ns = START_NS + 10 * SECOND_NS
    assert frontier_ns < until_ns
    ledger = ledger_of(tmp_path, Granularity.HOUR)
    reports = publish(ledger, one.books, from_ns=START_NS, until_ns=until_ns, per_gpu_hour=RATE)
    ledger.close()
    one.books.close()
    assert reports.by_tenant_ns["acme"] == journaled_ns
    assert lost_ns > 0
    platform = next(report for (_, tenant), report in reports.reports.items() if tenant == PLATFORM)
    assert int(platform["status"]["accounts"]["unaccounted"]) == until_ns - frontier_ns + 5
    conditions = {each["type"]: (each["status"], each["reason"]) for each in platform["status"]["conditions"]}
    assert conditions["Complete"] == ("False", "SealMissing")
    assert conditions["Reconciled"] == ("False", "UnaccountedTime")
    assert conditions["Measured"] == ("False", "HostClock")
    assert sum(reports.by_tenant_ns.values()) == reports.allocated_ns
