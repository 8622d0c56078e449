"""One request inside the engine: its tokens, where it stands, and how its next token is chosen.

Plain state. Knows no torch, no text and no tenant.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from random import Random


class Finish(StrEnum):
    """Why a sequence left the engine."""

    STOP = "stop"  # the model ended it
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep the whole vocabulary."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """`computed` counts the tokens whose keys and values are in the cache; the rest of `tokens` is still to be run."""

    session_id: str
    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    computed: int = 0
    slot: int = -1
    random: Random = field(default_factory=Random)

    @staticmethod
    def of(session_id: str, prompt: list[int], sampling: Sampling) -> "Sequence":
        """A sequence that waits for its first step."""
        return Sequence(session_id, list(prompt), len(prompt), sampling, random=Random(sampling.seed))

    @property
    def prefilling(self) -> bool:
        """Whether a part of the prompt is still to be run."""
        return self.computed < self.prompt_length

    @property
    def generated(self) -> int:
        """How many tokens it was given."""
        return len(self.tokens) - self.prompt_length


def finish_after(sequence: Sequence, eos_ids: frozenset[int], max_length: int) -> Finish | None:
    """Whether the token that a sequence was just given is its last one."""
    if sequence.tokens[-1] in eos_ids and not sequence.sampling.ignore_eos:
        return Finish.STOP
    if sequence.generated >= sequence.sampling.max_tokens or len(sequence.tokens) >= max_length:
        return Finish.LENGTH
    return None
