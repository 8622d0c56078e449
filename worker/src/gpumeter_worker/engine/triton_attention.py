"""Triton kernels for attention over a paged cache: prompt chunks and decodes of one step in one launch.

Owns the kernels and how they are launched. Does not know sequences, models or graphs: it takes tensors whose meaning
`paged_attention` lays down. The same code runs in Triton's interpreter on a CPU, where its tests compare it with SDPA.

The method is flash attention (Dao 2023, arXiv:2307.08691): keys are read tile by tile with a running maximum and sum.
A program owns `block_q` tokens of one sequence and one head of keys and values; the query heads that share it are
packed into the rows of one matrix product. Where such programs are too few for the device, each is split along the
keys, and a second kernel joins the parts by their maxima and sums (flash decoding).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_SPLITS = 32
_LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """What a program holds at once: `rows` of packed query heads (of a prompt; decodes need fewer) and `keys`."""

    rows: int
    keys: int


class Plan(NamedTuple):
    """Which program does what, as int32 tensors on the device.

    `table` [sequences, width]: the cache's blocks of each sequence, in order. `lengths` [sequences]: tokens in the
    cache, those of this step included; 0 for a padding row, which attends to nothing and gets zeros. `query_start`
    [sequences + 1]: a sequence's rows. `program_sequence`, `program_first` [programs]: the sequence of a program, and
    its first row counted from the sequence's own.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    query_start: torch.Tensor
    program_sequence: torch.Tensor
    program_first: torch.Tensor
    block_q: int
    splits: int
    tile: Tiles


def attend(  # noqa: PLR0917 - what attention is
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: Plan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """query [rows, heads, head_dim] over keys, values [blocks, kv_heads, block_tokens, head_dim] -> like the query.

    A row sees the keys of its sequence up to its own position, and with a `window` only that many of the last ones.
    `softcap` c bends scores to c * tanh(score / c), as Gemma 2 does.
    """
    rows, heads, head_dim = query.shape
    kv_heads, block_tokens = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    padded_dim = triton.next_power_of_2(head_dim)
    block_m = max(16, triton.next_power_of_2(plan.block_q * group))
    out = torch.empty((rows, heads, head_dim), dtype=query.dtype, device=query.device)
    split = plan.splits > 1
    if split:
        part = torch.empty((rows, heads, plan.splits, head_dim), dtype=torch.float32, device=query.device)
        part_max = torch.empty((rows, heads, plan.splits), dtype=torch.float32, device=query.device)
        part_sum = torch.empty_like(part_max)
    else:
        part = part_max = part_sum = out
    _attend[plan.program_sequence.shape[0], kv_heads, plan.splits](
        query,
        keys,
        values,
        out,
        part,
        part_max,
        part_sum,
        plan.table,
        plan.lengths,
        plan.query_start,
        plan.program_sequence,
        plan.program_first,
        scale * _LOG2_E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * _LOG2_E,
        window or 0,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        out.stride(0),
        out.stride(1),
        plan.table.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_TOKENS=block_tokens,
        TILE=plan.tile.keys,
        BLOCK_Q=plan.block_q,
        BLOCK_M=block_m,
        SPLIT=split,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        num_warps=4,
        num_stages=2,
    )
    if split:
        _join[rows, heads](
            part,
            part_max,
            part_sum,
            out,
            out.stride(0),
            out.stride(1),
            plan.splits,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            MAX_SPLITS=MAX_SPLITS,
            num_warps=4,
        )
    return out


def write(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Put the step's key and value [rows, kv_heads, head_dim] into the cache at `slots` [rows] int32.

    A slot is block * block_tokens + offset. Rows of one slot overwrite each other in any order (padding does).
    """
    rows, kv_heads, head_dim = key.shape
    _write[rows, kv_heads](
        key,
        value,
        keys,
        values,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK_TOKENS=keys.shape[2],
        num_warps=1,
    )


def tiles(head_dim: int, element_bytes: int, capability: tuple[int, int]) -> Tiles:
    """Tile sizes whose sums stay in registers and whose keys stay in shared memory, for a head size and a GPU.

    `capability` is CUDA's. The numbers are those at which ptxas spills (next to) nothing, from 7.5 to 10.0; a product
    of float32 runs without tensor cores and holds more in registers, and so does everything before 8.0.
    """
    wide = triton.next_power_of_2(head_dim)
    if element_bytes == 4:
        return Tiles(32 if wide <= 128 else 16, 16)
    if capability < (8, 0):
        return Tiles(32 if wide <= 128 else 16, 32 if wide <= 64 else 16)
    return Tiles(64, 64) if wide <= 128 else Tiles(32, 32)


def block_q(tile: Tiles, heads: int, kv_heads: int) -> int:
    """How many tokens of a prompt a program takes: as many as fill its rows with their query heads."""
    return max(1, tile.rows // (heads // kv_heads))


@triton.jit(do_not_specialize=["window", "table_stride"])
def _attend(  # type: ignore[no-untyped-def] # noqa: PLR0915, PLR0917 - a kernel is one function of pointers and strides
    query,
    keys,
    values,
    out,
    part,
    part_max,
    part_sum,
    table,
    lengths,
    query_start,
    program_sequence,
    program_first,
    scale,
    softcap,
    window,
    query_row,
    query_head,
    key_block,
    key_head,
    key_token,
    value_block,
    value_head,
    value_token,
    out_row,
    out_head,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(program_sequence + program)
    first = tl.load(program_first + program)
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    length = tl.load(lengths + sequence)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, PADDED_DIM)
    n = tl.arange(0, TILE)
    row = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    row_is = (m < BLOCK_Q * GROUP) & (row < count)
    position = length - count + row
    dim_is = d < HEAD_DIM
    at = (start + row).to(tl.int64)
    q = tl.load(
        query + at[:, None] * query_row + head[:, None] * query_head + d[None, :],
        mask=row_is[:, None] & dim_is[None, :],
        other=0.0,
    )

    # Keys that any row of this program may see: [begin, end).
    end = tl.maximum(0, tl.minimum(length, length - count + first + BLOCK_Q))
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, length - count + first - window + 1)
    tile_begin = begin // TILE
    tile_end = (end + TILE - 1) // TILE
    if SPLIT:
        share = (tl.maximum(0, tile_end - tile_begin) + tl.num_programs(2) - 1) // tl.num_programs(2)
        tile_begin = tile_begin + tl.program_id(2) * share
        tile_end = tl.minimum(tile_end, tile_begin + share)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    for t in range(tile_begin, tile_end):
        key_position = t * TILE + n
        key_is = key_position < end
        block = tl.load(table + sequence * table_stride + key_position // BLOCK_TOKENS, mask=key_is, other=0)
        block = block.to(tl.int64)
        offset = key_position % BLOCK_TOKENS
        key_at = block * key_block + kv_head * key_head + offset * key_token
        k = tl.load(keys + key_at[None, :] + d[:, None], mask=key_is[None, :] & dim_is[:, None], other=0.0)
        # "ieee": float32 stays float32; the tensor cores' TF32 is for those who ask for a smaller type.
        x = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            x = softcap * (2.0 * tl.sigmoid(2.0 * x) - 1.0)  # softcap * tanh(x)
        seen = key_is[None, :] & (key_position[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (key_position[None, :] > position[:, None] - window)
        x = tl.where(seen, x, float("-inf"))
        larger = tl.maximum(largest, tl.max(x, 1))
        # A row that has seen no key yet has no largest score; -inf - -inf would be no number.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(x - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p, 1)
        value_at = block * value_block + kv_head * value_head + offset * value_token
        v = tl.load(values + value_at[:, None] + d[None, :], mask=key_is[:, None] & dim_is[None, :], other=0.0)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        largest = larger

    store = row_is[:, None] & dim_is[None, :]
    if SPLIT:
        splits = tl.num_programs(2)
        heads = tl.num_programs(1) * GROUP
        part_at = (at * heads + head) * splits + tl.program_id(2)
        tl.store(part_max + part_at, largest, mask=row_is)
        tl.store(part_sum + part_at, total, mask=row_is)
        tl.store(part + part_at[:, None] * HEAD_DIM + d[None, :], sums, mask=store)
    else:
        result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        out_at = at[:, None] * out_row + head[:, None] * out_head + d[None, :]
        tl.store(out + out_at, result.to(out.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=["splits"])
def _join(  # type: ignore[no-untyped-def] # noqa: PLR0917
    part,
    part_max,
    part_sum,
    out,
    out_row,
    out_head,
    splits,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    s = tl.arange(0, MAX_SPLITS)
    d = tl.arange(0, PADDED_DIM)
    at = (row * tl.num_programs(1) + head) * splits + s
    largest = tl.load(part_max + at, mask=s < splits, other=float("-inf"))
    total = tl.load(part_sum + at, mask=s < splits, other=0.0)
    sums = tl.load(
        part + at[:, None] * HEAD_DIM + d[None, :], mask=(s < splits)[:, None] & (d < HEAD_DIM)[None, :], other=0.0
    )
    top = tl.max(largest, 0)
    weight = tl.exp2(largest - tl.where(top == float("-inf"), 0.0, top))
    whole = tl.sum(total * weight, 0)
    result = tl.sum(sums * weight[:, None], 0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(out + row * out_row + head * out_head + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def _write(  # type: ignore[no-untyped-def] # noqa: PLR0917
    key,
    value,
    keys,
    values,
    slots,
    key_row,
    key_head_in,
    value_row,
    value_head_in,
    key_block,
    key_head,
    key_token,
    value_block,
    value_head,
    value_token,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    block = (slot // BLOCK_TOKENS).to(tl.int64)
    offset = slot % BLOCK_TOKENS
    d = tl.arange(0, PADDED_DIM)
    dim_is = d < HEAD_DIM
    k = tl.load(key + row * key_row + head * key_head_in + d, mask=dim_is)
    tl.store(keys + block * key_block + head * key_head + offset * key_token + d, k, mask=dim_is)
    v = tl.load(value + row * value_row + head * value_head_in + d, mask=dim_is)
    tl.store(values + block * value_block + head * value_head + offset * value_token + d, v, mask=dim_is)
