"""The engine's device when it is a GPU: a paged cache sized from a warm-up's measured peak, and graphs of decodes.

Owns the order of a GPU's start-up. The twin of engine.on_cpu. Of sampling it knows only
that it takes memory.
"""

import logging
import os
import statistics
from collections.abc import Sequence
from functools import partial

import torch

from gpumeter_worker.engine import gpu, paged, paged_attention
from gpumeter_worker.engine.blocks import Copy, PagedBlocks
from gpumeter_worker.engine.compiling import compile_decoder
from gpumeter_worker.engine.graphs import CudaRecorder, buckets
from gpumeter_worker.engine.loading import Loaded, LoadFailed
from gpumeter_worker.engine.memory import size_cache
from gpumeter_worker.engine.messages import EngineOptions
from gpumeter_worker.engine.paged_attention import PagedCache
from gpumeter_worker.engine.paged_steps import PagedSteps, Staged, largest_step, make_forward
from gpumeter_worker.engine.sampling import Sampler, choose
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sequence as EngineSequence
from gpumeter_worker.engine.sharding import smallest
from gpumeter_worker.failure import OUT_OF_MEMORY

log = logging.getLogger("gpumeter_worker.engine.on_gpu")

_LONGER = 0.6
"""Prompts may make a step of a full batch longer by about this share; see engine.on_cpu."""

_TOLERANCE = 5e-2


def uuid_of(told: str) -> str:
    """As NVML and the device plugin write it: torch leaves the kind out."""
    return f"GPU-{told}" if told and not told.startswith(("GPU-", "MIG-")) else told


class Gpu:
    """One GPU with a loaded model and a cache that takes what the weights and the largest step leave."""

    def __init__(self, loaded: Loaded, options: EngineOptions) -> None:
        self._loaded = loaded
        self._options = options
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name, self.uuid = properties.name, uuid_of(str(getattr(properties, "uuid", "")))
        self.sequences = options.max_batch_size
        self.mixed_prefill_tokens = 0
        self._backend, self.remarks = paged_attention.choose(
            os.environ.get("GPUMETER_ATTENTION", "auto"), loaded.heads, loaded.dtype, loaded.device
        )
        weights = torch.cuda.memory_allocated()
        gpu.forget_peak()
        trial = self._make(0)
        probe = largest_step(trial, self.sequences, options.max_batch_tokens, loaded.max_model_len)
        with torch.inference_mode():
            # With the draw that takes the most memory: a top-p, for which the whole vocabulary is sorted.
            sampler = Sampler(loaded.vocabulary, loaded.eos_ids, loaded.device)
            choose(trial.logits(trial.stage(probe)), sampler.prepare([work.sequence for work in probe]))
        block = paged.BLOCK_TOKENS * loaded.kv_token_bytes
        sizes = buckets(self.sequences) if options.cuda_graphs and self._backend.graphs else []
        found = gpu.facts(
            weights=weights,
            graphs=len(sizes),
            block=block,
            needed=paged.blocks_for(loaded.max_model_len),
            max_model_len=loaded.max_model_len,
        )
        del trial
        sizing = size_cache(found)
        if not sizing.blocks:
            raise LoadFailed(OUT_OF_MEMORY, sizing.problem)
        self._block_count = smallest(sizing.blocks, loaded.ranks)
        self._graph_sizes = sizes
        self._steps = self._make(self._block_count)
        log.info("the cache holds %d blocks of %d tokens", self._block_count, paged.BLOCK_TOKENS)

    @property
    def cache_tokens(self) -> int:
        """How many tokens the cache holds, all sequences together."""
        return self._block_count * paged.BLOCK_TOKENS

    def blocks(self, prefix: bool) -> PagedBlocks:
        """Whose tokens lie where in this cache."""
        return PagedBlocks(self._block_count, paged.BLOCK_TOKENS, prefix)

    def stage(self, plan: Sequence[Work]) -> tuple[list[Work], Staged]:
        """A step on its way to the device, and its works in the order of its logits."""
        return list(plan), self._steps.stage(plan)

    def logits(self, staged: Staged) -> torch.Tensor:
        """[samples, vocabulary]."""
        return self._steps.logits(staged)

    def copy(self, copies: Sequence[Copy]) -> None:
        """See Runner.copy: blocks are shared, so there is nothing to copy."""
        if copies:
            raise ValueError("a paged cache shares its blocks and copies none")

    def clean(self, sequence: EngineSequence) -> None:
        """See Device: the kernels read nobody's keys and values but a sequence's own."""

    def largest(self, step_tokens: int) -> list[list[Work]]:
        """Steps to warm up with: the one that takes the most memory, and a full batch of decodes."""
        most = largest_step(self._steps, self.sequences, step_tokens, self._loaded.max_model_len)
        return [most, self._steps.probe([1] * self.sequences)]

    def warm_up(self, options: EngineOptions) -> None:
        """Kernels, the model if that was asked for, graphs; then measure what prompts may add to a step."""
        self._steps.compile()
        if options.compile:
            plans = [self._steps.probe(counts) for counts in ([23], [1])]
            remark = compile_decoder(
                self._loaded.model,
                paged_attention.attend,
                paged_attention.NAME,
                [partial(self._logits_of, plan) for plan in plans],
                _TOLERANCE,
            )
            self.remarks += [remark] if remark else []
        if self._graph_sizes and (remark := self._steps.capture(self._graph_sizes, CudaRecorder())):
            self.remarks.append(remark)
        chunk = min(512, options.max_batch_tokens, self._loaded.max_model_len - 1)
        decode_ms = self._typical_ms(self._steps.probe([1] * self.sequences))
        token_ms = self._typical_ms(self._steps.probe([chunk])) / chunk
        self.mixed_prefill_tokens = max(128, int(_LONGER * decode_ms / token_ms) // 64 * 64)
        log.info(
            "a full batch takes %.2f ms and a prompt's token %.1f us: up to %d prompt tokens share a step with decodes",
            decode_ms,
            token_ms * 1e3,
            self.mixed_prefill_tokens,
        )

    def _logits_of(self, plan: list[Work]) -> torch.Tensor:
        return self._steps.logits(self._steps.stage(plan))

    def _typical_ms(self, plan: list[Work]) -> float:
        times = []
        for _ in range(5):
            staged = self._steps.stage(plan)
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            self._steps.logits(staged)
            last.record()
            last.synchronize()
            times.append(float(first.elapsed_time(last)))
        return statistics.median(times)

    def _make(self, blocks: int) -> PagedSteps:
        loaded = self._loaded
        return PagedSteps(
            make_forward(loaded.model, self._backend),
            PagedCache(loaded.layers, blocks, loaded.heads, loaded.dtype, loaded.device),
            loaded.heads,
            device=loaded.device,
            max_model_len=loaded.max_model_len,
            block_q=self._backend.block_q,
            multiprocessors=gpu.multiprocessors(),
        )
