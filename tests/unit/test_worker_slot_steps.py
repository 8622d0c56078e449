"""Steps over slots: what a sequence leaves behind hurts nobody who comes after it."""

from random import Random

import pytest
import torch

from gpumeter_worker.engine.attention import SlotCache, StepContext
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling, Sequence
from gpumeter_worker.engine.slot_steps import SlotSteps

NAN = float("nan")


def sequence(length: int, computed: int = 0) -> Sequence:
    one = Sequence("s", 0, "", [1] * length, length, Sampling(4), computed=computed, random=Random(0))
    one.blocks = [0]
    return one


@pytest.fixture
def steps() -> SlotSteps:
    """Steps of a model that computes no numbers: each row's key and value are none."""
    cache = SlotCache(2, (2, 1, 32, 4), torch.float32, "cpu")

    def forward(tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor, step: StepContext) -> torch.Tensor:
        for layer in (*cache.keys, *cache.values):
            layer[0, :, positions[0]] = NAN
        return torch.zeros(len(keep), 8)

    return SlotSteps(forward, cache)


def run(steps: SlotSteps, one: Sequence, count: int) -> None:
    samples = one.computed + count == one.prompt_length
    steps.logits(steps.stage([Work(one, count, samples=samples, prefill=True)]))
    one.computed += count


def finite(steps: SlotSteps) -> list[bool]:
    return [all(bool(layer[0, :, at].isfinite().all()) for layer in steps.cache.values) for at in range(16)]


def test_what_a_sequence_left_that_was_cancelled_within_its_prompt_is_gone_when_another_comes(steps: SlotSteps) -> None:
    run(steps, sequence(16), 12)
    assert finite(steps) == [False] * 12 + [True] * 4
    steps.stage([Work(sequence(4), 4, samples=True, prefill=True)])
    assert all(finite(steps))


def test_a_prefix_that_another_finds_in_the_slot_stays(steps: SlotSteps) -> None:
    for layer in steps.cache.values:
        layer[0, :, :4] = 7.0
    run(steps, sequence(16, computed=4), 6)
    steps.stage([Work(sequence(8, computed=4), 4, samples=True, prefill=True)])
    assert all(finite(steps))
    assert all(bool((layer[0, :, :4] == 7.0).all()) for layer in steps.cache.values)


def test_a_sequence_keeps_what_its_own_chunks_computed(steps: SlotSteps) -> None:
    one = sequence(16)
    run(steps, one, 6)
    steps.stage([Work(one, 10, samples=True, prefill=True)])
    assert finite(steps)[:6] == [False] * 6
