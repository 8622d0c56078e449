"""One request inside the engine: its tokens, where it stands, and how its next token is chosen.

Plain state. Knows no torch, no text and no cache.
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
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep the whole vocabulary.

    Penalties act on the logits before the temperature: `repetition` (1: none) on tokens of prompt and answer,
    `frequency` and `presence` (0: none) on tokens of the answer. `logprobs` None asks for none; a number for the chosen
    token's and for those of that many likeliest ones.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    min_tokens: int = 0
    """Before this many tokens nothing that would end the sequence is chosen."""
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(slots=True, eq=False)
class Prompt:
    """What the choices of one prompt have in common, so that its tokens are counted once and computed once."""

    settled: int = 0
    """How many of its tokens steps have reported as computed or found; all of them where none is to be counted."""
    computing: "Sequence | None" = None
    """Who computes it now, for the others to find it in the cache."""


@dataclass(slots=True, eq=False)
class Sequence:
    """`computed` counts the tokens whose keys and values are in the cache; the rest of `tokens` is still to be run.

    `blocks` are the cache's blocks that hold them, in order. `recompute_until`: up to here the keys and values were
    computed once already and lost by a preemption, so the platform pays for computing them again.
    """

    session_id: str
    choice: int
    tenant: str
    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    computed: int = 0
    recompute_until: int = 0
    cached: int = 0
    """Tokens that were found in the prefix cache and that no step has reported yet."""
    blocks: list[int] = field(default_factory=list)
    random: Random = field(default_factory=Random)
    prompt: Prompt = field(default_factory=Prompt)
    arrival: int = 0
    """Its number in the order of submission: a lower one is older."""
    chain: list[bytes] = field(default_factory=list)
    """The hashes of its first units of tokens, as far as the cache's index needed them."""

    @property
    def prefilling(self) -> bool:
        """Whether more is to be run than its newest token: a part of the prompt, or what a preemption lost."""
        return self.computed < self.prompt_length or self.computed < self.recompute_until

    @property
    def generated(self) -> int:
        """How many tokens it was given."""
        return len(self.tokens) - self.prompt_length


def finish_after(sequence: Sequence, eos_ids: frozenset[int], max_length: int) -> Finish | None:
    """Whether the token that a sequence was just given is its last one."""
    last = sequence.tokens[-1]
    if (last in eos_ids and not sequence.sampling.ignore_eos) or last in sequence.sampling.stop_ids:
        return Finish.STOP
    if sequence.generated >= sequence.sampling.max_tokens or len(sequence.tokens) >= max_length:
        return Finish.LENGTH
    return None
