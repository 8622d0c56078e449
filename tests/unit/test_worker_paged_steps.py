"""The GPU's way of running steps, on a CPU: paged cache, packed buffers, padded buckets. Tokens are generate's.

What a GPU does in graphs is done here by running the recorded function again over the same static buffers.
"""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpumeter_worker.engine import paged
from gpumeter_worker.engine.gpu import configure, show_triton_the_driver
from gpumeter_worker.engine.graphs import buckets
from gpumeter_worker.engine.paged_attention import Backend, Heads, choose
from gpumeter_worker.engine.paged_steps import PagedSteps, largest_step
from rigs.paged import KINDS, MAX_MODEL_LEN, PROMPTS, expected, greedy, heads_of, steps_for, tiny_model

NEW_TOKENS = 12


class RunAgain:
    """A recorder without a GPU: a replay is another run of the same function."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        run()
        return run


def gathering(heads: Heads) -> Backend:
    backend, remarks = choose("gather", heads, torch.float32, "cpu")
    assert remarks == []
    return backend


def cpu_steps(kind: str) -> tuple[object, PagedSteps]:
    model = tiny_model(kind, "cpu")
    reference = tiny_model(kind, "cpu")
    return reference, steps_for(model, gathering(heads_of(model)), "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_gets_generates_tokens_eagerly_and_in_padded_buckets(kind: str) -> None:
    reference, steps = cpu_steps(kind)
    wanted = expected(reference, PROMPTS, NEW_TOKENS)
    assert len({tuple(tokens) for tokens in wanted}) == len(PROMPTS)
    assert all(len(set(tokens)) > 2 for tokens in wanted), "a model that repeats itself proves nothing"
    assert greedy(steps, PROMPTS, NEW_TOKENS, chunk=7) == wanted
    recorder = RunAgain()
    with torch.inference_mode():
        assert steps.capture([2, 8], recorder) == ""
    assert (recorder.recorded, steps.buckets) == (2, [2, 8])
    used: list[int | None] = []
    assert greedy(steps, PROMPTS, NEW_TOKENS, on_step=used.append) == wanted
    assert used.count(8) >= NEW_TOKENS - 2  # four decodes in a bucket of eight
    used.clear()
    assert greedy(steps, PROMPTS[:1], NEW_TOKENS, on_step=used.append) == wanted[:1]
    assert used.count(2) == NEW_TOKENS - 1


def test_without_graphs_no_step_is_padded() -> None:
    _, steps = cpu_steps("llama")
    used: list[int | None] = []
    greedy(steps, PROMPTS, 4, on_step=used.append)
    assert set(used) == {None}


class Refuses:
    """A device on which nothing can be recorded."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")


class Forgets:
    """A recording that does nothing when it is replayed."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        return lambda: None


def test_a_capture_that_fails_leaves_eager_steps_and_a_sentence() -> None:
    reference, steps = cpu_steps("llama")
    with torch.inference_mode():
        remark = steps.capture(buckets(4), Refuses())
    assert "operation not permitted when stream is capturing" in remark
    assert "eagerly" in remark
    assert steps.buckets == []
    assert greedy(steps, PROMPTS, 4) == expected(reference, PROMPTS, 4)


def test_a_replay_that_gives_other_logits_than_the_eager_step_is_not_used() -> None:
    _, steps = cpu_steps("llama")
    with torch.inference_mode():
        remark = steps.capture([4], Forgets())
    assert "other logits" in remark
    assert steps.buckets == []


class Ops(TorchDispatchMode):
    """Which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_asks_the_device_for_no_value_and_sends_it_no_constant(kind: str) -> None:
    """Either would fail a graph's capture: a read-back waits for the device, a constant is a copy from the host."""
    _, steps = cpu_steps(kind)
    with torch.no_grad(), Ops() as ops:  # in inference mode an operation would be seen without what it is made of
        steps.capture([2], RunAgain())
        del ops.names[:]
        steps.logits(steps.stage(steps.probe([1, 1])))
    assert "mm" in ops.names or "addmm" in ops.names
    forbidden = {"_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "is_nonzero", "equal"}
    assert forbidden.isdisjoint(ops.names)


class Copied(TorchDispatchMode):
    """How many numbers each copy took."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ == "copy_":
            self.counts.append(args[0].numel())
        return func(*args, **kwargs or {})


def test_a_decode_sends_tables_as_wide_as_its_longest_sequence_and_never_reads_what_longer_ones_left_there() -> None:
    model, reference = tiny_model("llama", "cpu"), tiny_model("llama", "cpu")
    steps = steps_for(model, gathering(heads_of(model)), "cpu", max_model_len=33_024)
    with torch.no_grad():
        assert steps.capture([8], RunAgain()) == ""
    assert paged.bucket_frame(8, 33_024).width == 2064
    long = [[(7 * column) % 97 + 1 for column in range(300)]]
    used: list[int | None] = []
    for prompts in (long, PROMPTS):
        wanted = expected(reference, prompts, 3)
        assert greedy(steps, prompts, 3, chunk=400, on_step=used.append) == wanted
    assert used == [None, 8, 8] * 2
    with torch.no_grad(), Copied() as copied:
        steps.stage(steps.probe([1] * 8))
    assert sum(copied.counts) < 8 * 16 + 256


def test_the_largest_step_is_a_full_batch_with_as_many_tokens_as_a_step_may_have() -> None:
    _, steps = cpu_steps("llama")
    works = largest_step(steps, max_batch_size=4, step_tokens=200, max_model_len=MAX_MODEL_LEN)
    assert [work.count for work in works] == [96, 96, 7, 1]
    assert all(work.samples for work in works)
    assert all(set(work.sequence.blocks) == {steps.cache.spare} for work in works)
    with torch.inference_mode():
        assert steps.logits(steps.stage(works)).shape == (4, 128)


def test_what_another_sequence_left_behind_does_not_matter() -> None:
    reference, steps = cpu_steps("llama")
    for tensor in steps.cache.keys + steps.cache.values:
        tensor.fill_(float("nan"))
    assert greedy(steps, PROMPTS, 6, chunk=5) == expected(reference, PROMPTS, 6)


def test_what_cannot_be_used_is_told_and_the_next_one_is_taken() -> None:
    backend, remarks = choose("varlen", Heads(4, 2, 64), torch.float32, "cpu")
    assert backend.name in ("triton", "gather")
    assert remarks[0].startswith("attention by varlen is not used: ")


def test_an_attention_of_an_unknown_name_is_told_and_the_default_is_taken() -> None:
    backend, remarks = choose("flash", Heads(4, 2, 64), torch.float32, "cpu")
    assert backend.name in ("triton", "gather")
    assert "must be one of auto, triton, varlen, gather" in remarks[0]


def test_triton_is_told_where_the_driver_lies_that_is_in_use() -> None:
    environment: dict[str, str] = {}
    show_triton_the_driver(
        "7f00-7f01 r-xp 00000000 08:01 42    /usr/lib/libc.so.6\n7f02-7f03 rw-p 00 00:00 0", environment
    )
    assert environment == {}
    mapped = "7f00-7f01 r-xp 00000000 08:01 42    /usr/lib64/nvidia/libcuda.so.570.86.10\n"
    show_triton_the_driver(mapped, environment)
    assert environment == {"TRITON_LIBCUDA_PATH": "/usr/lib64/nvidia"}
    environment["TRITON_LIBCUDA_PATH"] = "/opt/driver"
    show_triton_the_driver(mapped, environment)
    assert environment == {"TRITON_LIBCUDA_PATH": "/opt/driver"}


def test_float32_stays_float32() -> None:
    torch.set_float32_matmul_precision("high")
    configure()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
