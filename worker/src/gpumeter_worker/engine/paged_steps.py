"""Runs planned steps over a paged cache: prepared on the host, sent in one copy, then eagerly or by a graph's replay.

Owns the buffers of a step and the graphs. Does not know how tokens are chosen from logits, nor any clock: `stage` is
what comes before a step's time begins, `logits` is what it is billed for.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch

from gpumeter_worker.engine import paged, paged_attention
from gpumeter_worker.engine.graphs import Recorder, bucket_for
from gpumeter_worker.engine.paged import BLOCK_TOKENS, Frame
from gpumeter_worker.engine.paged_attention import Backend, Bound, Heads, PagedCache, PagedStep
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.engine.sequence import Sequence as EngineSequence
from gpumeter_worker.failure import first_line

log = logging.getLogger("gpumeter_worker.engine.paged_steps")

Forward = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | int", PagedStep], torch.Tensor]
"""tokens [1, rows], positions [1, rows], the rows to keep (0: all), the step -> logits [rows kept, vocabulary]."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A step on its way to the device. `samples`: how many rows of logits it yields."""

    step: PagedStep
    bucket: int | None
    samples: int


@dataclass(frozen=True, slots=True)
class _Graph:
    buffer: torch.Tensor
    step: PagedStep
    replay: Callable[[], None]


class PagedSteps:
    """One device's steps. `multiprocessors` 0: attention is never split along the keys."""

    def __init__(
        self,
        forward: Forward,
        cache: PagedCache,
        heads: Heads,
        *,
        device: str,
        max_model_len: int,
        block_q: int,
        multiprocessors: int,
    ) -> None:
        self._forward = forward
        self.cache = cache
        self._heads = heads
        self._device = device
        self._max_model_len = max_model_len
        self._block_q = block_q
        self._multiprocessors = multiprocessors
        self._graphs: dict[int, _Graph] = {}
        self._out: torch.Tensor | None = None

    @property
    def buckets(self) -> list[int]:
        """The batch sizes that have a graph."""
        return sorted(self._graphs)

    def stage(self, rows: Sequence[Work], splits: int | None = None) -> Staged:
        """Lay a step out and send it. Waits for nothing: the pinned memory is torch's to keep until it was read.

        With `splits` given the step runs eagerly, split like that.
        """
        bucket = bucket_for(len(rows), self._graphs) if splits is None and paged.only_decodes(rows) else None
        if bucket is None:
            frame = paged.frame(rows, self._block_q)
        else:
            frame = paged.narrowed(self._graphs[bucket].step.frame, rows)
        host = torch.frombuffer(paged.lay_out(rows, frame, self.cache.spare), dtype=torch.int32)
        if self._device != "cpu":
            host = torch.empty(frame.size, dtype=torch.int32, pin_memory=True).copy_(host)
        if bucket is not None:
            self._send(host, frame, self._graphs[bucket])
            return Staged(self._graphs[bucket].step, bucket, len(rows))
        longest = max(work.sequence.computed + work.count for work in rows)
        parts = self._splits(frame, longest) if splits is None else splits
        buffer = host.to(self._device, non_blocking=True)
        return Staged(paged_attention.view(buffer, frame, self.cache, parts, longest), None, frame.samples)

    def _send(self, host: torch.Tensor, frame: Frame, graph: _Graph) -> None:
        if frame is graph.step.frame:
            graph.buffer.copy_(host, non_blocking=True)
            return
        sent = host.to(self._device, non_blocking=True)
        start, length = frame.fields["table"]
        graph.buffer[:start].copy_(sent[:start])
        graph.step.table[:, : frame.width].copy_(sent[start : start + length].view(frame.sequences, frame.width))

    def logits(self, staged: Staged) -> torch.Tensor:
        """[samples, vocabulary]; a replay's are overwritten by the next step."""
        if staged.bucket is not None and self._out is not None:
            self._graphs[staged.bucket].replay()
            return self._out[: staged.samples]
        step = staged.step
        if not staged.samples:  # a chunk that yields no token still needs one row, or the model makes logits of all
            return self._forward(step.tokens.long()[None], step.positions.long()[None], 1, step)[:0]
        return self._forward(step.tokens.long()[None], step.positions.long()[None], step.keep.long(), step)

    def compile(self) -> None:
        """Run every shape of kernel once, so that no user's step waits for a compiler."""
        for count in (1, 2):
            for splits in (1, 2):
                self.logits(self.stage(self.probe([count, count]), splits))

    def capture(self, sizes: Sequence[int], recorder: Recorder) -> str:
        """Record decodes of the given batch sizes. Returns a sentence when that failed; steps run eagerly then."""
        try:
            for size in sorted(sizes, reverse=True):
                self._capture(size, recorder)
        except Exception as error:  # whatever the device or a library raises, eager steps do without graphs
            self._graphs.clear()
            self._out = None
            why = first_line(error)
            remark = f"CUDA graphs could not be captured ({why}); decodes run eagerly, slower at small batches"
            log.warning("%s", remark)
            return remark
        return ""

    def probe(self, counts: Sequence[int]) -> list[Work]:
        """Works of sequences that nobody asked for, each of so many tokens, all in the spare block."""
        sampling = Sampling(max_tokens=2, temperature=1.0, top_p=0.9, seed=0)
        works = []
        for count in counts:
            held = [self.cache.spare] * paged.blocks_for(count)
            sequence = EngineSequence("", 0, "", [1] * count, count, sampling, blocks=held, random=Random(0))
            works.append(Work(sequence, count, samples=True, prefill=count > 1))
        return works

    def _capture(self, size: int, recorder: Recorder) -> None:
        frame = paged.bucket_frame(size, self._max_model_len)
        probe = self.probe([1] * size)
        splits = self._splits(frame, self._max_model_len)
        expected = self.logits(self.stage(probe, splits)).clone()
        if self._out is None:  # the largest batch comes first
            self._out = torch.empty_like(expected)
        out = self._out[:size]
        buffer = torch.frombuffer(paged.lay_out(probe, frame, self.cache.spare), dtype=torch.int32).to(self._device)
        step = paged_attention.view(buffer, frame, self.cache, splits, self._max_model_len)

        def run() -> None:
            out.copy_(self._forward(step.tokens.long()[None], step.positions.long()[None], 0, step))

        replay = recorder.record(run)
        out.zero_()
        replay()
        if not torch.allclose(out.float(), expected.float(), rtol=0.05, atol=0.05 * float(expected.abs().max())):
            raise RuntimeError(f"a replay for {size} sequences gives other logits than the same step run eagerly")
        self._graphs[size] = _Graph(buffer, step, replay)

    def _splits(self, frame: Frame, longest: int) -> int:
        return paged.splits_for(frame.programs, self._heads.kv, longest, self._multiprocessors)


def make_forward(model: Callable[..., object], backend: Backend) -> Forward:
    """The forward pass of a transformers model whose attention is `paged_attention.NAME`."""

    def forward(
        tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | int, step: PagedStep
    ) -> torch.Tensor:
        answer = model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=None,
            use_cache=False,
            logits_to_keep=keep,
            step=Bound(step, backend),
        )
        logits: torch.Tensor = answer.logits[0]  # type: ignore[attr-defined]
        return logits

    return forward


def largest_step(steps: PagedSteps, max_batch_size: int, step_tokens: int, max_model_len: int) -> list[Work]:
    """The step that takes the most memory: a full batch of samples and as many tokens as a step may have."""
    counts = [1] * max_batch_size
    left = step_tokens - len(counts)
    for index in range(len(counts)):
        more = min(left, max_model_len - 1)
        counts[index] += more
        left -= more
    return steps.probe(counts)


__all__ = ["BLOCK_TOKENS", "Forward", "PagedSteps", "Staged", "largest_step", "make_forward"]
