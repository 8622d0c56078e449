"""How far the host runs ahead of a device that is not waited for: one step, so that a cancel is worth something."""

from collections.abc import Sequence as Row

from gpumeter_worker.engine.blocks import Copy, PagedBlocks
from gpumeter_worker.engine.loop import Engine, Sampled
from gpumeter_worker.engine.messages import Cancel, Ended, Event, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.clock import CudaClock, StepClock
from rigs.events import VirtualDevice

STEP_NS = 20 * 10**6


class Launching:
    """Launches a step and goes on; where tokens are drawn it waits for the device, as whoever reads them must."""

    def __init__(self, device: VirtualDevice) -> None:
        self.device = device
        self.plans: list[list[str]] = []

    def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
        self.plans.append([work.sequence.session_id for work in plan])
        clock.begin()
        self.device.work(STEP_NS)
        clock.end()
        sampling = [work for work in plan if work.samples]
        if sampling:
            self.device.finish()
        return [Sampled(len(work.sequence.tokens)) for work in sampling]

    def copy(self, copies: Row[Copy]) -> None:
        raise AssertionError("nothing is shared here")


def serving() -> tuple[Engine, Launching]:
    device = VirtualDevice()
    runner = Launching(device)
    clock = CudaClock(64, device.event, device.read)
    return Engine(runner, clock, Limits(8, 64), frozenset(), 4096, PagedBlocks(256, 16, prefix=False)), runner


def ask(name: str, prompt_tokens: int) -> Submit:
    return Submit(name, list(range(prompt_tokens)), Sampling(max_tokens=4, temperature=0))


def turns(engine: Engine, count: int) -> list[Event]:
    return [event for _ in range(count) for event in engine.turn()]


def test_of_a_long_prompt_two_steps_are_launched_and_a_cancel_leaves_no_more_to_bill() -> None:
    engine, runner = serving()
    engine.submit(ask("long", 3000))
    assert engine.stepping
    assert turns(engine, 20) == []
    assert len(runner.plans) == 2
    assert engine.busy
    assert not engine.stepping, "whoever turns it may wait until the device is through with one"
    engine.cancel(Cancel("long"))
    runner.device.finish()
    events = turns(engine, 20)
    assert [type(event) for event in events] == [StepReport, StepReport, Ended]
    assert events[-1] == Ended("long", Finish.CANCELLED)
    assert not engine.busy
    assert len(runner.plans) == 2


def test_the_next_step_is_launched_as_soon_as_the_device_is_through_with_one() -> None:
    engine, runner = serving()
    engine.submit(ask("long", 3000))
    turns(engine, 5)
    for launched in range(3, 10):
        runner.device.now_ns += STEP_NS + 10_000
        assert len([event for event in turns(engine, 5) if isinstance(event, StepReport)]) == 1
        assert len(runner.plans) == launched


def test_a_short_prompt_stands_behind_no_more_than_what_was_launched() -> None:
    engine, runner = serving()
    engine.submit(ask("long", 3000))
    turns(engine, 5)
    engine.submit(ask("short", 8))
    runner.device.finish()
    turns(engine, 5)
    assert "short" in runner.plans[2]
