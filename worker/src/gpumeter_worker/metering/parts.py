"""Who shared a step: a row for each sequence, or, of a step like the one before, how far its sequences are on.

Owns these two forms and that they say the same. Does not know what a part costs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload


class Part(NamedTuple):
    """One sequence's part in a step. `sampled` counts the tokens that the step gave it.

    `prompt_tokens` counts those of the prompt that are settled by this step, once for all choices of a prompt:
    computed now, or found in the prefix cache (`cached_tokens` of them). `recompute`: the work was done once and lost
    by the platform's own preemption, so no tenant pays for it again.
    """

    session_id: str
    new_tokens: int
    context_tokens: int
    prefill: bool
    sampled: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    recompute: bool = False


_DECODE = (1, False, 1, 0, 0, False)


def all_decode(parts: Sequence[Part]) -> bool:
    """Whether each part is one more token after one that was given before, and its tenant's to pay: nothing else."""
    return {part[1:2] + part[3:] for part in parts} <= {_DECODE}


@dataclass(frozen=True, slots=True)
class Onward(Sequence[Part]):
    """The parts of a step whose sequences are those of an earlier one, in the same order, `further` tokens on.

    All of them decode in both, and there is at least one. Most steps are such: their rows need not be made, sent and
    read one by one. As a sequence it is the rows.
    """

    first: tuple[Part, ...]
    further: int

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[Part]:
        return (Part(one.session_id, 1, one.context_tokens + self.further, False, 1) for one in self.first)

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Part, ...]: ...
    def __getitem__(self, index: int | slice) -> Part | tuple[Part, ...]:
        return tuple(self)[index]
