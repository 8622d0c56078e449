"""Scheduler and loop without torch: who shares a step, and in which order things are reported."""

from collections.abc import Sequence as Row

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumeter_worker.engine.blocks import Copy, KvBlocks, PagedBlocks, SlotBlocks
from gpumeter_worker.engine.loop import INVALID_TOKEN, Engine, Sampled
from gpumeter_worker.engine.messages import Cancel, Ended, Event, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits, Scheduler, Work
from gpumeter_worker.engine.sequence import Finish, Prompt, Sampling, Sequence
from gpumeter_worker.metering.clock import StepClock, StepTime
from gpumeter_worker.metering.parts import Onward

EOS = 99


class Counting:
    """A runner whose tokens are the sequence's length; a device on which every step takes ten units."""

    kind = "host"
    begun = 0
    drift_ppb = None

    def __init__(self, late: int = 0) -> None:
        self.now = 0
        self.late = late
        self.times: list[StepTime] = []
        self.plans: list[list[tuple[str, int]]] = []
        self.answers: dict[str, int] = {}

    def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
        self.plans.append([(work.sequence.session_id, work.count) for work in plan])
        self.times.append(StepTime(self.now, self.now + 10, 10))
        self.now += 10
        return [Sampled(self.answers.get(w.sequence.session_id, len(w.sequence.tokens))) for w in plan if w.samples]

    def copy(self, copies: Row[Copy]) -> None:
        raise AssertionError("without a prefix cache nothing is copied")

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def abort(self) -> bool:
        return False

    def harvest(self) -> list[StepTime]:
        """Steps are known `late` turns after they ran, as with CUDA events."""
        ready = len(self.times) - self.late if self.late else len(self.times)
        self.late = max(0, self.late - 1) if ready <= 0 else self.late
        found, self.times = self.times[: max(0, ready)], self.times[max(0, ready) :]
        return found


def engine(device: Counting, slots: int = 2, tokens: int = 8) -> Engine:
    return Engine(device, device, Limits(slots, tokens), frozenset({EOS}), max_length=64)


def drive(one: Engine) -> list[Event]:
    events: list[Event] = []
    for _ in range(1000):
        if not one.busy:
            return events
        events += one.turn()
    raise AssertionError("the engine does not come to an end")


def submit(name: str, prompt: int, max_tokens: int) -> Submit:
    return Submit(name, list(range(1, prompt + 1)), Sampling(max_tokens=max_tokens, temperature=0))


def test_a_long_prompt_is_run_in_chunks_beside_the_decodes() -> None:
    device = Counting()
    one = engine(device)
    one.submit(submit("short", 2, 4))
    one.turn()
    one.submit(submit("long", 18, 1))
    drive(one)
    assert device.plans[1:4] == [
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 4)],
    ]


def test_the_first_to_come_is_the_first_to_be_served() -> None:
    device = Counting()
    one = engine(device, slots=1)
    for name in ("a", "b", "c"):
        one.submit(submit(name, 3, 2))
    ended = [event.session_id for event in drive(one) if isinstance(event, Ended)]
    assert ended == ["a", "b", "c"]


def test_a_session_ends_after_every_step_that_held_it_was_reported() -> None:
    for late in (0, 1, 2):
        one = engine(Counting(late), slots=4, tokens=16)
        for number in range(5):
            one.submit(submit(f"s{number}", 3 + number, 2 + number))
        over: set[str] = set()
        for event in drive(one):
            if isinstance(event, StepReport):
                assert not over & {part.session_id for part in event.parts}
            elif isinstance(event, Ended):
                over.add(event.session_id)
        assert len(over) == 5


def test_a_cancel_takes_effect_before_the_next_step_and_is_confirmed() -> None:
    device = Counting()
    one = engine(device)
    one.submit(submit("goes", 2, 50))
    one.submit(submit("stays", 2, 2))
    one.turn()
    one.cancel(Cancel("goes"))
    one.cancel(Cancel("goes"))
    events = drive(one)
    assert [(e.session_id, e.finish) for e in events if isinstance(e, Ended)] == [
        ("goes", Finish.CANCELLED),
        ("stays", Finish.LENGTH),
    ]
    assert all(("goes", 1) not in plan for plan in device.plans[1:])


def test_a_cancel_of_one_that_waits_gives_its_place_to_the_next() -> None:
    device = Counting()
    one = engine(device, slots=1)
    for name in ("a", "b", "c"):
        one.submit(submit(name, 2, 1))
    one.cancel(Cancel("b"))
    events = drive(one)
    assert [(e.session_id, e.finish) for e in events if isinstance(e, Ended)] == [
        ("b", Finish.CANCELLED),
        ("a", Finish.LENGTH),
        ("c", Finish.LENGTH),
    ]
    assert not any("b" in dict(plan) for plan in device.plans)


def test_the_models_end_token_ends_a_sequence_unless_it_is_to_be_ignored() -> None:
    device = Counting()
    device.answers = {"stops": EOS, "goes-on": EOS}
    one = engine(device)
    one.submit(submit("stops", 2, 5))
    one.submit(Submit("goes-on", [1, 2], Sampling(max_tokens=3, temperature=0, ignore_eos=True)))
    finishes = {e.session_id: e.finish for e in drive(one) if isinstance(e, Ended)}
    assert finishes == {"stops": Finish.STOP, "goes-on": Finish.LENGTH}


def test_a_row_without_valid_numbers_fails_alone() -> None:
    device = Counting()
    device.answers = {"broken": INVALID_TOKEN}
    one = engine(device)
    one.submit(submit("broken", 2, 5))
    one.submit(submit("sound", 2, 5))
    events = drive(one)
    finishes = {e.session_id: e.finish for e in events if isinstance(e, Ended)}
    assert finishes == {"broken": Finish.FAILED, "sound": Finish.LENGTH}
    first = next(e for e in events if isinstance(e, StepReport))
    assert {part.session_id for part in first.parts} == {"broken", "sound"}  # it keeps its share of the step


def scheduler_of(limits: Limits, blocks: KvBlocks | None = None) -> Scheduler:
    return Scheduler(limits, blocks or SlotBlocks(limits.sequences, 4096, prefix=False))


def waiting(name: str, prompt: int, tenant: str = "", wanted: int = 50) -> Sequence:
    tokens = [1000 * len(name) + place for place in range(prompt)]
    return Sequence(name, 0, tenant, tokens, prompt, Sampling(max_tokens=wanted))


def step(scheduler: Scheduler) -> dict[str, int]:
    """Run a step: who was in it, with how many tokens."""
    return {work.sequence.session_id: work.count for work in planned(scheduler)}


def test_beside_decodes_a_prompt_is_run_in_smaller_chunks() -> None:
    scheduler = scheduler_of(Limits(4, 512, mixed_prefill_tokens=32))
    scheduler.add(waiting("stream", 10))
    scheduler.add(waiting("prompt", 600))
    assert step(scheduler) == {"stream": 10, "prompt": 502}
    assert step(scheduler) == {"stream": 1, "prompt": 32}


def test_with_all_other_slots_in_use_a_prompt_still_gets_on() -> None:
    scheduler = scheduler_of(Limits(64, 64))
    for number in range(63):
        scheduler.add(waiting(f"stream {number}", 1))
    assert len(step(scheduler)) == 63
    scheduler.add(waiting("prompt", 40))
    assert [step(scheduler).get("prompt") for _ in range(40)] == [1] * 40


def test_short_prompts_do_not_queue_behind_long_ones() -> None:
    scheduler = scheduler_of(Limits(8, 256))
    for name, length in (("long", 3000), ("also long", 3000), ("short", 40), ("shorter", 20)):
        scheduler.add(waiting(name, length))
    first = step(scheduler)
    assert 128 <= first["long"] <= 140  # half for the oldest
    assert first["also long"] == 64  # half of the rest for the next
    assert (first["short"], first["shorter"]) == (40, 20)


def test_the_oldest_prompt_is_done_in_bounded_time_whatever_comes() -> None:
    scheduler = scheduler_of(Limits(8, 64))
    oldest = waiting("oldest", 640)
    scheduler.add(oldest)
    for number in range(21):
        scheduler.add(waiting(f"short {number}", 30, wanted=1))
        for name in step(scheduler):
            for one in scheduler.of_session(name)[:]:
                if one is not oldest and not one.prefilling:
                    scheduler.leave(one)
    assert not oldest.prefilling


def test_room_that_nobody_else_can_use_goes_to_the_one_prompt() -> None:
    scheduler = scheduler_of(Limits(8, 256))
    scheduler.add(waiting("long", 3000))
    scheduler.add(waiting("short", 20))
    assert step(scheduler) == {"long": 236, "short": 20}


def choices(count: int, prompt: int) -> list[Sequence]:
    shared = Prompt()
    tokens = list(range(prompt))
    return [
        Sequence("n", choice, "", tokens.copy(), prompt, Sampling(max_tokens=9), prompt=shared)
        for choice in range(count)
    ]


def test_choices_wait_for_the_first_to_compute_the_prompt_that_they_share() -> None:
    scheduler = scheduler_of(Limits(4, 64), PagedBlocks(64, 16, prefix=True))
    for one in choices(3, 100):
        scheduler.add(one)
    assert [[(w.sequence.choice, w.count) for w in planned(scheduler)] for _ in range(3)] == [
        [(0, 64)],
        [(0, 36)],
        [(0, 1), (1, 4), (2, 4)],
    ]


def test_choices_do_not_wait_where_there_is_nothing_to_find() -> None:
    for blocks, prompt in ((PagedBlocks(64, 16, prefix=False), 20), (PagedBlocks(64, 16, prefix=True), 16)):
        scheduler = scheduler_of(Limits(4, 64), blocks)
        for one in choices(3, prompt):
            scheduler.add(one)
        assert len(planned(scheduler)) == 3


def test_when_the_choice_that_computes_is_cancelled_the_next_one_does() -> None:
    scheduler = scheduler_of(Limits(4, 32), PagedBlocks(64, 16, prefix=True))
    for one in choices(3, 100):
        scheduler.add(one)
    planned(scheduler)
    scheduler.cancel("n", 0)
    assert [(w.sequence.choice, w.sequence.cached, w.count) for w in scheduler.plan()] == [(1, 0, 32)]


@pytest.mark.parametrize("blocks", [PagedBlocks(64, 16, prefix=True), SlotBlocks(4, 256, prefix=True)])
def test_nobody_finds_what_a_sequence_computed_that_left_before_its_first_token(blocks: KvBlocks) -> None:
    scheduler = scheduler_of(Limits(4, 64), blocks)
    first, second, third = (
        Sequence(name, 0, "acme", list(range(100)), 100, Sampling(max_tokens=9)) for name in ("a", "b", "c")
    )
    scheduler.add(first)
    planned(scheduler)
    assert first.computed == 64
    scheduler.cancel("a", None)
    scheduler.add(second)
    assert [work.sequence.cached for work in scheduler.plan()] == [0], "they may be no numbers; nobody has looked"
    for _ in range(2):
        planned(scheduler)
    second.tokens.append(1)
    scheduler.cancel("b", None)
    scheduler.add(third)
    assert [work.sequence.cached > 0 for work in scheduler.plan()] == [True], "what gave a token is good"


def planned(scheduler: Scheduler) -> list[Work]:
    """Run a step as the engine does."""
    plan = scheduler.plan()
    for work in plan:
        work.sequence.computed += work.count
        work.sequence.cached = 0
        scheduler.computed(work.sequence)
        if work.samples:
            work.sequence.tokens.append(0)
    return plan


def test_a_full_cache_takes_from_the_newest_of_the_tenant_that_was_served_most() -> None:
    scheduler = scheduler_of(Limits(4, 64), PagedBlocks(7, 16, prefix=False))
    for name, tenant in (("a1", "greedy"), ("a2", "greedy"), ("a3", "greedy"), ("b1", "modest")):
        scheduler.add(waiting(name, 15, tenant))
    seen = [step(scheduler).keys() for _ in range(30)]
    assert all({"a1", "b1"} <= names for names in seen)
    assert seen[0] == {"a1", "b1", "a2", "a3"}
    assert seen[3] == {"a1", "b1", "a2"}  # the second block of each: there were three for four
    assert seen[20] == {"a1", "b1"}


def test_what_a_cancelled_prompt_was_not_served_is_given_back() -> None:
    scheduler = scheduler_of(Limits(1, 10))
    scheduler.add(waiting("huge", 1000, "a"))
    for name, tenant in (("b1", "b"), ("a1", "a"), ("b2", "b")):
        scheduler.add(waiting(name, 10, tenant, wanted=1))
    assert step(scheduler) == {"huge": 10}
    scheduler.cancel("huge", None)
    order = []
    while scheduler.waiting:
        order += step(scheduler)
        scheduler.cancel(order[-1], None)
    assert order == ["b1", "a1", "b2"]


def test_what_a_preemption_lost_is_computed_again_as_recompute_and_then_it_goes_on() -> None:
    blocks = PagedBlocks(4, 4, prefix=False)
    scheduler = scheduler_of(Limits(2, 16), blocks)
    first, second = waiting("first", 3, wanted=9), waiting("second", 3, wanted=9)
    scheduler.add(first)
    scheduler.add(second)
    works: list[tuple[int, int, bool, bool]] = []
    while scheduler.running or scheduler.waiting:
        for work in planned(scheduler):
            if work.sequence is second:
                works.append((second.computed - work.count, work.count, work.samples, work.recompute))
            if work.sequence.generated == 9:
                scheduler.leave(work.sequence)
    lost = max(start + count for start, count, _, recompute in works if recompute)
    assert (0, lost, False, True) in works
    assert [start for start, _, samples, _ in works if samples] == [0, *range(3, 11)]
    assert blocks.used_tokens == 0


def test_a_request_that_outgrows_the_whole_cache_fails_alone_with_a_sentence() -> None:
    device = Counting()
    one = Engine(device, device, Limits(2, 64), frozenset({EOS}), 4096, PagedBlocks(4, 16, prefix=False))
    one.submit(submit("grows", 40, 100))
    one.submit(submit("far too long", 70, 100))
    one.submit(submit("fits", 20, 5))
    ends = {event.session_id: event for event in drive(one) if isinstance(event, Ended)}
    assert {name: end.finish for name, end in ends.items()} == {
        "grows": Finish.FAILED,
        "far too long": Finish.FAILED,
        "fits": Finish.LENGTH,
    }
    assert "the cache holds 64" in ends["grows"].message
    assert "70 tokens" in ends["far too long"].message


@pytest.mark.parametrize("length", [0, 65])
def test_a_prompt_that_cannot_be_run_is_answered_and_hurts_nobody(length: int) -> None:
    device = Counting()
    one = engine(device)
    one.submit(submit("bad", length, 3))
    one.submit(submit("good", 3, 3))
    ends = {event.session_id: event for event in drive(one) if isinstance(event, Ended)}
    assert ends["good"].finish is Finish.LENGTH
    assert ends["bad"].finish is Finish.FAILED
    assert f"a prompt of {length} tokens" in ends["bad"].message


def test_a_flood_is_answered_beyond_what_may_wait() -> None:
    device = Counting()
    one = Engine(device, device, Limits(1, 8, waiting=100), frozenset({EOS}), 64)
    for number in range(300):
        one.submit(submit(f"s{number}", 2, 1))
    assert one.waiting == 100
    finishes = [event.finish for event in drive(one) if isinstance(event, Ended)]
    assert (finishes.count(Finish.FAILED), finishes.count(Finish.LENGTH)) == (200, 100)


def parts_of(events: list[Event]) -> list[tuple[int, int]]:
    return [(part.prompt_tokens, part.cached_tokens) for e in events if isinstance(e, StepReport) for part in e.parts]


def test_a_prompt_found_in_the_cache_is_counted_once_as_cached() -> None:
    device = Counting()
    one = Engine(device, device, Limits(2, 64), frozenset({EOS}), 4096, PagedBlocks(16, 16, prefix=True))
    one.submit(submit("first", 40, 1))
    assert parts_of(drive(one)) == [(40, 0)]
    one.submit(submit("again", 40, 1))
    assert parts_of(drive(one)) == [(40, 32)]


def test_choices_of_one_prompt_count_its_tokens_once() -> None:
    for prefix in (True, False):
        device = Counting()
        one = Engine(device, device, Limits(4, 64), frozenset({EOS}), 4096, PagedBlocks(32, 16, prefix))
        for choice in range(3):
            sampling = Sampling(max_tokens=1, temperature=0)
            one.submit(Submit("n", list(range(40)), sampling, choice, counts_prompt=choice == 0))
        parts = parts_of(drive(one))
        assert (sum(prompt for prompt, _ in parts), sum(cached for _, cached in parts)) == (40, 0)


def test_when_the_choice_that_counts_is_cancelled_another_counts_the_rest() -> None:
    device = Counting()
    one = Engine(device, device, Limits(4, 32), frozenset({EOS}), 4096, PagedBlocks(32, 16, prefix=True))
    for choice in range(2):
        sampling = Sampling(max_tokens=1, temperature=0)
        one.submit(Submit("n", list(range(80)), sampling, choice, counts_prompt=choice == 0))
    events = one.turn()
    one.cancel(Cancel("n", 0))
    assert parts_of(events + drive(one)) == [(32, 0), (0, 0), (32, 0), (16, 0)]


def test_a_step_needs_room_for_every_running_sequence() -> None:
    with pytest.raises(ValueError, match="one token of every running sequence"):
        Scheduler(Limits(sequences=8, step_tokens=7), SlotBlocks(8, 64, prefix=False))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=20),
    st.integers(1, 6),
    st.integers(0, 20),
)
def test_every_token_is_computed_once_within_the_budget_and_the_slots(
    requests: list[tuple[int, int]], slots: int, extra: int
) -> None:
    scheduler = Scheduler(Limits(slots, slots + extra), SlotBlocks(slots, 64, prefix=False))
    for number, (prompt, wanted) in enumerate(requests):
        scheduler.add(Sequence(str(number), 0, "", list(range(prompt)), prompt, Sampling(max_tokens=wanted)))
    computed: dict[str, int] = {}
    for _ in range(10_000):
        plan = scheduler.plan()
        if not plan:
            break
        assert sum(work.count for work in plan) <= slots + extra
        used = [work.sequence.blocks[0] for work in plan]
        assert len(set(used)) == len(used) <= slots
        for work in plan:
            sequence = work.sequence
            sequence.computed += work.count
            scheduler.computed(sequence)
            computed[sequence.session_id] = computed.get(sequence.session_id, 0) + work.count
            if work.samples:
                sequence.tokens.append(0)
                if sequence.generated == sequence.sampling.max_tokens:
                    scheduler.leave(sequence)
    assert scheduler.running == scheduler.waiting == 0
    assert computed == {str(n): prompt + wanted - 1 for n, (prompt, wanted) in enumerate(requests)}


def test_a_crowd_of_prompts_gets_more_of_a_step_than_a_single_one() -> None:
    def second_step(prompts: int) -> int:
        device = Counting()
        one = Engine(device, device, Limits(100, 2048, mixed_prefill_tokens=8), frozenset({EOS}), max_length=700)
        for number in range(40):
            one.submit(Submit(f"runs-{number}", [1, 2], Sampling(max_tokens=50, temperature=0, ignore_eos=True)))
        one.turn()
        for number in range(prompts):
            one.submit(Submit(f"p{number}", [3] * 512, Sampling(max_tokens=1, temperature=0, ignore_eos=True)))
        one.turn()
        return sum(count for name, count in device.plans[1] if name.startswith("p"))

    assert second_step(1) == 512 // 32
    assert second_step(40) == 40 * 512 // 32
    assert second_step(41) == 2048 - 40, "more wait for a first token than for a next one"


def test_prompts_that_have_no_place_yet_take_nothing_from_running_streams() -> None:
    device = Counting()
    one = Engine(device, device, Limits(2, 2048, mixed_prefill_tokens=8), frozenset({EOS}), max_length=700)
    for name in ("runs", "runs-too"):
        one.submit(Submit(name, [1, 2], Sampling(max_tokens=50, temperature=0, ignore_eos=True)))
    one.turn()
    for number in range(40):
        one.submit(Submit(f"p{number}", [3] * 512, Sampling(max_tokens=1, temperature=0, ignore_eos=True)))
    one.turn()
    assert device.plans[1] == [("runs", 1), ("runs-too", 1)]


@pytest.mark.parametrize("blocks", [SlotBlocks(2, 64, prefix=True), PagedBlocks(8, 16, prefix=True)])
def test_what_a_failed_sequence_left_is_never_found(blocks: KvBlocks) -> None:
    device = Counting()
    one = Engine(device, device, Limits(2, 64), frozenset({EOS}), max_length=64, blocks=blocks)
    device.answers = {"broken": INVALID_TOKEN}
    for name in ("broken", "again", "once-more"):
        one.submit(Submit(name, list(range(100, 140)), Sampling(max_tokens=1, temperature=0)))
        parts = [part for event in drive(one) if isinstance(event, StepReport) for part in event.parts]
        assert parts[0].cached_tokens == (32 if name == "once-more" else 0)


def test_a_step_like_the_one_before_is_said_in_a_word_until_somebody_comes_or_goes() -> None:
    device = Counting()
    one = Engine(device, device, Limits(4, 64), frozenset({EOS}), max_length=64)
    for name, wanted in (("short", 4), ("long", 9)):
        one.submit(Submit(name, [1, 2], Sampling(max_tokens=wanted, temperature=0, ignore_eos=True)))
    parts = [event.parts for event in drive(one) if isinstance(event, StepReport)]
    assert [len(part) for part in parts] == [2] * 4 + [1] * 5
    assert [part.further if isinstance(part, Onward) else None for part in parts] == [
        None,  # prompts
        None,  # their first decodes
        1,
        2,
        None,  # one has gone
        1,
        2,
        3,
        4,
    ]
    assert [part[-1].context_tokens for part in parts] == [0, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_row_without_a_valid_token_is_said_like_any_row() -> None:
    device = Counting()
    one = Engine(device, device, Limits(4, 64), frozenset({EOS}), max_length=64)
    for name in ("broken", "sound"):
        one.submit(Submit(name, [1, 2], Sampling(max_tokens=9, temperature=0, ignore_eos=True)))
    for _ in range(3):
        one.turn()
    device.answers = {"broken": INVALID_TOKEN}
    (report, *_) = (event for event in one.turn() if isinstance(event, StepReport))
    assert [(part.session_id, part.sampled) for part in report.parts] == [("broken", 0), ("sound", 1)]
