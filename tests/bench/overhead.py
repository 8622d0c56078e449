"""What metering costs: tokens a second with it and without it, on the real engine, and microseconds a step.

    python -m bench.overhead [--quick] [--model tiny|smollm2] [--sequences 32] [--steps 2400] [--threads 2]

Owns how the two are paired, and the table. `overhead_parts` times each part of a step's metering by itself.

There is no switch in the product that turns metering off, so the bench leaves it out by composing the engine with a
clock that can be told to read nothing, and by not handing the steps to the meter. Both ways run in one process and on
one thread, one after the other within the same batch of sequences: two steps with, four without, two with, and so on
(ABBA), so that whatever slows the machine, and the growing context, meets both alike. What would run beside the next
step in a worker (the API process splits while the engine computes) is in the step's time here: the difference is an
upper bound. Only the journal has a thread of its own, as it has there, because no step ever waits for the disk; a
flush starts with a metered step. Two things are added to the difference as `overhead_parts` finds them: each sequence's
part of the step is put together in both ways, because tokens are counted by it; and a flush is in one of many steps.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.engine_report import machine
from bench.overhead_parts import IDENTITY, PROFILE, Cost, cost_of
from bench.overhead_report import Difference, Quad, difference, tables
from devcluster.layout import REPOSITORY
from devcluster.progress import Progress
from gpumeter_usage.record import Status
from gpumeter_worker.engine.channel import Known, decode, encode
from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import Ended, EngineOptions, Event, StepReport, Submit
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.machine import memory_bytes
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.clock import Anchor, HostClock, StepTime
from gpumeter_worker.metering.journal import Head, Journal
from gpumeter_worker.metering.meter import Meter
from rigs.tinymodel import tiny_model
from rigs.worker import model_path

RAW = REPOSITORY / "build/bench/overhead.json"
COUNTS = (8, 32, 64, 256)
STRETCH = 2
"""Steps of one way in a row: what the first leaves behind in the processor's caches, the second pays too."""

NEW_TOKENS = 128
CHECKPOINT_NS = 5 * 10**9
PERCENT_GOAL = 1.0
MICROSECONDS_GOAL = 50.0


def main() -> int:
    """Measure, print, write the raw numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps, to see that all works")
    parser.add_argument("--model", choices=("tiny", "smollm2"))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    model_name = asked.model or ("tiny" if asked.quick else "smollm2")
    steps = asked.steps or (100 if asked.quick else 2400)
    threads = asked.threads or (1 if asked.quick else 2)
    progress = Progress()
    costs = []
    for count in COUNTS:
        with progress.step(f"a step of {count} sequences, part by part"):
            costs.append(cost_of(count, 30 if asked.quick else 300))
    with tempfile.TemporaryDirectory() as folder:
        with progress.step(f"loading {model_name}"):
            path = tiny_model(Path(folder) / "model") if model_name == "tiny" else model_path()
            arms = Arms(path, Path(folder) / "journal", asked.sequences, threads)
        quads = list(_quads(arms, steps, progress))
        arms.close()
    found = difference(
        quads, asked.sequences, next(cost.parts + cost.journal for cost in _with(costs, asked.sequences))
    )
    where = machine(threads, ())
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(json.dumps(_raw(where, model_name, costs, found, quads), indent=1))
    print(tables(where, model_name, costs, found))
    print(f"\nraw numbers: {RAW}\n")
    if asked.quick:
        print("A quick run: that there are figures means that all works; what they say means nothing.")
    print("\n".join(_figures(costs, found)))
    return 0


class SwitchedClock(HostClock):
    """The host's clock, or none: told not to read, every step is said to have taken no time."""

    reads = True

    def begin(self) -> None:
        """See StepClock."""
        if self.reads:
            super().begin()

    def end(self) -> None:
        """See StepClock."""
        if self.reads:
            super().end()

    def harvest(self) -> list[StepTime]:
        """See StepClock."""
        return super().harvest() if self.reads else [StepTime(0, 0, 0)]


class Arms:
    """One engine whose steps are run with all of metering, or with none of it; sequences come in whole batches."""

    def __init__(self, model: Path, folder: Path, sequences: int, threads: int) -> None:
        from gpumeter_worker.engine.model import ModelRunner  # torch: seconds

        options = EngineOptions(
            model_path=model,
            device="cpu",
            dtype="bfloat16",
            max_model_len=512,
            max_batch_size=sequences,
            max_batch_tokens=2048,
            max_wait_ms=0,
            threads=threads,
            memory_bytes=memory_bytes(),
            prefix_cache=False,
        )
        runner = ModelRunner(options)
        self.clock = SwitchedClock()
        runner.warm_up(self.clock)
        self._engine = Engine(runner, self.clock, runner.limits, frozenset(), runner.max_model_len, runner.blocks())
        self._sequences = sequences
        self._anchor = Anchor.now()
        now_ns = self._anchor.utc_ns(time.monotonic_ns())
        self._meter = Meter(IDENTITY, PROFILE, now_ns)
        folder.mkdir()
        self._journal = Journal(folder, IDENTITY, now_ns)
        self._meter.enter(Phase.SERVING, now_ns)
        self._writing = ThreadPoolExecutor(1, "journal-write")
        self._writes: list[Future[Head]] = []
        self._flushed_ns = time.monotonic_ns()
        self._sender, self._receiver = Known(), Known()
        self._batch = 0
        self.delivered = 0

    def start_batch(self) -> None:
        """Submit a batch and run its prompts; what follows are decodes alone."""
        self._batch += 1
        for number in range(self._sequences):
            name = f"s-{self._batch:016x}{number:016x}"
            self._meter.begin(name, "acme", self._anchor.utc_ns(time.monotonic_ns()))
            prompt = [1000 + (17 * number + 29 * place + self._batch) % 30_000 for place in range(32)]
            self._engine.submit(Submit(name, prompt, Sampling(NEW_TOKENS, temperature=0.0, ignore_eos=True)))
        before = self.delivered
        while self.delivered < before + self._sequences:
            self.turn(metered=True)

    def end_batch(self) -> None:
        """Run it out."""
        while self._engine.busy:
            self.turn(metered=True)

    def turn(self, *, metered: bool) -> int:
        """One step, from the plan to its tokens on the other side of the channel; how long it took."""
        self.clock.reads = metered
        began_ns = time.perf_counter_ns()
        if metered and time.monotonic_ns() - self._flushed_ns > CHECKPOINT_NS:
            self._flush()
        events = self._engine.turn()
        received: list[Event]
        if metered:
            received = self._receiver.whole(decode(encode(self._sender.short(events))))
        else:
            received = decode(
                encode([replace(one, parts=()) if isinstance(one, StepReport) else one for one in events])
            )
        for event in received:
            if isinstance(event, StepReport):
                self.delivered += len(event.tokens)
                if metered:
                    started_ns, ended_ns = self._anchor.utc_ns(event.started_ns), self._anchor.utc_ns(event.ended_ns)
                    self._meter.step(started_ns, ended_ns, event.gpu_ns, event.parts)
            elif isinstance(event, Ended):
                at_ns = self._anchor.utc_ns(time.monotonic_ns())
                self._meter.end(event.session_id, Status.FINISHED, at_ns)
        return time.perf_counter_ns() - began_ns

    def close(self) -> None:
        """Journal the rest: what was metered must be a bill, or it was not metering that was measured."""
        self._flush()
        self._writing.shutdown()
        for write in self._writes:
            write.result()
        self._journal.close()

    def _flush(self) -> None:
        self._flushed_ns = time.monotonic_ns()
        if (flush := self._meter.cut(self._anchor.utc_ns(self._flushed_ns))) is not None:
            self._writes.append(self._writing.submit(self._journal.append, flush))


@dataclass
class _Stretches:
    """Steps of both ways in the order ABBA; `quads` are whole ones."""

    arms: Arms

    def quad(self) -> Quad:
        """Two stretches with metering, two without."""
        with_ns = without_ns = 0
        for metered in (True, False, False, True):
            for _ in range(STRETCH):
                taken_ns = self.arms.turn(metered=metered)
                if metered:
                    with_ns += taken_ns
                else:
                    without_ns += taken_ns
        return Quad(2 * STRETCH, with_ns, without_ns)


def _quads(arms: Arms, steps: int, progress: Progress) -> Iterator[Quad]:
    a_quad = 4 * STRETCH
    a_batch = (NEW_TOKENS - 2) // a_quad
    stretches = _Stretches(arms)
    done = 0
    while done < steps:
        with progress.step(f"steps with and without metering, {done} of {steps}"):
            arms.start_batch()
            for _ in range(a_batch):
                yield stretches.quad()
            arms.end_batch()
        done += a_batch * a_quad


def _with(costs: list[Cost], sequences: int) -> Iterator[Cost]:
    yield from (cost for cost in costs if cost.sequences == sequences)
    yield cost_of(sequences, 30)


def _raw(where: dict[str, object], model: str, costs: list[Cost], found: Difference, quads: list[Quad]) -> object:
    return {
        "machine": where,
        "model": model,
        "microseconds_a_step": [asdict(cost) | {"total": cost.total} for cost in costs],
        "difference": asdict(found),
        "quads": [(quad.with_ns, quad.without_ns) for quad in quads],
    }


def _figures(costs: list[Cost], found: Difference) -> list[str]:
    at_32 = next(cost.total for cost in costs if cost.sequences == 32)
    us_met = "met" if at_32 <= MICROSECONDS_GOAL else "short"
    percent_met = "met" if found.high_percent < PERCENT_GOAL else "short"
    return [
        f"overhead-step-32 {at_32:.1f} us <={MICROSECONDS_GOAL:g} {us_met}",
        f"overhead-tokens {found.percent:.2f} % <{PERCENT_GOAL:g} {percent_met}",
    ]


if __name__ == "__main__":
    sys.exit(main())
