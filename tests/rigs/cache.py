"""A device without a model: it writes down which prefix lies where in the cache, and refuses to read anything else.

Keys and values of a token depend on all tokens before it. So the cell of a token holds a name of its whole prefix and
of the tenant that wrote it, and a step checks every cell that attention would read. The next token is a function of
the prefix alone: whatever shares a batch, a sequence's tokens are known beforehand.
"""

from collections.abc import Sequence as Row
from typing import NamedTuple

from gpumeter_worker.engine.blocks import Copy
from gpumeter_worker.engine.loop import Sampled
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sequence
from gpumeter_worker.metering.clock import StepClock, StepTime

VOCABULARY = 50


class Ran(NamedTuple):
    """One work of a step, as it was when the step ran."""

    session_id: str
    choice: int
    start: int
    count: int
    prefill: bool
    samples: bool
    recompute: bool


def next_token(tokens: Row[int]) -> int:
    """What this model says after these tokens."""
    name = 0
    for token in tokens:
        name = _name(name, token)
    return name % VOCABULARY


def _name(before: int, token: int) -> int:
    return (before * 1_000_003 + token + 1) % (2**61 - 1)


class RecordingCache:
    """Runner and clock in one. A step takes ten units of time and is known at once."""

    kind = "host"
    begun = 0
    drift_ppb = None

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.cells: dict[tuple[int, int], tuple[str, int]] = {}
        self.steps: list[list[Ran]] = []
        self.copies: list[Copy] = []
        self.out_of_memory = False
        self._names: dict[Sequence, list[int]] = {}
        self._times: list[StepTime] = []

    def copy(self, copies: Row[Copy]) -> None:
        for source, target, tokens in copies:
            for offset in range(tokens):
                self.cells[target, offset] = self.cells[source, offset]
        self.copies += copies

    def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
        assert plan, "a step of nothing"
        holders: dict[int, set[Sequence]] = {}
        for work in plan:
            for block in work.sequence.blocks:
                holders.setdefault(block, set()).add(work.sequence)
        for work in plan:
            for place in range(work.sequence.computed, work.sequence.computed + work.count):
                block, offset = self._cell(work.sequence, place)
                assert holders[block] == {work.sequence}, "a block is written that another sequence holds, too"
                self.cells[block, offset] = self._content(work.sequence, place)
        if self.out_of_memory:  # in the middle of a step: it has written, and says nothing
            self.out_of_memory = False
            raise MemoryError
        for work in plan:  # all rows are written before attention reads
            for place in range(work.sequence.computed + work.count):
                found = self.cells.get(self._cell(work.sequence, place))
                assert found == self._content(work.sequence, place), "a cell does not hold the sequence's own prefix"
        self.steps.append([_row(work) for work in plan])
        self._times.append(StepTime(10 * len(self.steps), 10 * len(self.steps) + 10, 10))
        return [Sampled(self._prefixes(work.sequence)[-1] % VOCABULARY) for work in plan if work.samples]

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def abort(self) -> bool:
        return False

    def harvest(self) -> list[StepTime]:
        times, self._times = self._times, []
        return times

    def _cell(self, sequence: Sequence, place: int) -> tuple[int, int]:
        return sequence.blocks[place // self.block_tokens], place % self.block_tokens

    def _content(self, sequence: Sequence, place: int) -> tuple[str, int]:
        return sequence.tenant, self._prefixes(sequence)[place]

    def _prefixes(self, sequence: Sequence) -> list[int]:
        names = self._names.setdefault(sequence, [])
        for token in sequence.tokens[len(names) :]:
            names.append(_name(names[-1] if names else 0, token))
        return names


def _row(work: Work) -> Ran:
    sequence = work.sequence
    return Ran(
        sequence.session_id,
        sequence.choice,
        sequence.computed,
        work.count,
        work.prefill,
        work.samples,
        work.recompute,
    )
