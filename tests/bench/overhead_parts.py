"""What metering one step costs, part by part, in microseconds of processor time.

Owns the parts and how each is timed: on the real code, for a step of N sequences that decode. Processor time and not
the wall's, because none of these parts waits for anything but the disk, and the disk's wait is another thread's.

What the rows are: `parts` the engine says who shared the step; `wire` the bytes that this adds to the step's message,
written and read; `split` the weights and the exact split; `book` the rest of the meter's step, accounts and running
slices; `journal` records, hashes and the transaction. All are means over a batch whose N sessions begin together, have
64 tokens each and end together: its first step says every sequence, 63 say that all are a token further. `changed` is
what a step costs of which every sequence is said, as where one came or went since the step before.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gpumeter_usage.record import Status
from gpumeter_worker.engine.channel import Known, decode, encode
from gpumeter_worker.engine.loop import Engine, Sampled, _settle
from gpumeter_worker.engine.messages import StepReport, Token
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.engine.sequence import Prompt, Sampling, Sequence
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, split, uncalibrated
from gpumeter_worker.metering.journal import Journal
from gpumeter_worker.metering.meter import Identity, Meter
from gpumeter_worker.metering.parts import Onward, Part

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
    changed: float

    @property
    def total(self) -> float:
        """All of it, of the mean step."""
        return self.parts + self.wire + self.split + self.book + self.journal


def cost_of(sequences: int, rounds: int) -> Cost:
    """Time every part for a step of so many sequences."""
    first, onward = (_Step(sequences, onward=onward).cost(rounds) for onward in (False, True))
    parts, wire, split_us, book = (
        (one + (STEPS_A_SESSION - 1) * other) / STEPS_A_SESSION for one, other in zip(first, onward, strict=True)
    )
    journal = _journal_us(_works_of(sequences), max(3, rounds // 10)) / STEPS_A_SESSION
    return Cost(sequences, parts, wire, split_us, book, journal, changed=sum(first) + journal)


class _Step:
    """A step of decodes, told and booked again and again: in a word, or row by row."""

    def __init__(self, sequences: int, *, onward: bool) -> None:
        self._onward = onward
        self._works = _works_of(sequences)
        self._sampled = [Sampled(1234)] * sequences
        nothing = cast("Any", None)
        self._engine = Engine(nothing, nothing, Limits(sequences, sequences), frozenset(), 4096)
        self._tokens = tuple(Token(work.sequence.session_id, 0, 1234) for work in self._works)
        self._first = tuple(self._told())
        self._meter = _meter_of(sequences)
        self._frontier = itertools.count(START_NS, STEP_NS)
        self._further = itertools.count(1)
        self._sender, self._receiver = Known(), Known()
        self._book(self._first)

    def cost(self, rounds: int) -> tuple[float, float, float, float]:
        """parts, wire, split, book."""
        bare = _us(lambda: self._send(()), rounds)
        self._send(self._first)  # so that both ends know them
        parts = Onward(self._first, 1) if self._onward else self._first
        wire = max(0.0, _us(lambda: self._send(parts), rounds) - bare)
        book = _us(self._next, rounds)
        if (stretch := self._meter._stretch) is not None:
            split_us = _us(lambda: stretch.split(STEP_NS), rounds)
        else:
            loads = [(part.new_tokens, part.context_tokens) for part in self._first]
            split_us = _us(lambda: split(STEP_NS, loads, PROFILE), rounds)
        return _us(self._told, rounds), wire, split_us, max(0.0, book - split_us)

    def _told(self) -> tuple[Part, ...] | Onward:
        if not self._onward:
            self._engine._steady = None
        return self._engine._parts(self._works, self._sampled)

    def _send(self, parts: tuple[Part, ...] | Onward) -> object:
        report = StepReport(1, 2, 1, parts, self._tokens, len(self._tokens), 0)
        return self._receiver.whole(decode(encode(self._sender.short([report]))))

    def _next(self) -> None:
        self._book(Onward(self._first, next(self._further)) if self._onward else self._first)

    def _book(self, parts: tuple[Part, ...] | Onward) -> None:
        started_ns = next(self._frontier)
        self._meter.step(started_ns, started_ns + STEP_NS, STEP_NS, parts)


def _works_of(sequences: int) -> list[Work]:
    works = []
    for number in range(sequences):
        length = 32 + 37 * number % 511
        sequence = Sequence(
            f"s-{number:032x}", 0, "acme", [7] * (length + 1), 32, Sampling(64), prompt=Prompt(settled=32)
        )
        sequence.computed = length
        works.append(Work(sequence, 1, samples=True, prefill=False))
    return works


def _meter_of(sequences: int) -> Meter:
    meter = Meter(IDENTITY, PROFILE, START_NS)
    meter.enter(Phase.SERVING, START_NS)
    for number in range(sequences):
        meter.begin(f"s-{number:032x}", "acme", START_NS)
    return meter


def _journal_us(works: list[Work], rounds: int) -> float:
    """Of a flush that states the ends of all sessions of a batch, and of the beginning and end of each of them."""
    parts = tuple(_settle(work, sampled=True) for work in works)
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
