"""A device that is one of several: what rank 0 does on its own, every other rank is told to do on its.

Owns that all ranks run the same steps in the same order, and that a step which one of them left is nobody's any more.
Stands around a device only where a model is split. Does not know how the ranks are told, nor what they compute.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gpumeter_worker.engine.blocks import Copy, KvBlocks
from gpumeter_worker.engine.faults import RankLost, fault_of
from gpumeter_worker.engine.messages import EngineOptions
from gpumeter_worker.engine.mirror import Clean, Copies, rows_of
from gpumeter_worker.engine.ranks import Ranks
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sequence as EngineSequence

if TYPE_CHECKING:
    from gpumeter_worker.engine.model import Device


class Leading:
    """See model.Device. Raises RankLost where the ranks do not run the same step any more, whatever the reason: then
    nothing that comes later is right, and an error that a smaller step would not have must not look like one of it.
    """

    def __init__(self, device: "Device", ranks: Ranks) -> None:
        device.remarks[:0] = ranks.remarks
        self._device = device
        self._ranks = ranks
        self._owes = False
        self.name, self.uuid = device.name, device.uuid
        self.sequences = device.sequences
        self.mixed_prefill_tokens = device.mixed_prefill_tokens
        self.remarks = device.remarks

    @property
    def cache_tokens(self) -> int:
        """See Device: every rank holds a part of each token."""
        return self._device.cache_tokens

    def blocks(self, prefix: bool) -> KvBlocks:
        """See Device."""
        return self._device.blocks(prefix)

    def stage(self, plan: Sequence[Work]) -> tuple[list[Work], Any]:
        """The other ranks begin at once, before this one's time of the step does."""
        self._begin()
        staged = self._device.stage(plan)
        self._owes = True
        self._ranks.step(rows_of(plan))
        return staged

    def logits(self, staged: Any) -> torch.Tensor:
        """[samples, vocabulary]."""
        with self.agreeing():
            found = self._device.logits(staged)
            self._owes = False
        return found

    def copy(self, copies: Sequence[Copy]) -> None:
        """See Runner.copy."""
        self._begin()
        with self.agreeing():
            self._owes = True
            self._ranks.also(Copies(list(copies)))
            self._device.copy(copies)
            self._owes = False

    def clean(self, sequence: EngineSequence) -> None:
        """See Device."""
        self._begin()
        with self.agreeing():
            self._owes = True
            self._ranks.also(Clean(list(sequence.blocks)))
            self._device.clean(sequence)
            self._owes = False

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Whatever is raised in it is RankLost, with its cause, where the ranks do not agree any more.

        They do not where rank 0 has left what it told the others to do, who wait for what comes no more, and where one
        of the others is lost. Else it is raised as what it is.
        """
        try:
            yield
        except RankLost:
            raise
        except Exception as error:
            why = self._ranks.why()
            if not why and not self._owes:
                raise
            raise RankLost(why or _left(error)) from error

    def _begin(self) -> None:
        if self._owes:
            raise RankLost(self._ranks.why() or "the other ranks are in a step that rank 0 has left")

    def largest(self, step_tokens: int) -> list[list[Work]]:
        """See Device."""
        return self._device.largest(step_tokens)

    def warm_up(self, options: EngineOptions) -> None:
        """Every rank does this by itself, and the same."""
        self._device.warm_up(options)
        self.mixed_prefill_tokens = self._device.mixed_prefill_tokens


def _left(error: Exception) -> str:
    if fault_of(error).memory:
        return "rank 0 had too little memory for a step that the other ranks are in; lower maxModelLen or maxBatchSize"
    return f"rank 0 raised {type(error).__name__} in a step that the other ranks are in"
