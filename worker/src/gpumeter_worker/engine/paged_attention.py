"""Attention over a paged cache, behind transformers' public attention interface.

Owns the cache's tensors, a step's tensors, and the choice of who computes attention: our Triton kernels, torch's
varlen attention where a torch has it, or torch's own operations over gathered blocks. Knows no sequences.

Whoever is chosen has shown on this very device that it agrees with the plain computation; else the next one is taken
and a sentence says so.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gpumeter_worker.engine import paged
from gpumeter_worker.engine.interface import Asked, AttentionUnsupported, offer
from gpumeter_worker.engine.paged import BLOCK_TOKENS, Frame
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.engine.sequence import Sequence as EngineSequence
from gpumeter_worker.failure import first_line

NAME = "gpumeter_paged"
_WORST = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far attention over numbers of size 1 may be off: a few roundings of the type."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of a model's attention."""

    query: int
    kv: int
    dim: int


class PagedCache:
    """Keys and values of every layer, [blocks + 1, kv_heads, BLOCK_TOKENS, head_dim] each; the last block is spare.

    Zeroed, because what is masked is still multiplied by zero somewhere, and zero times garbage may be no number.
    """

    def __init__(self, layers: int, blocks: int, heads: Heads, dtype: torch.dtype, device: str) -> None:
        self.blocks = blocks
        self.spare = blocks
        shape = (blocks + 1, heads.kv, BLOCK_TOKENS, heads.dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]


@dataclass(slots=True)
class PagedStep:
    """One step as every attention layer sees it. Tensors are views of one int32 buffer; see paged.Frame for shapes.

    `splits`: into how many parts the keys of a program are split. `longest`: no sequence has more tokens.
    """

    cache: PagedCache
    frame: Frame
    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    query_start: torch.Tensor
    program_sequence: torch.Tensor
    program_first: torch.Tensor
    keep: torch.Tensor
    table: torch.Tensor
    splits: int
    longest: int


def view(buffer: torch.Tensor, frame: Frame, cache: PagedCache, splits: int, longest: int) -> PagedStep:
    """A step whose numbers lie in `buffer`, int32 as `paged.lay_out` filled it."""
    places = {name: buffer[start : start + length] for name, (start, length) in frame.fields.items()}
    table = places.pop("table").view(frame.sequences, frame.width)
    return PagedStep(cache=cache, frame=frame, table=table, splits=splits, longest=longest, **places)


@dataclass(frozen=True, slots=True)
class Backend:
    """Who writes the cache and who computes attention; `graphs`: both take tensors only and can be captured.

    `block_q`: a program of its kernel takes up to so many tokens of one sequence.

    write(key, value, keys, values, step); attend(query, keys, values, step, scale, window, softcap) -> like query,
    with query, key and value of [rows, heads, head_dim].
    """

    name: str
    graphs: bool
    block_q: int
    write: Callable[..., None]
    attend: Callable[..., torch.Tensor]


class Bound(NamedTuple):
    """A step, and who computes its attention."""

    step: PagedStep
    backend: Backend


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Asked, bound: Bound) -> torch.Tensor:
    """See interface.Attend."""
    step, backend = bound
    keys, values = step.cache.keys[asked.layer], step.cache.values[asked.layer]
    backend.write(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, step)
    rows = query[0].transpose(0, 1)
    return backend.attend(rows, keys, values, step, asked.scale, asked.window, asked.softcap)[None]


def choose(asked: str, heads: Heads, dtype: torch.dtype, device: str) -> tuple[Backend, list[str]]:
    """The attention for this device, and sentences about what was tried and is not used.

    `asked`: "auto", "triton", "varlen" or "gather". Each is tried on a small step before it is used.
    """
    order = {
        "auto": ("triton", "gather"),
        "triton": ("triton", "gather"),
        "varlen": ("varlen", "triton", "gather"),
        "gather": ("gather",),
    }
    remarks: list[str] = []
    if asked not in order:
        remarks.append(f"GPUMETER_ATTENTION is {asked!r:.40}; it must be one of {', '.join(order)}, and auto is taken")
        asked = "auto"
    for name in order[asked]:
        try:
            backend = _BACKENDS[name](heads, dtype, device)
            problem = _difference(backend, heads, dtype, device)
        except Exception as error:  # a compiler, a driver or a kernel may raise anything; the next one does without
            problem = f"it failed ({first_line(error)})"
        if not problem:
            return backend, remarks
        remarks.append(f"attention by {name} is not used: {problem}")
    raise AttentionUnsupported("; ".join(remarks))


def _triton(heads: Heads, dtype: torch.dtype, device: str) -> Backend:
    from gpumeter_worker.engine import triton_attention as kernels  # noqa: PLC0415 - a CPU image may lack Triton

    tile = kernels.tiles(heads.dim, dtype.itemsize, capability(device))

    def write(
        key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: PagedStep
    ) -> None:
        kernels.write(key, value, keys, values, step.slots)

    def run(  # noqa: PLR0917
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: PagedStep,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        plan = kernels.Plan(
            step.table,
            step.lengths,
            step.query_start,
            step.program_sequence,
            step.program_first,
            step.frame.block_q,
            min(step.splits, kernels.MAX_SPLITS),
            tile,
        )
        return kernels.attend(query, keys, values, plan, scale, window, softcap)

    return Backend("triton", True, kernels.block_q(tile, heads.query, heads.kv), write, run)


def _varlen(heads: Heads, dtype: torch.dtype, device: str) -> Backend:
    """torch.nn.attention.varlen (2.12 and later take a block table); asked for by its signature, not its version."""
    from torch.nn.attention import varlen  # noqa: PLC0415 - not in every torch that is supported

    taken = inspect.signature(varlen.varlen_attn).parameters
    missing = {"block_table", "seqused_k", "enable_gqa", "scale", "window_size"} - set(taken)
    if missing:
        raise RuntimeError(f"this torch's varlen attention has no {', '.join(sorted(missing))}")

    def run(  # noqa: PLR0917
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: PagedStep,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        if softcap is not None:
            raise AttentionUnsupported("torch's varlen attention has no softcap; set GPUMETER_ATTENTION to triton")
        out: torch.Tensor = varlen.varlen_attn(
            query,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            step.query_start,
            step.query_start,
            step.frame.rows,
            step.longest,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=step.lengths,
            block_table=step.table,
        )
        # A padding row attends to nothing, and what comes out of that is not agreed upon.
        return out if step.frame.block_q != 1 else out.masked_fill((step.lengths == 0)[:, None, None], 0)

    return Backend("varlen", True, 16, _put, run)


def _gather(heads: Heads, dtype: torch.dtype, device: str) -> Backend:
    """torch's own operations: every sequence's blocks are copied together first. Right everywhere, and slow."""
    return Backend("gather", False, 16, _put, gather)


def gather(  # noqa: PLR0917
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: PagedStep,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """See Backend. Decodes at once; in a step with longer parts one sequence after the other."""
    if step.frame.block_q == 1:
        return _gather_sequences(query[:, None], keys, values, step.table, step.lengths, scale, window, softcap)[:, 0]
    starts = step.query_start.tolist()
    outs = [
        _gather_sequences(
            query[None, starts[i] : starts[i + 1]],
            keys,
            values,
            step.table[i : i + 1],
            step.lengths[i : i + 1],
            scale,
            window,
            softcap,
        )[0]
        for i in range(len(starts) - 1)
    ]
    return torch.cat(outs)


def _gather_sequences(  # noqa: PLR0917
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """query [sequences, count, heads, head_dim], the last `count` tokens of each -> the same."""
    sequences, count, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    k = keys[table].permute(0, 2, 1, 3, 4).reshape(sequences, kv_heads, -1, head_dim)
    v = values[table].permute(0, 2, 1, 3, 4).reshape(sequences, kv_heads, -1, head_dim)
    at = torch.arange(k.shape[2], device=query.device)
    # What another sequence left behind may be no number: masked or times zero, it would stay none.
    foreign = (at >= lengths[:, None])[:, None, :, None]
    k, v = k.masked_fill(foreign, 0), v.masked_fill(foreign, 0)
    position = lengths[:, None] - count + torch.arange(count, device=query.device)
    seen = at <= position[:, :, None]
    if window is not None:
        seen &= at > position[:, :, None] - window
    # Grouped-query attention without expansion: the heads of a group stand where queries of a sequence would.
    group = heads // kv_heads
    q = query.reshape(sequences, count, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(sequences, kv_heads, group * count, head_dim)
    mask = seen.repeat(1, group, 1)[:, None]
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = softcap * torch.tanh(q.float() @ k.float().transpose(2, 3) * scale / softcap)
        out = (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.float()).to(query.dtype)
    out = out.reshape(sequences, kv_heads, group, count, head_dim).permute(0, 3, 1, 2, 4)
    # A padding row sees nothing, and the softmax of nothing is no number.
    return out.reshape(query.shape).masked_fill((lengths == 0)[:, None, None, None], 0)


def _put(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: PagedStep) -> None:
    block, offset = step.slots.long() // BLOCK_TOKENS, step.slots.long() % BLOCK_TOKENS
    keys[block, :, offset] = key
    values[block, :, offset] = value


def _difference(backend: Backend, heads: Heads, dtype: torch.dtype, device: str) -> str:
    """A sentence when a backend does not give what `gather` gives, for decodes alone and for decodes with chunks."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    cache = PagedCache(1, 16, heads, dtype, device)
    keys, values = noise(*cache.keys[0].shape), noise(*cache.values[0].shape)
    free = torch.randperm(16, generator=generator).tolist()
    worst = 0.0
    for parts in (((1, 40), (1, 17), (1, 64)), ((1, 40), (20, 50), (5, 5))):
        rows = []
        for number, (count, length) in enumerate(parts):
            sequence = EngineSequence("", number, "", [0] * length, length, Sampling(1), computed=length - count)
            sequence.blocks = free[4 * number : 4 * number + 4]
            rows.append(Work(sequence, count, samples=True, prefill=count > 1))
        frame = paged.frame(rows, backend.block_q)
        buffer = torch.frombuffer(paged.lay_out(rows, frame, cache.spare), dtype=torch.int32).to(device)
        for splits in (1, 4):
            step = view(buffer, frame, cache, splits, 64)
            key, value = noise(frame.rows, heads.kv, heads.dim), noise(frame.rows, heads.kv, heads.dim)
            backend.write(key, value, keys, values, step)
            block, offset = step.slots.long() // BLOCK_TOKENS, step.slots.long() % BLOCK_TOKENS
            if not (torch.equal(keys[block, :, offset], key) and torch.equal(values[block, :, offset], value)):
                return "it wrote keys and values to where they do not belong"
            inputs = (noise(frame.rows, heads.query, heads.dim), keys, values, step, heads.dim**-0.5, 24, None)
            worst = max(worst, float((backend.attend(*inputs) - gather(*inputs)).abs().max()))
    return "" if worst <= _WORST[dtype] else f"it is off by {worst:.2g}"


_BACKENDS = {"triton": _triton, "varlen": _varlen, "gather": _gather}


def capability(device: str) -> tuple[int, int]:
    """CUDA's compute capability; a CPU counts as a current GPU, so that the interpreter runs what those run."""
    return torch.cuda.get_device_capability() if device != "cpu" else (9, 0)


offer(NAME, attend)
