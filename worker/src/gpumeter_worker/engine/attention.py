"""Attention over a cache of slots, behind transformers' public attention interface.

Owns the layout of keys and values and the shape of one packed step. Does not know who asked for a row, nor how rows
were chosen. Any decoder that calls ALL_ATTENTION_FUNCTIONS and passes its **kwargs on works unchanged.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpumeter_worker.engine.scheduler import Work

NAME = "gpumeter_slots"
_REGROUP = 1.5
"""Decodes are grouped by length when padding them all to the longest would read this much more than they hold."""


class AttentionUnsupported(Exception):
    """The model asks attention for something that this engine would silently leave out."""


class SlotCache:
    """Keys and values of every layer, [slots, kv_heads, length, head_dim] each. Pages are touched when written."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
        self.keys = [_zeros(shape, dtype, device) for _ in range(layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; an anonymous mapping is zero too, and costs memory only where it is used.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


@dataclass(slots=True)
class _Decodes:
    """Rows a..b of the step: one query each, all padded to `length` keys. `dense`: they are the cache's first slots."""

    a: int
    b: int
    length: int
    dense: bool


@dataclass(slots=True)
class _Chunk:
    """Rows a..a+count of the step: consecutive tokens of one prompt, `context` of which are cached already."""

    slot: int
    a: int
    count: int
    context: int


@dataclass(slots=True)
class StepContext:
    """One step as every attention layer sees it."""

    cache: SlotCache
    slots: torch.Tensor
    positions: torch.Tensor
    decodes: list[_Decodes]
    chunks: list[_Chunk]
    decode_rows: int
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)


def order(plan: Sequence[Work]) -> list[Work]:
    """The rows of a step: decodes first, by slot, or by length where that saves reading padding."""
    decodes = [work for work in plan if not work.prefill]
    lengths = [work.sequence.computed + 1 for work in decodes]
    if lengths and len(lengths) * max(lengths) > _REGROUP * sum(lengths):
        decodes.sort(key=lambda work: work.sequence.computed)
    return decodes + [work for work in plan if work.prefill]


def step_context(rows: Sequence[Work], cache: SlotCache, device: str) -> StepContext:
    """Lay out the ordered rows of a step."""
    slots: list[int] = []
    positions: list[int] = []
    chunks: list[_Chunk] = []
    for work in rows:
        if work.prefill:
            chunks.append(_Chunk(work.sequence.blocks[0], len(slots), work.count, work.sequence.computed))
        slots += [work.sequence.blocks[0]] * work.count
        positions += range(work.sequence.computed, work.sequence.computed + work.count)
    decode_rows = len(rows) - len(chunks)
    return StepContext(
        cache=cache,
        slots=torch.tensor(slots, device=device),
        positions=torch.tensor(positions, device=device),
        decodes=_decode_groups([position + 1 for position in positions[:decode_rows]], slots),
        chunks=chunks,
        decode_rows=decode_rows,
    )


def _decode_groups(lengths: list[int], slots: list[int]) -> list[_Decodes]:
    groups = []
    regroup = bool(lengths) and len(lengths) * max(lengths) > _REGROUP * sum(lengths)
    a = 0
    while a < len(lengths):
        b = a + 1 if regroup else len(lengths)
        while regroup and b < len(lengths) and lengths[b] <= max(_REGROUP * lengths[a], lengths[a] + 64):
            b += 1
        groups.append(_Decodes(a, b, max(lengths[a:b]), dense=slots[a:b] == list(range(b - a))))
        a = b
    return groups


def copy_slots(cache: SlotCache, source: int, target: int, tokens: int) -> None:
    """Copy the first tokens of a slot into another one, in every layer."""
    for layer in (*cache.keys, *cache.values):
        layer[target, :, :tokens] = layer[source, :, :tokens]


def attend(  # noqa: PLR0917 - the interface is transformers'
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    step: StepContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, rows, head_dim], key and value [1, kv_heads, rows, head_dim] -> [1, rows, heads, head_dim]."""
    if step is None:
        raise AttentionUnsupported("this model does not hand the step on to its attention layers")
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise AttentionUnsupported(f"this model's attention uses {name}, which the engine does not compute yet")
    keys, values = step.cache.keys[module.layer_idx], step.cache.values[module.layer_idx]
    keys[step.slots, :, step.positions] = key[0].transpose(0, 1)
    values[step.slots, :, step.positions] = value[0].transpose(0, 1)
    heads, kv_heads, head_dim = query.shape[1], keys.shape[1], query.shape[3]
    outs = []
    if step.decode_rows:
        # Grouped-query attention without expansion: the heads of a group stand where queries of a sequence would.
        queries = query[0, :, : step.decode_rows].transpose(0, 1)
        queries = queries.reshape(step.decode_rows, kv_heads, heads // kv_heads, head_dim)
    for index, group in enumerate(step.decodes):
        rows = slice(0, group.b - group.a) if group.dense else step.slots[group.a : group.b]
        mask = _decode_mask(step, index, sliding_window)
        own, held = queries[group.a : group.b], (keys[rows, :, : group.length], values[rows, :, : group.length])
        if softcap is None:
            out = F.scaled_dot_product_attention(own, *held, attn_mask=mask, scale=scaling)
        else:
            out = _softcapped(own, *held, mask, scaling, softcap)
        outs.append(out.reshape(group.b - group.a, heads, head_dim))
    for index, chunk in enumerate(step.chunks):
        length = chunk.context + chunk.count
        mask = _chunk_mask(step, index, sliding_window)
        own = query[:, :, chunk.a : chunk.a + chunk.count]
        held = (keys[chunk.slot : chunk.slot + 1, :, :length], values[chunk.slot : chunk.slot + 1, :, :length])
        if softcap is None:
            out = F.scaled_dot_product_attention(
                own, *held, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != kv_heads
            )
        else:
            group_size = heads // kv_heads
            key, value = (one.repeat_interleave(group_size, 1) for one in held)
            out = _softcapped(own, key, value, mask, scaling, softcap)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)[None], None


def _softcapped(  # noqa: PLR0917 - the order is scaled_dot_product_attention's
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are bent by softcap * tanh(score / softcap), as Gemma 2 has it; mask None: causal."""
    scores = query.float() @ key.float().transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ value.float()).to(query.dtype)


def _decode_mask(step: StepContext, index: int, window: int | None) -> torch.Tensor:
    mask = step.masks.get((index, window))
    if mask is None:
        group = step.decodes[index]
        keys = torch.arange(group.length, device=step.positions.device)[None]
        at = step.positions[group.a : group.b, None]
        mask = keys <= at
        if window is not None:
            mask = mask & (keys > at - window)
        mask = step.masks[index, window] = mask[:, None, None]
    return mask


def _chunk_mask(step: StepContext, index: int, window: int | None) -> torch.Tensor | None:
    """None where plain causal attention from the first token on is meant."""
    chunk = step.chunks[index]
    length = chunk.context + chunk.count
    if chunk.context == 0 and (window is None or length <= window):
        return None
    at = (-1 - index, window)
    mask = step.masks.get(at)
    if mask is None:
        mask = torch.ones(chunk.count, length, dtype=torch.bool, device=step.positions.device).tril(chunk.context)
        if window is not None:
            mask = mask.triu(chunk.context - window + 1)
        step.masks[at] = mask
    return mask


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
