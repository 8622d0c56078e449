"""The engine's device when there is no GPU: a cache of slots, packed weights, as many threads as the container has.

Owns how a CPU's memory is divided and what its start-up measures. The twin of engine.on_gpu. Does not know what is
sampled from logits.
"""

import logging
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from gpumeter_worker.engine import attention
from gpumeter_worker.engine.attention import SlotCache, StepContext
from gpumeter_worker.engine.blocks import Copy, SlotBlocks
from gpumeter_worker.engine.compiling import compile_decoder
from gpumeter_worker.engine.linear import NEVER, pack_linears
from gpumeter_worker.engine.loading import Loaded, LoadFailed
from gpumeter_worker.engine.messages import EngineOptions
from gpumeter_worker.engine.norm import quicken_norms
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sequence as EngineSequence
from gpumeter_worker.engine.sharding import smallest
from gpumeter_worker.engine.slot_steps import SlotSteps, Staged
from gpumeter_worker.failure import OUT_OF_MEMORY, first_line

log = logging.getLogger("gpumeter_worker.engine.on_cpu")

_CACHE_SHARE = 0.8
"""How much of the memory that is left after loading the cache may take."""

_WIDE_SHARE = 0.25
"""How much of it copies of the weights in float32 may take, where they are faster."""

_WARM_TOKENS = 64
_STREAMS = 8
_LONGER = 0.6
"""Prompts may make a step of a few streams longer by this share: with it the time between two tokens stays below twice
what it is without prompts, with room for a machine that is not quiet."""

_COMPILED_ROWS = 23
"""A compiled model is tried with so many rows and with one: one graph serves every number of rows, and one a single."""

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""How far a compiled model's logits may be off, as a share of the largest. In bfloat16 it rounds less often than the
eager one, which is as much as one of them is away from float32; what is wrong is off by all of it."""


class Cpu:
    """One CPU with a loaded model, its weights packed and its cache made. Raises LoadFailed."""

    name = "cpu"
    uuid = ""

    def __init__(self, loaded: Loaded, options: EngineOptions) -> None:
        self._loaded = loaded
        self.remarks: list[str] = []
        spare = _free_bytes(options)
        wide_from = pack_linears(loaded.model, None if spare is None else int(spare * _WIDE_SHARE))
        if wide_from:
            log.info(
                "weights are packed for oneDNN; %s",
                "products stay in the model's type" if wide_from == NEVER else f"float32 from {wide_from} rows on",
            )
        quicken_norms(loaded.model)
        self.sequences = smallest(_slots(loaded, options), loaded.ranks)
        self.mixed_prefill_tokens = 0
        shape = (self.sequences, loaded.heads.kv, loaded.max_model_len, loaded.heads.dim)
        try:
            cache = SlotCache(loaded.layers, shape, loaded.dtype, "cpu")
        except (OSError, RuntimeError) as error:
            raise LoadFailed(OUT_OF_MEMORY, f"{first_line(error)}; lower maxModelLen or maxBatchSize") from error
        self._steps = SlotSteps(self._forward, cache)

    @property
    def cache_tokens(self) -> int:
        """How many tokens the cache holds, all sequences together."""
        return self.sequences * self._loaded.max_model_len

    def blocks(self, prefix: bool) -> SlotBlocks:
        """Whose tokens lie where in this cache."""
        return SlotBlocks(self.sequences, self._loaded.max_model_len, prefix)

    def stage(self, plan: Sequence[Work]) -> tuple[list[Work], Staged]:
        """A step ready to run, and its works in the order of its logits."""
        staged = self._steps.stage(plan)
        return staged.order, staged

    def logits(self, staged: Staged) -> torch.Tensor:
        """[samples, vocabulary]."""
        return self._steps.logits(staged)

    def copy(self, copies: Sequence[Copy]) -> None:
        """See Runner.copy."""
        self._steps.copy(copies)

    def clean(self, sequence: EngineSequence) -> None:
        """See Device: a row that is padded to its neighbour's length reads what the slot held before."""
        self._steps.clean(sequence)

    def largest(self, step_tokens: int) -> list[list[Work]]:
        """Steps to warm up with: a chunk, and a full batch of decodes. A CPU allocates nothing by a chunk's size."""
        longest = max(1, min(step_tokens, _WARM_TOKENS, self._loaded.max_model_len - 2))
        return [self._steps.probe([longest]), self._steps.probe([1] * self.sequences)]

    def warm_up(self, options: EngineOptions) -> None:
        """Compile if that was asked for, then measure how much of a prompt may share a step with running streams."""
        if options.compile:
            # One prompt, then its next token on what the prompt left in the cache: both as in a real answer.
            vocabulary = self._loaded.vocabulary
            steps = [
                self._steps.probe([_COMPILED_ROWS], vocabulary=vocabulary),
                self._steps.probe([1], context=_COMPILED_ROWS, vocabulary=vocabulary),
            ]
            remark = compile_decoder(
                self._loaded.model,
                attention.attend,
                attention.NAME,
                [partial(self._logits_of, plan) for plan in steps],
                _TOLERANCE.get(self._loaded.dtype, 0.15),
            )
            self.remarks += [remark] if remark else []
        room = self._loaded.max_model_len - 1
        streams = min(_STREAMS, self.sequences)
        chunk = min(_WARM_TOKENS, options.max_batch_tokens, room)
        decode_s = self._typical_s(self._steps.probe([1] * streams, context=min(64, room)))
        token_s = self._typical_s(self._steps.probe([chunk])) / chunk
        self.mixed_prefill_tokens = max(16, int(_LONGER * decode_s / token_s) // 8 * 8)
        log.info(
            "a step of %d streams takes %.1f ms and a prompt's token %.2f ms: up to %d prompt tokens share such a step",
            streams,
            decode_s * 1e3,
            token_s * 1e3,
            self.mixed_prefill_tokens,
        )

    def _logits_of(self, plan: list[Work]) -> torch.Tensor:
        return self.logits(self.stage(plan)[1])

    def _typical_s(self, plan: list[Work]) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            self._logits_of(plan)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor, step: StepContext
    ) -> torch.Tensor:
        logits: torch.Tensor = self._loaded.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=None,
            use_cache=False,
            logits_to_keep=keep,
            step=step,
        ).logits[0]
        return logits


def _slots(loaded: Loaded, options: EngineOptions) -> int:
    """How many sequences of full length the memory holds, at most maxBatchSize."""
    free = _free_bytes(options)
    if free is None:
        return options.max_batch_size
    slot = loaded.kv_token_bytes * loaded.max_model_len
    slots = min(options.max_batch_size, int(free * _CACHE_SHARE) // slot)
    if slots < 1:
        raise LoadFailed(
            OUT_OF_MEMORY,
            f"one sequence of {loaded.max_model_len} tokens needs {slot // 2**20} MiB of cache and "
            f"{free // 2**20} MiB are free; give the worker more memory or lower maxModelLen",
        )
    return slots


def _free_bytes(options: EngineOptions) -> int | None:
    if not options.memory_bytes:
        return None
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return options.memory_bytes - resident_pages * os.sysconf("SC_PAGE_SIZE")
