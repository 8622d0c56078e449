"""What metering one step costs, part by part, in microseconds of processor time.

Owns the parts and how each is timed: on the real code, for a step of N sequences that decode. Processor time and not
the wall's, because none of these parts waits for anything but the disk, and the disk's wait is another thread's.

What the rows are: `parts` the engine says what each sequence did in the step; `wire` the bytes that this adds to the
step's message, written and read; `split` the weights and the exact split; `book` the rest of the meter's step, accounts
and running slices; `journal` records, hashes and the transaction, of a batch whose N sessions of 64 tokens all end.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpumeter_usage.record import Status
from gpumeter_worker.engine.channel import decode, encode
from gpumeter_worker.engine.loop import _settle
from gpumeter_worker.engine.messages import StepReport, Token
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Prompt, Sampling, Sequence
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, split, uncalibrated
from gpumeter_worker.metering.journal import Journal
from gpumeter_worker.metering.meter import Identity, Meter, Part

STEPS_A_SESSION = 64
START_NS = 1_795_255_200 * 10**9 + 7
STEP_NS = 1_000_003
"""Short, so that no minute's edge falls into a round: what an edge costs is a flush, which is counted by itself."""

PROFILE = uncalibrated(Rule.KNEE, "host")
IDENTITY = Identity("pod-uid", "0" * 32, "team-a/smollm2", "smollm2", "h100", "host")


@dataclass(frozen=True)
class Cost:
    """Microseconds of processor time a step."""

    sequences: int
    parts: float
    wire: float
    split: float
    book: float
    journal: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.parts + self.wire + self.split + self.book + self.journal


def cost_of(sequences: int, rounds: int) -> Cost:
    """Time every part for a step of so many sequences."""
    works, parts, tokens = _step_of(sequences)
    bare = StepReport(1, 2, 1, (), tokens, sequences, 0)
    whole = StepReport(1, 2, 1, parts, tokens, sequences, 0)
    loads = [(part.new_tokens, part.context_tokens) for part in parts]
    split_us = _us(lambda: split(STEP_NS, loads, PROFILE), rounds)
    meter = _meter_of(sequences)
    frontier = itertools.count(START_NS, STEP_NS)

    def step() -> None:
        started_ns = next(frontier)
        meter.step(started_ns, started_ns + STEP_NS, STEP_NS, parts)

    return Cost(
        sequences,
        parts=_us(lambda: [_settle(work, sampled=True) for work in works], rounds),
        wire=max(0.0, _us(lambda: decode(encode([whole])), rounds) - _us(lambda: decode(encode([bare])), rounds)),
        split=split_us,
        book=max(0.0, _us(step, rounds) - split_us),
        journal=_journal_us(sequences, parts, max(3, rounds // 10)) / STEPS_A_SESSION,
    )


def _step_of(sequences: int) -> tuple[list[Work], tuple[Part, ...], tuple[Token, ...]]:
    works = []
    for number in range(sequences):
        length = 32 + 37 * number % 511
        sequence = Sequence(
            f"s-{number:032x}", 0, "acme", [7] * (length + 1), 32, Sampling(64), prompt=Prompt(settled=32)
        )
        sequence.computed = length
        works.append(Work(sequence, 1, samples=True, prefill=False))
    parts = tuple(_settle(work, sampled=True) for work in works)
    return works, parts, tuple(Token(part.session_id, 0, 1234) for part in parts)


def _meter_of(sequences: int) -> Meter:
    meter = Meter(IDENTITY, PROFILE, START_NS)
    meter.enter(Phase.SERVING, START_NS)
    for number in range(sequences):
        meter.begin(f"s-{number:032x}", "acme", START_NS)
    return meter


def _journal_us(sequences: int, parts: tuple[Part, ...], rounds: int) -> float:
    """Of a flush that states the ends of all sessions of a batch, and of the beginning and end of each of them."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), IDENTITY, START_NS)
        meter = Meter(IDENTITY, PROFILE, START_NS)
        meter.enter(Phase.SERVING, START_NS)
        at_ns = START_NS
        taken: list[float] = []
        for _ in range(rounds):
            began = time.thread_time_ns()
            for part in parts:
                meter.begin(part.session_id, "acme", at_ns)
            spent_ns = time.thread_time_ns() - began
            meter.step(at_ns, at_ns + STEP_NS, STEP_NS, parts)
            at_ns += STEP_NS
            began = time.thread_time_ns()
            for part in parts:
                meter.end(part.session_id, Status.FINISHED, at_ns)
            if (flush := meter.cut(at_ns)) is not None:
                journal.append(flush)
            taken.append(spent_ns + time.thread_time_ns() - began)
        journal.close()
    return _typical(taken) / 1e3


def _us(call: Callable[[], object], rounds: int) -> float:
    """Of one call, over many rounds of ten."""
    means = []
    for _ in range(rounds):
        began = time.thread_time_ns()
        for _ in range(10):
            call()
        means.append((time.thread_time_ns() - began) / 10)
    return _typical(means) / 1e3


def _typical(values: list[float]) -> float:
    """The lower quartile: whatever else runs makes a round longer and never shorter."""
    return statistics.quantiles(values, n=4)[0]
