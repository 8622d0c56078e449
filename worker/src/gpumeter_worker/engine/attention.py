"""Attention over a cache of slots, behind transformers' public attention interface.

Owns the layout of keys and values and the shape of one packed step. Does not know who asked for a row, nor how rows
were chosen.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from gpumeter_worker.engine.interface import Asked, offer
from gpumeter_worker.engine.scheduler import Work

NAME = "gpumeter_slots"
_REGROUP = 1.5
"""Decodes are grouped by length when padding them all to the longest would read this much more than they hold."""


class SlotCache:
    """Keys and values of every layer, [slots, kv_heads, length, head_dim] each. Pages are touched when written."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
        _, self.kv_heads, self.length, _ = shape
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
    """Rows a..b of the step: one query each, all padded to `length` keys. `shortest`: of the row that has the fewest.

    `slots` chooses theirs from the cache: a slice where they lie side by side, for then nothing is copied.
    """

    a: int
    b: int
    length: int
    shortest: int
    slots: slice | torch.Tensor


@dataclass(slots=True)
class _Chunk:
    """Rows a..a+count of the step: consecutive tokens of one prompt, `context` of which are cached already."""

    slot: int
    a: int
    count: int
    context: int


@dataclass(slots=True)
class StepContext:
    """One step as every attention layer sees it.

    `places`: where its keys and values go, row by row and head by head, in vectors of head_dim from the cache's start.
    """

    cache: SlotCache
    slots: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    decodes: list[_Decodes]
    chunks: list[_Chunk]
    decode_rows: int
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)


def order(plan: Sequence[Work]) -> list[Work]:
    """The rows of a step: decodes first, in the plan's order, or by length where that saves reading padding."""
    decodes = [work for work in plan if not work.prefill]
    if _regroups([work.sequence.computed + 1 for work in decodes]):
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
    at, upto = torch.tensor(slots, device=device), torch.tensor(positions, device=device)
    heads = torch.arange(cache.kv_heads, device=device)
    return StepContext(
        cache=cache,
        slots=at,
        positions=upto,
        places=((at[:, None] * cache.kv_heads + heads) * cache.length + upto[:, None]).reshape(-1),
        decodes=_decode_groups([position + 1 for position in positions[:decode_rows]], slots, at),
        chunks=chunks,
        decode_rows=decode_rows,
    )


def _decode_groups(lengths: list[int], slots: list[int], at: torch.Tensor) -> list[_Decodes]:
    groups = []
    regroup = _regroups(lengths)
    a = 0
    while a < len(lengths):
        b = a + 1 if regroup else len(lengths)
        while regroup and b < len(lengths) and lengths[b] <= max(_REGROUP * lengths[a], lengths[a] + 64):
            b += 1
        first = slots[a]
        adjoining = slots[a:b] == list(range(first, first + b - a))
        chosen = slice(first, first + b - a) if adjoining else at[a:b]
        groups.append(_Decodes(a, b, max(lengths[a:b]), min(lengths[a:b]), chosen))
        a = b
    return groups


def _regroups(lengths: list[int]) -> bool:
    return bool(lengths) and len(lengths) * max(lengths) > _REGROUP * sum(lengths)


def copy_slots(cache: SlotCache, source: int, target: int, tokens: int) -> None:
    """Copy the first tokens of a slot into another one, in every layer."""
    for layer in (*cache.keys, *cache.values):
        layer[target, :, :tokens] = layer[source, :, :tokens]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Asked, step: StepContext
) -> torch.Tensor:
    """See interface.Attend. The step's keys and values are in the cache before any of its rows looks."""
    keys, values = step.cache.keys[asked.layer], step.cache.values[asked.layer]
    heads, kv_heads, head_dim = query.shape[1], step.cache.kv_heads, query.shape[3]
    keys.view(-1, head_dim).index_copy_(0, step.places, key.transpose(1, 2).reshape(-1, head_dim))
    values.view(-1, head_dim).index_copy_(0, step.places, value.transpose(1, 2).reshape(-1, head_dim))
    outs = []
    if step.decode_rows:
        # Grouped-query attention without expansion: the heads of a group stand where queries of a sequence would.
        queries = query.transpose(1, 2)[:, : step.decode_rows] if step.chunks else query.transpose(1, 2)
        queries = queries.reshape(step.decode_rows, kv_heads, heads // kv_heads, head_dim)
    for index, group in enumerate(step.decodes):
        mask = _decode_mask(step, index, asked.window, query.dtype)
        held = (keys[group.slots, :, : group.length], values[group.slots, :, : group.length])
        own = queries if len(step.decodes) == 1 else queries[group.a : group.b]
        if asked.softcap is None:
            out = F.scaled_dot_product_attention(own, *held, attn_mask=mask, scale=asked.scale)
        else:
            out = _softcapped(own, *held, mask, asked.scale, asked.softcap)
        outs.append(out.reshape(group.b - group.a, heads, head_dim))
    for index, chunk in enumerate(step.chunks):
        length = chunk.context + chunk.count
        mask = _chunk_mask(step, index, asked.window, query.dtype, plain=asked.softcap is None)
        own = query[:, :, chunk.a : chunk.a + chunk.count]
        held = (keys[chunk.slot : chunk.slot + 1, :, :length], values[chunk.slot : chunk.slot + 1, :, :length])
        if asked.softcap is None:
            out = F.scaled_dot_product_attention(
                own, *held, attn_mask=mask, is_causal=mask is None, scale=asked.scale, enable_gqa=heads != kv_heads
            )
        else:
            group_size = heads // kv_heads
            key, value = (one.repeat_interleave(group_size, 1) for one in held)
            out = _softcapped(own, key, value, mask, asked.scale, asked.softcap)
        outs.append(out[0].transpose(0, 1))
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]


def _softcapped(  # noqa: PLR0917 - the order is scaled_dot_product_attention's
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are bent by softcap * tanh(score / softcap), as Gemma 2 has it; then `mask` is added."""
    scores = query.float() @ key.float().transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores += mask
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


def _decode_mask(step: StepContext, index: int, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores of a group, [rows, 1, 1, length], -inf for what is hidden; None: nothing is."""
    group = step.decodes[index]
    if group.shortest == group.length and (window is None or group.length <= window):
        return None
    mask = step.masks.get((index, window))
    if mask is None:
        keys = torch.arange(group.length, device=step.positions.device)[None]
        at = step.positions[group.a : group.b, None]
        visible = keys <= at
        if window is not None:
            visible = visible & (keys > at - window)
        mask = step.masks[index, window] = _added(visible[:, None, None], dtype)
    return mask


def _chunk_mask(
    step: StepContext, index: int, window: int | None, dtype: torch.dtype, *, plain: bool
) -> torch.Tensor | None:
    """The like of a chunk, [rows, length]; None: plain causal attention from the first token on, if that is offered."""
    chunk = step.chunks[index]
    length = chunk.context + chunk.count
    if plain and chunk.context == 0 and (window is None or length <= window):
        return None
    at = (-1 - index, window)
    mask = step.masks.get(at)
    if mask is None:
        visible = torch.ones(chunk.count, length, dtype=torch.bool, device=step.positions.device).tril(chunk.context)
        if window is not None:
            visible = visible.triu(chunk.context - window + 1)
        mask = step.masks[at] = _added(visible, dtype)
    return mask


def _added(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add, in the scores' own type: made once a step, where one of booleans is translated by every layer."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


offer(NAME, attend)
