"""Decides what shares the next step: running sequences first, then prompts in chunks under a token budget.

Owns the waiting line and the slots of the cache. Knows no torch, no clock and no tenant; takes plain data.
"""

from collections import deque
from dataclasses import dataclass

from gpumeter_worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """`slots` sequences run at once; a step computes at most `step_tokens` tokens."""

    slots: int
    step_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """`count` tokens of a sequence, from `sequence.computed` on. `samples`: the last of them yields a new token."""

    sequence: Sequence
    count: int
    samples: bool
    prefill: bool


class Scheduler:
    """Continuous batching: every step takes each running sequence one token further and fills up with prompt chunks."""

    def __init__(self, limits: Limits) -> None:
        if limits.slots < 1 or limits.step_tokens < limits.slots:
            raise ValueError("a step must have room for one token of every running sequence")
        self._limits = limits
        self._free = list(range(limits.slots))[::-1]
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
            sequence.slot = self._free.pop()
            self._running.append(sequence)
            prefills.append(_chunk(sequence, budget))
            budget -= prefills[-1].count
        # Neighbours in the cache are read without being gathered first.
        decodes.sort(key=lambda work: work.sequence.slot)
        return decodes + prefills

    def leave(self, sequence: Sequence) -> None:
        """A running sequence is done with its slot; the lowest free slot is used next, which keeps the batch dense."""
        self._running.remove(sequence)
        self._free.append(sequence.slot)
        self._free.sort(reverse=True)

    def cancel(self, session_id: str) -> Sequence | None:
        """Take a sequence out, wherever it is; None when it is not (or no longer) here."""
        for sequence in self._waiting:
            if sequence.session_id == session_id:
                self._waiting.remove(sequence)
                return sequence
        for sequence in self._running:
            if sequence.session_id == session_id:
                self.leave(sequence)
                return sequence
        return None


def _chunk(sequence: Sequence, budget: int) -> Work:
    left = sequence.prompt_length - sequence.computed
    count = min(budget, left)
    return Work(sequence, count, samples=count == left, prefill=True)
