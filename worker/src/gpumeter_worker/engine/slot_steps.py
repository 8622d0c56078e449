"""Runs planned steps over a cache of slots, one a sequence: how a CPU computes them.

Owns the order of a step's rows and their tensors. The twin of engine.paged_steps for a machine on which memory is
given out by the page anyway, so that contiguous keys are worth more than shared blocks. Does not know how tokens are
chosen from logits, nor any clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch

from gpumeter_worker.engine import attention
from gpumeter_worker.engine.attention import SlotCache, StepContext
from gpumeter_worker.engine.blocks import Copy
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.engine.sequence import Sequence as EngineSequence

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, StepContext], torch.Tensor]
"""tokens [1, rows], positions [1, rows], the rows to keep, the step -> logits [rows kept, vocabulary]."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A step that is ready to run. `order`: its works as its rows stand. `keep`: the rows whose logits are wanted."""

    order: list[Work]
    tokens: torch.Tensor
    keep: torch.Tensor
    context: StepContext
    samples: int


class SlotSteps:
    """The steps of one CPU."""

    def __init__(self, forward: Forward, cache: SlotCache) -> None:
        self._forward = forward
        self.cache = cache
        self._unproven: dict[int, tuple[EngineSequence, int]] = {}
        """By slot, whose keys and values no logits have shown to be numbers yet, and how many they are."""

    def stage(self, plan: Sequence[Work]) -> Staged:
        """Lay a step out."""
        order = attention.order(plan)
        tokens: list[int] = []
        keep: list[int] = []
        for work in order:
            start = work.sequence.computed
            self._own(work)
            tokens += work.sequence.tokens[start : start + work.count]
            if work.samples:
                keep.append(len(tokens) - 1)
        context = attention.step_context(order, self.cache, "cpu")
        # A chunk that yields no token still needs one row, or the model makes logits of all of them.
        return Staged(order, torch.tensor([tokens]), torch.tensor(keep or [0]), context, len(keep))

    def logits(self, staged: Staged) -> torch.Tensor:
        """[samples, vocabulary]."""
        context = staged.context
        return self._forward(staged.tokens, context.positions[None], staged.keep, context)[: staged.samples]

    def copy(self, copies: Sequence[Copy]) -> None:
        """Prefixes that other slots hold, before the step that builds on them."""
        for one in copies:
            attention.copy_slots(self.cache, one.source, one.target, one.tokens)

    def clean(self, sequence: EngineSequence) -> None:
        """Forget what a sequence left in its slot."""
        for layer in (*self.cache.keys, *self.cache.values):
            layer[sequence.blocks[0]].zero_()

    def _own(self, work: Work) -> None:
        """What a sequence left that never came to a token may be no numbers, and padding reads it: so it goes."""
        sequence, slot = work.sequence, work.sequence.blocks[0]
        former, count = self._unproven.pop(slot, (sequence, 0))
        if former is not sequence:
            for layer in (*self.cache.keys, *self.cache.values):
                layer[slot, :, sequence.computed : count].zero_()
        if not work.samples:
            self._unproven[slot] = sequence, sequence.computed + work.count

    def probe(self, counts: Sequence[int], context: int = 0, vocabulary: int = 2) -> list[Work]:
        """Works of sequences that nobody asked for, each of so many tokens after `context` others, a slot each."""
        works = []
        for slot, count in enumerate(counts):
            length = context + count
            tokens = [1 + (7919 * place + 31 * slot) % (vocabulary - 1) for place in range(length)]
            sequence = EngineSequence(
                "", 0, "", tokens, length, Sampling(max_tokens=2), computed=context, random=Random(0)
            )
            sequence.blocks = [slot]
            works.append(Work(sequence, count, samples=True, prefill=count > 1))
        return works
