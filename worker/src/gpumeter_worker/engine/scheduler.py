"""Decides what shares the next step: running sequences first, then prompts in chunks under a token budget.

Owns the waiting line and the slots of the cache. Knows no torch, no clock and no tenant; takes plain data.
"""

from collections import deque
from dataclasses import dataclass

from gpumeter_worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """`sequences` run at once; a step computes at most `step_tokens` tokens."""

    sequences: int
    step_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """`count` tokens of a sequence, from `sequence.computed` on. `samples`: the last of them yields a new token.

    `recompute`: they were computed before and lost by a preemption.
    """

    sequence: Sequence
    count: int
    samples: bool
    prefill: bool
    recompute: bool = False


class Scheduler:
    """Continuous batching: every step takes each running sequence one token further and fills up with prompt chunks."""

    def __init__(self, limits: Limits) -> None:
        if limits.sequences < 1 or limits.step_tokens < limits.sequences:
            raise ValueError("a step must have room for one token of every running sequence")
        self._limits = limits
        self._free = list(range(limits.sequences))[::-1]
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        """How many sequences have not been in a step yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many sequences hold a slot."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """First come, first served."""
        self._waiting.append(sequence)

    def plan(self) -> list[Work]:
        """What the next step computes, decodes first; empty when there is nothing to do."""
        budget = self._limits.step_tokens
        decodes = [Work(one, 1, samples=True, prefill=False) for one in self._running if not one.prefilling]
        budget -= len(decodes)
        prefills = []
        for sequence in self._running:
            if sequence.prefilling and budget > 0:
                prefills.append(_chunk(sequence, budget))
                budget -= prefills[-1].count
        while self._waiting and self._free and budget > 0:
            sequence = self._waiting.popleft()
            sequence.blocks = [self._free.pop()]
            self._running.append(sequence)
            prefills.append(_chunk(sequence, budget))
            budget -= prefills[-1].count
        # Neighbours in the cache are read without being gathered first.
        decodes.sort(key=lambda work: work.sequence.blocks)
        return decodes + prefills

    def leave(self, sequence: Sequence) -> None:
        """A running sequence is done with its slot; the lowest free slot is used next, which keeps the batch dense."""
        self._running.remove(sequence)
        self._free.append(sequence.blocks[0])
        self._free.sort(reverse=True)

    def cancel(self, session_id: str, choice: int | None) -> list[Sequence]:
        """Take a session's sequences out, or one of them, wherever they are; those that were still here."""

        def meant(sequence: Sequence) -> bool:
            return sequence.session_id == session_id and choice in (None, sequence.choice)

        gone = [one for one in self._waiting if meant(one)]
        for sequence in gone:
            self._waiting.remove(sequence)
        for sequence in [one for one in self._running if meant(one)]:
            self.leave(sequence)
            gone.append(sequence)
        return gone

    def computed(self, sequence: Sequence) -> None:
        """A step has moved this sequence on."""

    @property
    def cache_tokens(self) -> int:
        """Tokens of running sequences in the cache."""
        return sum(sequence.computed for sequence in self._running)


def _chunk(sequence: Sequence, budget: int) -> Work:
    left = sequence.prompt_length - sequence.computed
    count = min(budget, left)
    return Work(sequence, count, samples=count == left, prefill=True)
