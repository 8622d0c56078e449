"""The rules of the bill, each under its own name: what a request is charged for, and what never.

A real engine runs a real (tiny) model; its steps are booked by the real meter into the real journal, and what is judged
is what the journal's file says. Rules that need the ledger are in test_billing_rules_of_reports.

A request that times out, one whose client goes away and one that a drain cuts off reach the engine as one and the same
command: a cancel. So "cancelled" stands for them all.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gpumeter_usage.period import MINUTE_NS
from gpumeter_usage.record import Account, Kind, Status
from gpumeter_worker.engine.blocks import Copy, PagedBlocks
from gpumeter_worker.engine.loop import INVALID_TOKEN, Sampled
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Load, split
from gpumeter_worker.metering.clock import HostClock, StepClock, StepTime
from gpumeter_worker.metering.parts import Part
from rigs.billing import BLOCK_TOKENS, PROFILE, Billed, Books, LateClock, load_runner, part_of
from rigs.ledger import START_NS


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "journal").mkdir()
    yield tmp_path / "journal"


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [(7 * seed + 3 * place) % 97 + 3 for place in range(tokens)]


def prefixed(folder: Path) -> Billed:
    return Billed(folder, blocks=PagedBlocks(40, BLOCK_TOKENS, prefix=True))


# ---------------------------------------------------------------------------------------------------- what never costs


def test_cold_start_is_never_a_users(folder: Path) -> None:
    one = Billed(folder)
    one.ask("first", "acme", prompt(20), 4)
    one.run_out()
    accounts = one.books.accounts()
    start_up_ns = accounts[Account.INIT] + accounts[Account.LOAD] + accounts[Account.WARMUP]
    assert accounts[Account.LOAD] > 0
    assert accounts[Account.WARMUP] > 0
    assert start_up_ns == one.books.anchor.utc_ns(one.ready_ns) - (START_NS + 5), "from the start until readiness"
    assert one.books.billed_ns("first") == accounts[Account.ATTRIBUTED] == one.books.earned_ns("first")
    ready_ns = one.books.anchor.utc_ns(one.ready_ns)
    assert min(record.started_at for record in one.books.slices("first")) >= ready_ns


def test_a_replaced_engines_start_is_never_a_users(folder: Path) -> None:
    one = Billed(folder)
    one.ask("unlucky", "acme", prompt(20), 50)
    one.turn(4)
    one.lose_engine()
    earned_ns = one.books.earned_ns("unlucky")
    one.books.enter(Phase.LOAD, time.monotonic_ns())
    load_runner()
    one.books.enter(Phase.SERVING, time.monotonic_ns())
    one.books.flush(time.monotonic_ns())
    assert one.books.billed_ns("unlucky") == one.books.accounts()[Account.ATTRIBUTED] == earned_ns


def test_waiting_in_a_queue_costs_nothing(folder: Path) -> None:
    one = Billed(folder, limits=Limits(1, 64))
    one.ask("runs", "acme", prompt(20), 30)
    one.ask("waits", "beta", prompt(20, 1), 2)
    one.turn(20)
    assert one.engine.waiting == 1
    assert one.books.earned_ns("waits") == 0
    one.run_out()
    own = [step for step in one.books.steps if any(part.session_id == "waits" for part in step.report.parts)]
    assert len(own) == 2
    assert one.books.billed_ns("waits") == sum(step.report.gpu_ns for step in own), "alone in its steps, no more"


def test_a_request_that_is_cancelled_while_it_waits_costs_nothing(folder: Path) -> None:
    one = Billed(folder, limits=Limits(1, 64))
    one.ask("runs", "acme", prompt(20), 10)
    one.ask("waits", "beta", prompt(20, 1), 2)
    one.turn(5)
    one.cancel("waits")
    one.run_out()
    (record,) = one.books.slices("waits")
    assert (record.gpu_ns, record.steps, record.prompt_tokens, record.completion_tokens) == (0, 0, 0, 0)
    assert record.status is Status.CANCELLED


def test_a_step_of_a_model_over_several_gpus_is_charged_for_each_of_them(folder: Path) -> None:
    one = Billed(folder, devices=4)
    for number, name in enumerate(("one", "two", "three")):
        one.ask(name, "acme", prompt(20, number), 4)
    one.run_out()
    frontier_ns = one.books.seal(time.monotonic_ns())
    accounts = one.books.accounts()
    measured_ns = sum(step.report.gpu_ns for step in one.books.steps)
    assert accounts[Account.ATTRIBUTED] == 4 * measured_ns > 0
    assert sum(one.books.billed_ns(name) for name in ("one", "two", "three")) == 4 * measured_ns, "no remainder"
    assert sum(accounts.values()) == 4 * (frontier_ns - (START_NS + 5)), "and so is all other time of the worker"


class DeviceClock(HostClock):
    """A device that works for three quarters of the time that the host sees a step last."""

    def harvest(self) -> list[StepTime]:
        return [replace(time, gpu_ns=time.gpu_ns * 3 // 4) for time in super().harvest()]


def test_idle_time_and_gaps_in_and_between_steps_are_the_platforms(folder: Path) -> None:
    one = Billed(folder, clock=DeviceClock())
    one.ask("one", "acme", prompt(20), 4)
    one.run_out()
    accounts = one.books.accounts()
    measured_ns = sum(step.report.gpu_ns for step in one.books.steps)
    assert accounts[Account.ATTRIBUTED] == measured_ns == one.books.billed_ns("one")
    assert accounts[Account.HOST_GAP] > 0, "staging a step and reading its tokens is not the step"


def test_recompute_after_the_platforms_own_preemption_is_nonbillable(folder: Path) -> None:
    asked = {"old": 40, "short": 10, "new": 40}
    one = Billed(folder, blocks=PagedBlocks(8, BLOCK_TOKENS, prefix=False))
    for number, (name, max_tokens) in enumerate(asked.items()):
        one.ask(name, "acme" if name == "old" else "beta", prompt(30, number), max_tokens)
    one.run_out()
    parts = [part for step in one.books.steps for part in step.report.parts]
    again = [part for part in parts if part.recompute]
    assert again, "nothing was preempted, so nothing is proven"
    again_ns = sum(step.share_of(name, recompute=True) for step in one.books.steps for name in asked)
    accounts = one.books.accounts()
    assert accounts[Account.NONBILLABLE] == again_ns > 0
    assert accounts[Account.ATTRIBUTED] == sum(one.books.billed_ns(name) for name in asked)
    assert accounts[Account.ATTRIBUTED] + again_ns == sum(step.report.gpu_ns for step in one.books.steps)
    mixed = [step for step in one.books.steps if len({part.recompute for part in step.report.parts}) == 2]
    assert mixed, "whoever ran beside it is to be shown to pay its own share only"
    for step in mixed:
        loads = [Load(part.new_tokens, part.context_tokens) for part in step.report.parts]
        assert step.shares_ns == split(step.report.gpu_ns, loads, PROFILE)
    for name, max_tokens in asked.items():
        paid = [part for part in parts if part.session_id == name and not part.recompute]
        places = [part.context_tokens + place for part in paid for place in range(part.new_tokens)]
        assert sorted(places) == list(range(30 + max_tokens - 1)), (
            "each token's work is paid once, whatever was lost between"
        )
        (record,) = one.books.slices(name)
        assert (record.prompt_tokens, record.completion_tokens) == (30, max_tokens)


# ------------------------------------------------------------------------------------------- what was earned is kept


def test_a_cancelled_request_keeps_the_step_in_flight(folder: Path) -> None:
    one = Billed(folder, clock=LateClock())
    one.ask("goes", "acme", prompt(20), 50)
    one.ask("stays", "beta", prompt(20, 1), 6)
    one.turn(3)
    reported_ns = one.books.earned_ns("goes")
    one.cancel("goes")  # its third step was launched and is not reported yet
    one.run_out()
    in_flight = [step for step in one.books.steps if len(step.report.parts) == 2][-1]
    assert one.books.ended["goes"].gpu_ns == reported_ns + in_flight.share_of("goes")
    assert in_flight.share_of("goes") > 0
    (record,) = one.books.slices("goes")
    assert (record.status, record.gpu_ns) == (Status.CANCELLED, one.books.ended["goes"].gpu_ns)
    assert record.steps == 3


def test_a_cancelled_request_is_in_no_later_step(folder: Path) -> None:
    one = Billed(folder)
    one.ask("goes", "acme", prompt(20), 50)
    one.ask("stays", "beta", prompt(20, 1), 10)
    one.turn(3)
    one.cancel("goes")
    one.run_out()
    assert all(part.session_id == "stays" for step in one.books.steps[3:] for part in step.report.parts)
    assert len(one.books.steps) > 3


class Breaks:
    """A runner whose model gives one sequence no numbers at its `at`-th token, or the device no memory for a step."""

    def __init__(self, session_id: str, at: int, *, memory: bool = False) -> None:
        self._inner = load_runner()
        self._session_id, self._at, self._memory = session_id, at, memory

    def run(self, plan: Sequence[Work], clock: StepClock) -> list[Sampled]:
        sampling = [work for work in plan if work.samples]
        struck = [
            work.sequence.session_id == self._session_id and work.sequence.generated == self._at for work in sampling
        ]
        if self._memory and any(struck):
            self._memory = False
            clock.begin()
            raise MemoryError("the device has none left")
        found = self._inner.run(plan, clock)
        return [Sampled(INVALID_TOKEN) if hit else one for hit, one in zip(struck, found, strict=True)]

    def copy(self, copies: Sequence[Copy]) -> None:
        self._inner.copy(copies)


def test_a_failed_request_keeps_every_share_and_the_step_that_failed_it(folder: Path) -> None:
    one = Billed(folder, load=lambda: Breaks("breaks", at=3))
    one.ask("breaks", "acme", prompt(20), 50)
    one.ask("stays", "beta", prompt(20, 1), 6)
    one.run_out()
    (record,) = one.books.slices("breaks")
    assert record.status is Status.FAILED
    assert (record.steps, record.completion_tokens) == (4, 3), "the fourth step ran for it and gave it no token"
    assert record.gpu_ns == sum(step.share_of("breaks") for step in one.books.steps[:4]) > 0


def test_a_request_that_is_ended_for_lack_of_memory_keeps_its_shares_and_the_failed_step_is_the_platforms(
    folder: Path,
) -> None:
    one = Billed(folder, load=lambda: Breaks("late", at=2, memory=True))
    one.ask("early", "acme", prompt(20), 8)
    one.turn(2)
    one.ask("late", "beta", prompt(20, 1), 8)
    with pytest.raises(MemoryError):
        one.turn(20)
    one.books.book(one.engine.shed("a step had too little memory"), time.monotonic_ns())
    one.run_out()
    (record,) = one.books.slices("late")
    assert record.status is Status.FAILED
    assert record.gpu_ns == one.books.earned_ns("late") > 0
    earned_ns = one.books.earned_ns("early") + one.books.earned_ns("late")
    assert one.books.accounts()[Account.ATTRIBUTED] == earned_ns, "the step that failed is on nobody's bill"
    assert (one.books.slices("early")[0].status, one.books.slices("early")[0].completion_tokens) == (Status.FINISHED, 8)


def test_a_request_whose_engine_died_keeps_what_was_reported_and_no_more(folder: Path) -> None:
    one = Billed(folder, clock=LateClock())
    one.ask("unlucky", "acme", prompt(20), 50)
    one.turn(5)
    reported_ns = one.books.earned_ns("unlucky")
    one.lose_engine()  # with a step in flight, whose time nobody will ever know
    (record,) = one.books.slices("unlucky")
    assert (record.status, record.gpu_ns) == (Status.FAILED, reported_ns)
    accounts = one.books.accounts()
    assert accounts[Account.ATTRIBUTED] == reported_ns


# --------------------------------------------------------------------------------------------- what counts as work


def test_a_prefix_cache_hit_counts_as_context_not_as_new_tokens(folder: Path) -> None:
    one = prefixed(folder)
    one.ask("first", "acme", prompt(40), 2)
    one.run_out()
    one.ask("again", "acme", prompt(40), 2)
    one.run_out()
    first, again = (
        part_of(next(step for step in one.books.steps if step.share_of(name)), name) for name in ("first", "again")
    )
    assert (first.new_tokens, first.context_tokens, first.cached_tokens) == (40, 0, 0)
    assert (again.new_tokens, again.context_tokens, again.cached_tokens) == (8, 32, 32)
    told = one.books.slices("again")[0]
    assert (told.prompt_tokens, told.cached_tokens) == (40, 32), "the prompt is as long as it was; part of it was found"


def test_a_hit_makes_a_prompts_share_of_the_same_step_smaller() -> None:
    """Two prompts of 40 tokens beside each other, one of which found 32: the same step, the same rule."""
    hit, miss = split(10**9, [Load(8, 32), Load(40, 0)], PROFILE)
    assert hit < miss
    assert hit > split(10**9, [Load(8, 0), Load(40, 0)], PROFILE)[0], "what was found is still read as context"


def test_no_tenant_pays_less_for_what_another_computed(folder: Path) -> None:
    one = prefixed(folder)
    one.ask("mine", "acme", prompt(40), 2)
    one.run_out()
    one.ask("theirs", "beta", prompt(40), 2)
    one.run_out()
    assert one.books.slices("theirs")[0].cached_tokens == 0


def test_rejected_speculative_tokens_count_as_work(folder: Path) -> None:
    """The engine proposes no tokens yet, so the rule is held where it would be true: a part's `new_tokens` are those
    that were computed, `sampled` those that were kept, and only the first weigh."""
    books = Books(folder, time.monotonic_ns(), Billed(folder_of(folder, "other")).books.anchor)
    at_ns = time.monotonic_ns()
    books.enter(Phase.SERVING, at_ns)
    for name in ("kept", "rejected", "plain"):
        books.begin(name, "acme", at_ns)
    parts = [
        Part("kept", 5, 100, prefill=False, sampled=5),
        Part("rejected", 5, 100, prefill=False, sampled=1),
        Part("plain", 1, 100, prefill=False, sampled=1),
    ]
    utc_ns = books.anchor.utc_ns(at_ns)
    kept, rejected, plain = books.meter.step(utc_ns, utc_ns + 3_000_000, 3_000_000, parts)
    assert abs(kept - rejected) <= 1, "what was proposed in vain was computed all the same"
    assert rejected > plain
    for name in ("kept", "rejected", "plain"):
        books.end(name, Status.FINISHED, at_ns + 4_000_000)
    books.flush(at_ns + 4_000_000)
    assert [books.slices(name)[0].completion_tokens for name in ("kept", "rejected", "plain")] == [5, 1, 1]
    assert [books.billed_ns(name) for name in ("kept", "rejected", "plain")] == [kept, rejected, plain]


def test_every_share_of_a_step_is_a_whole_number_and_they_sum_to_the_step(folder: Path) -> None:
    one = Billed(folder)
    for number in range(6):
        one.ask(f"s{number}", f"tenant-{number % 2}", prompt(5 + 9 * number, number), 3 + number)
    one.run_out()
    assert {len(step.report.parts) for step in one.books.steps} >= {1, 6}
    for step in one.books.steps:
        assert sum(step.shares_ns) == step.report.gpu_ns
        assert all(type(share) is int and share >= 0 for share in step.shares_ns)
    for number in range(6):
        assert one.books.billed_ns(f"s{number}") == one.books.earned_ns(f"s{number}")


def test_no_record_crosses_a_minute(folder: Path) -> None:
    one = Billed(folder)
    one.ask("one", "acme", prompt(20), 4)
    one.run_out()
    one.books.flush(time.monotonic_ns() + 3 * MINUTE_NS)
    records = one.books.records()
    assert len([record for record in records if record.kind is Kind.ACCOUNT and record.account == Account.IDLE]) >= 3
    for record in records:
        assert record.started_at // MINUTE_NS * MINUTE_NS >= record.ended_at - MINUTE_NS


def folder_of(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name
