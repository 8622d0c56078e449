"""Scheduler and loop without torch: who shares a step, and in which order things are reported."""

from collections.abc import Sequence as Row

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumeter_worker.engine.blocks import Copy, SlotBlocks
from gpumeter_worker.engine.loop import INVALID_TOKEN, Engine, Sampled
from gpumeter_worker.engine.messages import Cancel, Ended, Event, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits, Scheduler, Work
from gpumeter_worker.engine.sequence import Finish, Sampling, Sequence
from gpumeter_worker.metering.clock import StepClock, StepTime

EOS = 99


class Counting:
    """A runner whose tokens are the sequence's length; a device on which every step takes ten units."""

    kind = "host"

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
