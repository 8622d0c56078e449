"""Triton's paged attention gives what SDPA gives over contiguous keys and values.

On a GPU as it is; without one in Triton's interpreter, where TRITON_INTERPRET=1 is set before Python starts (the unit
ring does that). The interpreter computes no bfloat16, so there it is float32 and float16.
"""

import os
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpumeter_worker.engine import paged
from gpumeter_worker.engine.paged import BLOCK_TOKENS, Frame
from gpumeter_worker.engine.paged_attention import Backend, Heads, PagedCache, PagedStep, _triton, choose, view
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling, Sequence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="this machine has no CUDA device, and TRITON_INTERPRET is not 1"
)
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
WORST = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SMALL = Heads(4, 2, 64)


@dataclass
class Case:
    """Sequences as (new tokens, tokens in all), over blocks in random order."""

    parts: list[tuple[int, int]]
    heads: Heads = SMALL
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    splits: int = 1
    frame: Frame | None = None
    shared: int = 0
    """So many first blocks are the same ones in every sequence."""
    step: PagedStep = field(init=False)

    def off(self) -> float:
        """The largest difference from SDPA, of attention over what the kernel itself wrote; rows in plan's order."""
        backend = self.backend()
        heads, generator = self.heads, torch.Generator().manual_seed(7)
        needed = [paged.blocks_for(length) for _, length in self.parts]
        cache = PagedCache(1, sum(needed) + 3, heads, self.dtype, DEVICE)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, self.dtype)

        keys, values = cache.keys[0], cache.values[0]
        keys.fill_(float("nan"))  # what nobody wrote must not matter
        values.fill_(float("nan"))
        free = torch.randperm(cache.blocks, generator=generator).tolist()
        rows, contiguous = [], []
        for number, ((count, length), blocks) in enumerate(zip(self.parts, needed, strict=True)):
            sequence = Sequence("", number, "", [1] * length, length, Sampling(1), computed=length - count)
            sequence.blocks = [free.pop() for _ in range(blocks)]
            if self.shared and rows:
                sequence.blocks[: self.shared] = rows[0].sequence.blocks[: self.shared]
            rows.append(Work(sequence, count, samples=True, prefill=count > 1))
            context, spots = length - count, self.spots(sequence, 0, length - count)
            if self.shared and number:
                old = keys[spots[0], :, spots[1]].clone(), values[spots[0], :, spots[1]].clone()
            keys[spots[0], :, spots[1]] = noise(context, heads.kv, heads.dim)
            values[spots[0], :, spots[1]] = noise(context, heads.kv, heads.dim)
            if self.shared and number:
                kept = min(context, self.shared * BLOCK_TOKENS)
                keys[spots[0][:kept], :, spots[1][:kept]] = old[0][:kept]
                values[spots[0][:kept], :, spots[1][:kept]] = old[1][:kept]
        frame = self.frame or paged.frame(rows, backend.block_q)
        buffer = torch.frombuffer(paged.lay_out(rows, frame, cache.spare), dtype=torch.int32).to(DEVICE)
        self.step = view(buffer, frame, cache, self.splits, max(length for _, length in self.parts))
        # As a model hands them over: views of [rows, heads, head_dim] whose strides are not their own.
        new_key, new_value = (noise(heads.kv, frame.rows, heads.dim).transpose(0, 1) for _ in range(2))
        query = noise(frame.rows, heads.query, 2 * heads.dim)[..., : heads.dim]
        backend.write(new_key, new_value, keys, values, self.step)
        scale = self.scale or heads.dim**-0.5
        out = backend.attend(query, keys, values, self.step, scale, self.window, self.softcap)
        assert out.shape == query.shape
        assert not out.isnan().any()
        start, worst = 0, 0.0
        for work, (count, length) in zip(rows, self.parts, strict=True):
            spots = self.spots(work.sequence, 0, length)
            k, v = keys[spots[0], :, spots[1]].clone(), values[spots[0], :, spots[1]].clone()
            assert torch.equal(k[length - count :], new_key[start : start + count])
            assert torch.equal(v[length - count :], new_value[start : start + count])
            contiguous.append(self.plain(query[start : start + count], k, v, scale))
            worst = max(worst, float((out[start : start + count] - contiguous[-1]).abs().max()))
            start += count
        assert not out[start:].any(), "a padding row attends to nothing"
        return worst

    def backend(self) -> Backend:
        return _triton(self.heads, self.dtype, DEVICE)

    def spots(self, sequence: Sequence, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(first, last)
        return torch.tensor(sequence.blocks)[at // BLOCK_TOKENS].to(DEVICE), (at % BLOCK_TOKENS).to(DEVICE)

    def plain(self, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """query [count, heads, dim], k and v [length, kv_heads, dim] -> [count, heads, dim], by SDPA in float32."""
        count, length, group = query.shape[0], k.shape[0], self.heads.query // self.heads.kv
        mask = torch.ones(count, length, dtype=torch.bool, device=DEVICE).tril(length - count)
        if self.window is not None:
            mask = mask.triu(length - count - self.window + 1)
        q, k, v = (one.float().transpose(0, 1) for one in (query, k, v))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        if self.softcap is None:
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
        else:
            scores = self.softcap * torch.tanh(q @ k.transpose(1, 2) * scale / self.softcap)
            out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        return out.transpose(0, 1).to(self.dtype)


MIXED = [(1, 40), (20, 50), (5, 5), (1, 1), (1, 129)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "parts", [[(1, 33), (1, 200), (1, 1)], [(37, 37)], [(19, 70)], MIXED], ids=["decodes", "prompt", "chunk", "mixed"]
)
def test_a_step_gives_what_sdpa_gives(parts: list[tuple[int, int]], dtype: torch.dtype) -> None:
    assert Case(parts, dtype=dtype).off() <= WORST[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_split_along_the_keys_gives_the_same(dtype: torch.dtype) -> None:
    assert Case(MIXED, dtype=dtype, splits=4).off() <= WORST[dtype]


@pytest.mark.parametrize(
    "heads", [Heads(9, 3, 64), Heads(2, 2, 80), Heads(7, 1, 96), Heads(8, 2, 128), Heads(2, 1, 256)]
)
def test_heads_of_every_size_and_grouping(heads: Heads) -> None:
    assert Case([(1, 18), (6, 20)], heads).off() <= WORST[torch.float32]
    assert Case([(1, 18), (6, 20)], heads, splits=2).off() <= WORST[torch.float32]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [1, 17, 500])
def test_a_window_hides_what_lies_further_back(window: int, splits: int) -> None:
    assert Case(MIXED, window=window, splits=splits).off() <= WORST[torch.float32]


def test_a_softcap_and_a_scale_of_the_models_own() -> None:
    case = Case(MIXED, softcap=5.0, scale=0.7)
    assert case.off() <= 5e-4
    assert Case(MIXED, softcap=5.0, scale=0.7, window=9, splits=2).off() <= 5e-4


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65])
def test_lengths_at_the_edges_of_blocks_and_tiles(length: int) -> None:
    assert Case([(1, length), (length, length), (2, length)]).off() <= WORST[torch.float32]


def test_sequences_that_share_their_first_blocks() -> None:
    assert Case([(1, 40), (3, 50), (1, 35)], shared=2).off() <= WORST[torch.float32]


@pytest.mark.parametrize("splits", [1, 2])
def test_the_padding_rows_of_a_bucket_attend_to_nothing_and_disturb_nobody(splits: int) -> None:
    case = Case([(1, 20), (1, 70), (1, 5)], frame=paged.bucket_frame(8, 160), splits=splits)
    assert case.off() <= WORST[torch.float32]


def test_more_splits_than_there_are_keys() -> None:
    assert Case([(1, 3), (1, 90)], splits=32).off() <= WORST[torch.float32]


def test_a_long_sequence_in_many_parts() -> None:
    assert Case([(1, 3000 if DEVICE == "cuda" else 700)], splits=8).off() <= WORST[torch.float32]


PART = st.tuples(st.integers(1, 20), st.integers(0, 60)).map(lambda drawn: (drawn[0], sum(drawn)))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    parts=st.lists(PART, min_size=1, max_size=4),
    heads=st.sampled_from([Heads(1, 1, 16), Heads(6, 2, 32), Heads(3, 1, 40)]),
    window=st.none() | st.integers(1, 40),
    splits=st.sampled_from([1, 3, 5]),
)
def test_any_step(parts: list[tuple[int, int]], heads: Heads, window: int | None, splits: int) -> None:
    assert Case(parts, heads, window=window, splits=splits).off() <= WORST[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_are_chosen_where_they_agree_with_the_plain_computation(dtype: torch.dtype) -> None:
    backend, remarks = choose("auto", SMALL, dtype, DEVICE)
    assert (backend.name, remarks) == ("triton", [])
