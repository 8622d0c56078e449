"""Steps on a GPU: eager and replayed from graphs, in mixed batches of prompts and decodes. Tokens are generate's."""

import pytest
import torch

from gpumeter_worker.engine import gpu, paged
from gpumeter_worker.engine.graphs import CudaRecorder, buckets
from gpumeter_worker.engine.memory import size_cache
from gpumeter_worker.engine.paged_attention import choose
from gpumeter_worker.engine.paged_steps import PagedSteps, largest_step
from rigs.paged import KINDS, MAX_MODEL_LEN, PROMPTS, expected, greedy, heads_of, steps_for, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

NEW_TOKENS = 24


def gpu_steps(kind: str, blocks: int = 40, max_model_len: int = MAX_MODEL_LEN) -> PagedSteps:
    gpu.configure()
    model = tiny_model(kind, "cuda")
    backend, remarks = choose("auto", heads_of(model), torch.float32, "cuda")
    assert (backend.name, remarks) == ("triton", [])
    return steps_for(
        model,
        backend,
        "cuda",
        blocks=blocks,
        multiprocessors=gpu.multiprocessors(),
        max_model_len=max_model_len,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_gets_generates_tokens_eagerly_and_from_graphs(kind: str) -> None:
    gpu.configure()
    wanted = expected(tiny_model(kind, "cuda"), PROMPTS, NEW_TOKENS)
    steps = gpu_steps(kind)
    assert greedy(steps, PROMPTS, NEW_TOKENS, chunk=7) == wanted
    with torch.inference_mode():
        steps.compile()
        assert steps.capture(buckets(8), CudaRecorder()) == ""
    assert steps.buckets == [1, 2, 4, 8]
    used: list[int | None] = []
    assert greedy(steps, PROMPTS, NEW_TOKENS, on_step=used.append) == wanted
    assert used.count(4) >= NEW_TOKENS - 2
    assert greedy(steps, PROMPTS[:3], NEW_TOKENS) == wanted[:3]  # three decodes in the bucket of four


def test_replays_give_the_logits_of_eager_steps_whatever_ran_between() -> None:
    steps = gpu_steps("llama")
    with torch.inference_mode():
        steps.capture(buckets(8), CudaRecorder())
        for size in (8, 1, 4, 2, 8):
            probe = steps.probe([1] * size)
            eager = steps.logits(steps.stage(probe, splits=1)).clone()
            steps.logits(steps.stage(steps.probe([30, 1])))
            staged = steps.stage(probe)
            assert staged.bucket == size
            torch.testing.assert_close(steps.logits(staged), eager, rtol=1e-3, atol=1e-3)


def test_a_decode_whose_tables_are_sent_narrow_never_reads_what_longer_ones_left_there() -> None:
    gpu.configure()
    reference = tiny_model("llama", "cuda")
    steps = gpu_steps("llama", blocks=100, max_model_len=131_072)
    with torch.inference_mode():
        assert steps.capture(buckets(8), CudaRecorder()) == ""
    long = [[(7 * column) % 97 + 1 for column in range(300)]] * 4
    for prompts in (long, PROMPTS):
        assert greedy(steps, prompts, 8, chunk=400) == expected(reference, prompts, 8)


@pytest.mark.parametrize("max_model_len", [MAX_MODEL_LEN, 131_072])
def test_staging_and_launching_a_step_wait_for_nothing(max_model_len: int) -> None:
    steps = gpu_steps("llama", max_model_len=max_model_len)
    with torch.inference_mode():
        steps.compile()
        steps.capture(buckets(4), CudaRecorder())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.logits(steps.stage(steps.probe([1, 1, 1])))
            steps.logits(steps.stage(steps.probe([20, 1])))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_cache_that_the_measured_peak_leaves_room_for_fits_with_the_largest_step() -> None:
    steps = gpu_steps("llama", blocks=0)
    heads = steps.cache.keys[0].shape[1:]
    block = 2 * len(steps.cache.keys) * heads.numel() * 4
    weights = torch.cuda.memory_allocated()
    gpu.forget_peak()
    works = largest_step(steps, max_batch_size=8, step_tokens=512, max_model_len=MAX_MODEL_LEN)
    with torch.inference_mode():
        steps.logits(steps.stage(works))
    facts = gpu.facts(
        weights=weights,
        graphs=4,
        block=block,
        needed=paged.blocks_for(MAX_MODEL_LEN),
        max_model_len=MAX_MODEL_LEN,
    )
    sizing = size_cache(facts)
    assert sizing.problem == ""
    whole = gpu_steps("llama", blocks=sizing.blocks)
    with torch.inference_mode():
        assert whole.capture(buckets(8), CudaRecorder()) == ""
        whole.logits(whole.stage(largest_step(whole, 8, 512, MAX_MODEL_LEN)))
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    assert free >= 0.05 * total
