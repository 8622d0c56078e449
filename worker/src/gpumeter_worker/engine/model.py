"""Runs planned steps of a model on its device, and what has to be run before the first of them.

Joins a loaded model, a device and the sampler. Does not know sessions, tenants or the channel; raises LoadFailed with
a reason and a sentence where the machine or the files are wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any, Protocol

import torch
import transformers

from gpumeter_worker import machine
from gpumeter_worker.engine import attention, gpu, paged_attention
from gpumeter_worker.engine.blocks import Copy, KvBlocks
from gpumeter_worker.engine.examining import examine
from gpumeter_worker.engine.faults import RankLost
from gpumeter_worker.engine.interface import AttentionUnsupported
from gpumeter_worker.engine.leading import Leading
from gpumeter_worker.engine.loading import Loaded, LoadFailed, load
from gpumeter_worker.engine.loop import INVALID_TOKEN, Sampled
from gpumeter_worker.engine.messages import EngineOptions, Ready
from gpumeter_worker.engine.on_cpu import Cpu
from gpumeter_worker.engine.on_gpu import Gpu
from gpumeter_worker.engine.ranks import Ranks
from gpumeter_worker.engine.sampling import Sampler, choose, read
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.engine.sequence import Sequence as EngineSequence
from gpumeter_worker.engine.sharding import Seat, join
from gpumeter_worker.failure import MODEL_INVALID, OUT_OF_MEMORY, first_line
from gpumeter_worker.metering.calibration import Subject
from gpumeter_worker.metering.clock import StepClock
from gpumeter_worker.modelfiles import description_digest

__all__ = ["LoadFailed", "ModelRunner", "on_device", "warm_up"]


class Device(Protocol):
    """A CPU or a GPU with a model on it. `stage` is what comes before a step's time begins, `logits` what it lasts."""

    name: str
    uuid: str
    sequences: int
    mixed_prefill_tokens: int
    remarks: list[str]

    @property
    def cache_tokens(self) -> int:
        """How many tokens the cache holds, all sequences together."""

    def blocks(self, prefix: bool) -> KvBlocks:
        """Whose tokens lie where in this cache."""

    def stage(self, plan: Sequence[Work]) -> tuple[list[Work], Any]:
        """A step on its way to the device, and its works in the order of its logits."""

    def logits(self, staged: Any) -> torch.Tensor:
        """[samples, vocabulary]."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """See Runner.copy."""

    def clean(self, sequence: EngineSequence) -> None:
        """Its keys and values may be no numbers, and what is masked for others must still be one."""

    def largest(self, step_tokens: int) -> list[list[Work]]:
        """Steps to warm up with."""

    def warm_up(self, options: EngineOptions) -> None:
        """What is compiled, captured and measured before readiness."""


class ModelRunner:
    """A loaded model with its cache. One step at a time, on one stream. With `ranks` this is rank 0 of a split one."""

    def __init__(self, options: EngineOptions, ranks: Ranks | None = None) -> None:
        self._options = options
        seat = None if ranks is None else Seat(0, ranks.size, ranks.store)
        self._loaded, self._device = on_device(options, seat)
        self._agreeing: Callable[[], AbstractContextManager[None]] = nullcontext
        if ranks is not None:
            self._device = leading = Leading(self._device, ranks)
            self._agreeing = leading.agreeing
        self.max_model_len = self._loaded.max_model_len
        self._sampler = Sampler(self._loaded.vocabulary, self._loaded.eos_ids, options.device)

    @property
    def limits(self) -> Limits:
        """What the scheduler must keep to on this device."""
        options = self._options
        return Limits(
            self._device.sequences, options.max_batch_tokens, self._device.mixed_prefill_tokens, options.sequences_max
        )

    def blocks(self) -> KvBlocks:
        """Whose tokens lie where in the cache."""
        return self._device.blocks(self._options.prefix_cache)

    @property
    def cache_tokens(self) -> int:
        """How many tokens the cache holds, all sequences together."""
        return self._device.cache_tokens

    def subject(self) -> Subject:
        """All that the costs of this runner's steps depend on."""
        options, on_cpu = self._options, self._options.device == "cpu"
        return Subject(
            model=description_digest(options.model_path),
            dtype=str(self._loaded.dtype).removeprefix("torch."),
            device=machine.processor() if on_cpu else self._device.name,
            torch=torch.__version__,
            transformers=transformers.__version__,
            engine=version("gpumeter-worker"),
            options=(
                # As they were asked for: how many sequences fit depends on what memory is free at this start.
                f"threads {options.threads if on_cpu else 0}, memory {options.memory_bytes if on_cpu else 0}, "
                f"graphs {int(options.cuda_graphs and not on_cpu)}, compile {int(options.compile)}, "
                f"{f'ranks {options.ranks}, ' if options.ranks > 1 else ''}"
                f"sequences {options.max_batch_size}, step {options.max_batch_tokens}, length {self.max_model_len}"
            ),
        )

    def copy(self, copies: Sequence[Copy]) -> None:
        """See Runner."""
        with torch.inference_mode():
            self._device.copy(copies)

    def run(self, plan: Sequence[Work], clock: StepClock) -> list[Sampled]:
        """One forward pass over the packed rows of a plan, and one new token for every work that samples."""
        with torch.inference_mode(), self._agreeing():
            order, staged = self._device.stage(plan)
            sampling = [work for work in order if work.samples]
            batch = self._sampler.prepare([work.sequence for work in sampling])
            clock.begin()
            logits = self._device.logits(staged)
            chosen = choose(logits, batch) if sampling else None
            clock.end()
            found = [] if chosen is None else read(chosen, batch)
            for work, new in zip(sampling, found, strict=True):
                if new.token == INVALID_TOKEN:
                    self._device.clean(work.sequence)
        if order == plan:
            return found
        by_work = dict(zip(map(id, sampling), found, strict=True))
        return [by_work[id(work)] for work in plan if work.samples]

    def warm_up(self, clock: StepClock) -> None:
        """Run the largest steps once and prepare the device, so that no user's first step pays for start-up."""
        warm_up(self._device, self._options)
        with _refusing():
            for plan in self._device.largest(self._options.max_batch_tokens):
                self.run(plan, clock)
        if self._options.device != "cpu":
            torch.cuda.synchronize()
        clock.harvest()

    def ready(self, at_ns: int) -> Ready:
        """What admission must know."""
        return Ready(
            at_ns=at_ns,
            max_model_len=self.max_model_len,
            max_batch_size=self._device.sequences,
            vocabulary=self._loaded.vocabulary,
            eos_ids=self._loaded.eos_ids,
            device_name=self._device.name,
            gpu_uuid=self._device.uuid,
            dtype=str(self._loaded.dtype).removeprefix("torch."),
            cache_tokens=self._device.cache_tokens,
            kv_token_bytes=self._loaded.kv_token_bytes * self._loaded.ranks,
            remarks=tuple(self._device.remarks),
        )


def on_device(options: EngineOptions, seat: Seat | None = None) -> tuple[Loaded, Device]:
    """A model on its device, before its warm-up; with a seat a rank's part of it. Raises LoadFailed."""
    torch.set_num_threads(options.threads)
    if seat is not None:
        join(seat, options.device)
    if options.device != "cpu":
        gpu.configure()
    name, rank = attention.NAME if options.device == "cpu" else paged_attention.NAME, seat.rank if seat else 0
    loaded = load(options, name, rank)
    with torch.inference_mode(), _refusing():
        examine(loaded.model, loaded.heads, loaded.layers, loaded.max_model_len)  # on all ranks: they exchange in it
        make = Cpu if options.device == "cpu" else Gpu
        return loaded, make(loaded, options)


def warm_up(device: Device, options: EngineOptions) -> None:
    """What every rank does by itself, and the same. Raises LoadFailed."""
    with torch.inference_mode(), _refusing():
        device.warm_up(options)


@contextmanager
def _refusing() -> Iterator[None]:
    """Raises LoadFailed for what trying again would not help."""
    try:
        yield
    except (torch.OutOfMemoryError, RankLost) as error:
        cause = error.__cause__ if isinstance(error, RankLost) else error
        if not isinstance(cause, torch.OutOfMemoryError):
            raise
        raise LoadFailed(OUT_OF_MEMORY, f"{first_line(cause)}; lower maxModelLen or maxBatchSize") from error
    except AttentionUnsupported as error:
        raise LoadFailed(MODEL_INVALID, f"{error}; serve another model") from error
