"""What the API process and the engine process say to each other: plain data on a channel of two directions.

Owns the vocabulary; knows no transport. Times are readings of CLOCK_MONOTONIC, which both processes share.
"""

from dataclasses import dataclass
from pathlib import Path

from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.meter import Part


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


@dataclass(frozen=True, slots=True)
class Submit:
    """Run this. The API process has checked it against what `Ready` said."""

    session_id: str
    prompt: list[int]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop this one before the next step. The engine always answers with `Ended`, unless it ended already."""

    session_id: str


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


@dataclass(frozen=True, slots=True)
class StepReport:
    """A finished step: what it took, who shared it, and the tokens that came out of it."""

    started_ns: int
    ended_ns: int
    gpu_ns: int
    parts: tuple[Part, ...]
    tokens: tuple[tuple[str, int], ...]
    running: int
    kv_tokens: int
    """Tokens in the cache after the step."""


@dataclass(frozen=True, slots=True)
class Ended:
    """No later step holds this session. Comes after every step that did."""

    session_id: str
    finish: Finish
    message: str = ""


@dataclass(frozen=True, slots=True)
class Fatal:
    """The engine cannot start here; trying again will not help."""

    reason: str
    message: str


Event = PhaseEntered | Ready | StepReport | Ended | Fatal
