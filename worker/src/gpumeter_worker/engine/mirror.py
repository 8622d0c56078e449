"""What rank 0 tells the other ranks of a split model, so that each lays out the same step over its own share.

Owns the form in which works travel and how they are made again. Pure: knows no torch and no process. A rank gets only
what laying out a step needs of a sequence: where its keys and values lie, and the tokens that the step computes.
"""

from array import array
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from gpumeter_worker.engine.blocks import Copy
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.engine.sequence import Sequence as EngineSequence

_SAMPLING = Sampling(max_tokens=1)
_RANDOM = Random(0)
"""Only rank 0 samples. A generator of its own for every sequence would be seeded by the kernel, which takes five times
as long as all the rest, and rank 0 would wait for it."""


class Row(NamedTuple):
    """One work. `tokens` are those that it computes, from `computed` on."""

    session_id: str
    choice: int
    computed: int
    tokens: list[int]
    blocks: "array[int]"
    samples: bool
    prefill: bool


class Step(NamedTuple):
    """Lay out these works and run them."""

    number: int
    rows: list[Row]


class Copies(NamedTuple):
    """Copy within the cache before the next step."""

    copies: list[Copy]


class Clean(NamedTuple):
    """Forget what lies in a sequence's blocks."""

    blocks: list[int]


Told = Step | Copies | Clean


def rows_of(plan: Sequence[Work]) -> list[Row]:
    """A plan as it travels."""
    rows = []
    for work in plan:
        sequence, start = work.sequence, work.sequence.computed
        rows.append(
            Row(
                sequence.session_id,
                sequence.choice,
                start,
                sequence.tokens[start : start + work.count],
                array("i", sequence.blocks),
                work.samples,
                work.prefill,
            )
        )
    return rows


class Mirror:
    """Makes works of rows again. A sequence that stays where it was is the same object from step to step, because a
    cache of slots looks at whose a slot was before."""

    def __init__(self) -> None:
        self._held: dict[int, EngineSequence] = {}

    def works(self, rows: Sequence[Row]) -> list[Work]:
        """As rank 0 planned them, in its order."""
        return [Work(self._sequence(row), len(row.tokens), row.samples, row.prefill) for row in rows]

    def _sequence(self, row: Row) -> EngineSequence:
        place = row.blocks[0]
        held = self._held.get(place)
        # Planned steps of nobody have no session, and several of them may lie in one place; so may all that share the
        # blocks of a prefix, where no cache of slots is.
        if held is None or not row.session_id or (held.session_id, held.choice) != (row.session_id, row.choice):
            held = EngineSequence(row.session_id, row.choice, "", [], 0, _SAMPLING, random=_RANDOM)
            self._held[place] = held
        held.tokens, held.blocks, held.computed = Given(row.computed, row.tokens), row.blocks.tolist(), row.computed
        return held


class Given(list[int]):
    """The tokens of a sequence from the place `first` on, asked for by their places in the whole of it."""

    def __init__(self, first: int, tokens: list[int]) -> None:
        super().__init__(tokens)
        self._first = first

    def __getitem__(self, at):  # type: ignore[no-untyped-def]
        """A slice that begins at `first` or later; nothing else was sent."""
        if not isinstance(at, slice) or at.start is None or at.stop is None or at.start < self._first:
            raise IndexError(f"of this sequence only tokens from {self._first} on were sent")
        return super().__getitem__(slice(at.start - self._first, at.stop - self._first))
