"""What the API process and the engine process say to each other: plain data on a channel of two directions.

Owns the vocabulary; knows no transport. Times are readings of CLOCK_MONOTONIC, which both processes share.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.calibration import Calibration
from gpumeter_worker.metering.parts import Onward, Part


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine process is started with. `device` is "cpu" or "cuda"; never one instead of the other."""

    model_path: Path
    device: str
    dtype: str
    max_model_len: int  # 0: what the model says, bounded
    max_batch_size: int
    max_batch_tokens: int
    max_wait_ms: int
    threads: int
    memory_bytes: int  # what the cache may not exceed on a CPU; 0: unknown
    sequences_max: int = 16_384  # what admission lets through, running or waiting
    cuda_graphs: bool = True
    compile: bool = False
    prefix_cache: bool = True
    allow_pickle: bool = False
    calibration_ms: int = 0  # how long planned steps may be timed before readiness; 0: not at all
    ranks: int = 1  # processes, with a device each, that the model is split over
    profiles_dir: Path | None = None  # where a former start may have left what they would tell


@dataclass(frozen=True, slots=True)
class Submit:
    """Run this. The API process has checked it against what `Ready` said."""

    session_id: str
    prompt: list[int]
    sampling: Sampling
    choice: int = 0
    """A session may ask for several sequences at once: several choices, or several prompts."""
    tenant: str = ""
    """Who shares the GPU fairly with whom; the engine knows no more about it."""
    counts_prompt: bool = True
    """False for a further choice of a prompt that was submitted already."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a session, or one choice of it, before the next step. Every sequence answers with `Ended`, unless it did."""

    session_id: str
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave after the step that runs."""


Command = Submit | Cancel | Shutdown


@dataclass(frozen=True, slots=True)
class PhaseEntered:
    """The engine loads, then warms up."""

    phase: Phase
    at_ns: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine serves; what admission must know about it."""

    at_ns: int
    max_model_len: int
    max_batch_size: int
    vocabulary: int
    eos_ids: frozenset[int]
    device_name: str
    gpu_uuid: str
    dtype: str
    cache_tokens: int
    """How many tokens the cache holds, all sequences together."""
    kv_token_bytes: int = 0
    """What one token takes of the cache, keys and values of all layers."""
    remarks: tuple[str, ...] = ()
    """Sentences about what was asked for and is not so: a compile that failed, for example."""
    calibration: Calibration | None = None
    """What its steps cost; None: it was not asked to find out."""


class Token(NamedTuple):
    """A token that a step gave a sequence. `top` holds the likeliest ones with their natural log probabilities."""

    session_id: str
    choice: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepReport:
    """A finished step: what it took, who shared it, and the tokens that came out of it."""

    started_ns: int
    ended_ns: int
    gpu_ns: int
    parts: tuple[Part, ...] | Onward
    tokens: tuple["Token", ...]
    running: int
    kv_tokens: int
    """Tokens in the cache after the step."""
    drift_ppb: int | None = None
    """How much faster than the host's clock the device's runs, in parts per billion; None where nobody knows."""

    @property
    def new_tokens(self) -> int:
        """Tokens that the step computed."""
        parts = self.parts
        return len(parts) if isinstance(parts, Onward) else sum([part.new_tokens for part in parts])

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts that it settled."""
        return 0 if isinstance(self.parts, Onward) else sum([part.prompt_tokens for part in self.parts])


@dataclass(frozen=True, slots=True)
class Ended:
    """No later step holds this sequence. Comes after every step that did."""

    session_id: str
    finish: Finish
    choice: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Fatal:
    """The engine cannot start here; trying again will not help."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine ends, because only a new process can go on. `cause` quotes no request."""

    cause: str
    killed_by: int = 0
    """The signal by which somebody ended one of its ranks, where that is why; 0 else."""


Event = PhaseEntered | Ready | StepReport | Ended | Fatal | Failed
