"""Sampling against a plain reference in float64 that sorts everything, and rows against the same rows alone."""

import itertools
import math
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpumeter_worker.engine.loop import Sampled
from gpumeter_worker.engine.ranking import likeliest, maxima
from gpumeter_worker.engine.sampling import Sampler, choose, read
from gpumeter_worker.engine.sequence import Sampling, Sequence
from rigs.thoroughness import examples

WIDTHS = st.sampled_from((3, 63, 64, 65, 700, 4099))

REQUESTS = st.fixed_dictionaries(
    {"temperature": st.sampled_from((0.0, 0.3, 1.0, 1.7))},
    optional={
        "top_p": st.sampled_from((0.05, 0.5, 0.9, 0.999)),
        "top_k": st.sampled_from((1, 2, 40, 64, 65, 600, 5000)),
        "min_p": st.sampled_from((0.01, 0.3)),
        "repetition_penalty": st.sampled_from((0.8, 1.3)),
        "frequency_penalty": st.sampled_from((-0.5, 0.7)),
        "presence_penalty": st.sampled_from((-0.5, 0.7)),
        "logit_bias": st.lists(
            # Quarters, which float32 adds as float64 does: else a tie in one is none in the other.
            st.tuples(st.integers(0, 2), st.integers(-20, 20).map(lambda quarters: quarters / 4)),
            max_size=3,
            unique_by=lambda one: one[0],
        ).map(tuple),
        "min_tokens": st.sampled_from((2, 50)),
        "stop_ids": st.just((2,)),
        "logprobs": st.sampled_from((0, 1, 20)),
    },
)


def logits_of(seed: int, rows: int, width: int) -> torch.Tensor:
    """As a model in bf16 gives them: with many ties, and once in a while nearly flat."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.05, 1.0, 3.0])[torch.randint(3, (rows, 1), generator=generator)]
    return (torch.randn(rows, width, generator=generator) * spread).to(torch.bfloat16)


def a_sequence(asked: dict[str, Any], width: int, seed: int) -> Sequence:
    random = Random(seed)
    tokens = [random.randrange(min(width, 20)) for _ in range(8)]
    return Sequence("s", 0, "", tokens, 4, Sampling(max_tokens=64, **asked), random=random)


def sampled(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
    batch = Sampler(logits.shape[1], frozenset({1}), "cpu").prepare(sequences)
    return read(choose(logits, batch), batch)


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 2**32), width=WIDTHS, requests=st.lists(REQUESTS, min_size=2, max_size=9))
def test_a_row_gets_the_same_to_the_last_bit_whatever_its_neighbours_are(
    seed: int, width: int, requests: list[dict[str, Any]]
) -> None:
    logits = logits_of(seed, len(requests), width)

    def rows() -> list[Sequence]:
        return [a_sequence(asked, width, seed + at) for at, asked in enumerate(requests)]

    alone = [sampled(logits[at : at + 1], [one])[0] for at, one in enumerate(rows())]
    assert sampled(logits, rows()) == alone
    assert sampled(logits.flip(0), rows()[::-1]) == alone[::-1]


def exponential(key: int, name: int) -> float:
    """-log(u) of the noise, in integers that do not wrap."""

    def mixed(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    return -math.log(((mixed((mixed(key) + name * 0x9E3779B97F4A7C15) % 2**64) >> 12) + 0.5) / 2**52)


def winners(weights: dict[int, float], key: int) -> set[int]:
    """Who wins the race by name, and who would if logits were a ten-thousandth off."""
    times = {name: exponential(key, name) / weight for name, weight in weights.items() if weight > 0}
    return {name for name, time in times.items() if time <= min(times.values()) * (1 + 1e-4)}


def reference(logits: torch.Tensor, sequence: Sequence, key: int) -> set[int]:
    """The token; two where float64 and float32 may differ about what is likelier, or about the end of top-p's set."""
    one = sequence.sampling
    row = logits.double().clone()
    for token, bias in one.logit_bias:
        row[token] += bias
    if sequence.generated < one.min_tokens:
        row[[1, *one.stop_ids]] = -torch.inf
    for token in set(sequence.tokens):
        row[token] = row[token] / one.repetition_penalty if row[token] > 0 else row[token] * one.repetition_penalty
    answer = sequence.tokens[sequence.prompt_length :]
    for token in set(answer):
        row[token] -= one.frequency_penalty * answer.count(token) + one.presence_penalty
    if one.temperature == 0:
        return {int(row.argmax())}
    order = sorted(range(len(row)), key=lambda token: (-row[token].item(), token))
    p = (row / one.temperature).softmax(-1).tolist()
    kept = [token for token in order if p[token] >= one.min_p * max(p)][: one.top_k or None]
    if one.top_p >= 1 and not 0 < one.top_k < len(row):
        blocks: dict[int, float] = {}
        for token in kept:
            blocks[len(row) + token // 64] = blocks.get(len(row) + token // 64, 0) + p[token]
        return {
            token
            for block in winners(blocks, key)
            for token in winners({token: p[token] for token in kept if len(row) + token // 64 == block}, key)
        }
    sums = [0.0, *itertools.accumulate(p[token] for token in kept)]
    smallest = [
        {token: p[token] for at, token in enumerate(kept) if at == 0 or one.top_p >= 1 or sums[at] < share * sums[-1]}
        for share in (one.top_p - 1e-6, one.top_p + 1e-6)
    ]
    return winners(smallest[0], key) | winners(smallest[1], key)


@settings(max_examples=examples(150), deadline=None)
@given(seed=st.integers(0, 2**32), width=WIDTHS, asked=REQUESTS)
def test_the_token_is_the_one_that_wins_the_race_among_what_a_full_sort_in_float64_keeps(
    seed: int, width: int, asked: dict[str, Any]
) -> None:
    logits = logits_of(seed, 1, width)
    sequence = a_sequence(asked, width, seed)
    copy = Random()
    copy.setstate(sequence.random.getstate())
    [one] = sampled(logits, [sequence])
    meant = reference(logits[0], sequence, int(copy.random() * 2**53))
    assert one.token in meant
    assert len(meant) <= 2
    if asked.get("logprobs") is not None:
        logprobs = logits[0].double().log_softmax(-1)
        assert one.logprob == pytest.approx(float(logprobs[one.token]), abs=1e-4)
        best = logprobs.sort(descending=True, stable=True)
        count = min(asked["logprobs"], width)
        assert [token for token, _ in one.top] == best.indices[:count].tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values[:count].tolist(), abs=1e-4)


@pytest.mark.parametrize("asked", [{}, {"top_k": 50}, {"top_p": 0.5}, {"min_p": 0.001}], ids=str)
def test_logits_as_another_batch_computes_them_give_the_same_tokens(asked: dict[str, Any]) -> None:
    """Other kernels for another number of rows move logits by some 3e-5; most of a vocabulary is rarer than that."""
    vocabulary, rows = 49_152, 80
    generator = torch.Generator().manual_seed(4)
    ranks = torch.randperm(vocabulary, generator=generator) + 1.0
    draws = examples(6_000 if not asked else 2_000)
    changed = 0
    for first in range(0, draws, rows):
        # As steep as text is: the likeliest token has 9 %, and half of all draws are of tokens with less than 0.06 %.
        logits = -ranks.log()
        moved = logits + 3e-5 * torch.randn(vocabulary, generator=generator)
        both = [
            [
                one.token
                for one in sampled(
                    alike.expand(rows, -1),
                    [a_sequence({"temperature": 1.0, **asked}, vocabulary, first + at) for at in range(rows)],
                )
            ]
            for alike in (logits, moved)
        ]
        changed += sum(one != other for one, other in zip(*both, strict=True))
    assert changed <= draws // 1000


@pytest.mark.parametrize(
    ("asked", "warper"),
    [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
    ],
)
def test_what_is_kept_is_what_transformers_keeps(asked: dict[str, Any], warper: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 500, generator=generator) * 2
    expected = set(torch.isfinite(warper(None, logits.clone()))[0].nonzero()[:, 0].tolist())
    rows = [a_sequence({"temperature": 1.0, **asked}, 500, seed) for seed in range(3000)]
    found = {one.token for one in sampled(logits.expand(3000, -1), rows)}
    assert found <= expected
    assert len(found) > 0.9 * len(expected)


def test_the_repetition_penalty_is_transformers_own() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(3))
    for seed in range(20):
        sequence = a_sequence({"temperature": 0.0, "repetition_penalty": 1.8, "logprobs": 0}, 500, seed)
        sequence.tokens += logits[0].topk(10).indices.tolist()[: seed // 2]
        expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([sequence.tokens]), logits.clone()).argmax()
        assert sampled(logits, [sequence])[0].token == int(expected)


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 2**32), width=WIDTHS, count=st.sampled_from((1, 2, 64, 700)))
def test_the_likeliest_are_those_of_a_stable_sort(seed: int, width: int, count: int) -> None:
    rows = logits_of(seed, 3, width).float()
    order = rows.sort(dim=-1, descending=True, stable=True)
    assert likeliest(rows, count).tolist() == order.indices[:, :count].tolist()
    values, first = maxima(rows)
    assert values.tolist() == order.values[:, 0].tolist()
    assert first.tolist() == order.indices[:, 0].tolist()
