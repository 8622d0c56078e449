"""The layout of a packed step, the buckets of graphs, and the size of the cache: numbers in, numbers out."""

import pytest

from gpumeter_worker.engine import paged
from gpumeter_worker.engine.graphs import bucket_for, buckets
from gpumeter_worker.engine.memory import GRAPH_BYTES, SHARE, Facts, size_cache
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling, Sequence

GB = 10**9


def work(computed: int, count: int, blocks: list[int], *, samples: bool = True) -> Work:
    tokens = list(range(100, 100 + computed + count))
    sequence = Sequence("", 0, "", tokens, len(tokens), Sampling(1), computed=computed, blocks=blocks)
    return Work(sequence, count, samples=samples, prefill=count > 1)


def field(numbers: list[int], frame: paged.Frame, name: str) -> list[int]:
    start, length = frame.fields[name]
    return numbers[start : start + length]


def test_a_mixed_step_says_of_every_row_who_it_is_and_where_it_goes() -> None:
    rows = [work(17, 1, [5, 3]), work(16, 3, [9, 2], samples=False)]
    frame = paged.frame(rows, block_q=2)
    numbers = paged.lay_out(rows, frame, spare=50).tolist()
    assert field(numbers, frame, "tokens") == [117, 116, 117, 118]
    assert field(numbers, frame, "positions") == [17, 16, 17, 18]
    assert field(numbers, frame, "slots") == [3 * 16 + 1, 2 * 16, 2 * 16 + 1, 2 * 16 + 2]
    assert field(numbers, frame, "lengths") == [18, 19]
    assert field(numbers, frame, "query_start") == [0, 1, 4]
    assert field(numbers, frame, "program_sequence") == [0, 1, 1]
    assert field(numbers, frame, "program_first") == [0, 0, 2]
    assert field(numbers, frame, "keep") == [0]
    table = field(numbers, frame, "table")
    assert table[:2] == [5, 3]
    assert table[frame.width : frame.width + 2] == [9, 2]


def test_the_padding_of_a_bucket_is_empty_sequences_that_write_to_the_spare_block() -> None:
    rows = [work(4, 1, [7])]
    frame = paged.bucket_frame(4, max_model_len=64)
    numbers = paged.lay_out(rows, frame, spare=50).tolist()
    assert field(numbers, frame, "slots") == [7 * 16 + 4, 800, 800, 800]
    assert field(numbers, frame, "lengths") == [5, 0, 0, 0]
    assert field(numbers, frame, "query_start") == [0, 1, 2, 3, 4]
    assert field(numbers, frame, "program_sequence") == [0, 1, 2, 3]


def test_every_field_starts_where_kernels_expect_aligned_pointers() -> None:
    for frame in (paged.bucket_frame(3, 100), paged.frame([work(0, 5, [1]), work(3, 1, [2])], 4)):
        assert all(start % 16 == 0 for start, _ in frame.fields.values())
        ends = [start + length for start, length in frame.fields.values()]
        assert all(end <= start for end, (start, _) in zip(ends, list(frame.fields.values())[1:], strict=False))
        assert frame.size >= max(ends)


def test_a_step_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        paged.lay_out([work(70, 1, [1, 2, 3, 4, 5])] * 2, paged.bucket_frame(1, 96), spare=9)
    with pytest.raises(ValueError, match="does not fit"):
        paged.lay_out([work(20, 1, [1])], paged.bucket_frame(1, 96), spare=9)


def test_only_steps_of_sampling_decodes_are_replayed() -> None:
    assert paged.only_decodes([work(4, 1, [1]), work(9, 1, [2])])
    assert not paged.only_decodes([work(4, 1, [1]), work(0, 2, [2])])
    assert not paged.only_decodes([work(4, 1, [1], samples=False)])


def test_buckets_are_powers_of_two_up_to_the_largest_batch() -> None:
    assert buckets(1) == [1]
    assert buckets(48) == [1, 2, 4, 8, 16, 32, 48]
    assert buckets(64) == [1, 2, 4, 8, 16, 32, 64]
    for batch in range(1, 49):
        bucket = bucket_for(batch, buckets(48))
        assert bucket is not None
        assert batch <= bucket < 2 * batch or bucket == 1
    assert bucket_for(49, buckets(48)) is None


def test_few_long_sequences_are_split_and_many_or_short_ones_are_not() -> None:
    assert paged.splits_for(programs=1, kv_heads=8, longest=32_768, multiprocessors=132) == 32
    assert paged.splits_for(programs=4, kv_heads=8, longest=32_768, multiprocessors=132) == 8
    assert paged.splits_for(programs=64, kv_heads=8, longest=32_768, multiprocessors=132) == 1
    assert paged.splits_for(programs=1, kv_heads=8, longest=300, multiprocessors=132) == 1
    assert paged.splits_for(programs=1, kv_heads=8, longest=1_100, multiprocessors=132) == 4
    assert paged.splits_for(programs=1, kv_heads=8, longest=32_768, multiprocessors=0) == 1


def facts(**changes: int) -> Facts:
    """A GPU of 24 GB with a model of 16 GB, whose blocks of 16 tokens take 2 MiB (8B parameters, bfloat16)."""
    known = {
        "total": 24 * GB,
        "free": 7 * GB,
        "held": 16 * GB,
        "peak": 18 * GB,
        "weights": 16 * GB,
        "graphs": 7,
        "block": 2 * 2**20,
        "needed": 256,
        "max_model_len": 4096,
    }
    return Facts(**known | changes)


def test_the_cache_takes_what_the_share_leaves_after_the_peak_others_and_graphs() -> None:
    sizing = size_cache(facts())
    left = int(24 * GB * SHARE) - 1 * GB - 18 * GB - 7 * GRAPH_BYTES
    assert sizing.problem == ""
    assert (sizing.blocks + 1) * 2 * 2**20 <= left < (sizing.blocks + 2) * 2 * 2**20


def test_memory_of_other_processes_is_not_taken() -> None:
    assert size_cache(facts()).blocks - size_cache(facts(free=6 * GB)).blocks in (GB // 2**21, GB // 2**21 + 1)


def test_a_gpu_too_small_for_one_sequence_is_told_with_the_numbers_and_a_length_that_fits() -> None:
    sizing = size_cache(facts(needed=2048, max_model_len=32_768))
    assert sizing.blocks == 0
    for part in ("the weights take 16.00 GB", "4.30 GB of cache", "2.42 GB", "24.00 GB", "lower maxModelLen to "):
        assert part in sizing.problem
    fitting = int(sizing.problem.partition("lower maxModelLen to ")[2].split()[0])
    assert 0 < fitting < 32_768
    assert size_cache(facts(needed=paged.blocks_for(fitting), max_model_len=fitting)).blocks >= fitting // 16


def test_a_gpu_with_nothing_left_is_told_without_a_length() -> None:
    problem = size_cache(facts(peak=22 * GB)).problem
    assert "0.00 GB of the GPU's 24.00 GB are left" in problem
    assert "lower maxModelLen or maxBatchTokens" in problem
