"""Sampling: the distribution that was asked for, from one number of the sequence's own a row."""

import math
from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import Any

import pytest
import torch

from gpumeter_worker.engine.loop import Sampled
from gpumeter_worker.engine.sampling import Sampler, choose, noise, read
from gpumeter_worker.engine.sequence import Sampling, Sequence

PROBABILITIES = (0.1, 0.4, 0.2, 0.3)
LOGITS = torch.tensor([PROBABILITIES]).log()
EOS = 1
DRAWS = 8_000


class Given(Random):
    """A generator that gives one number."""

    def __init__(self, number: float) -> None:
        super().__init__(0)
        self._number = number

    def random(self) -> float:
        return self._number


def a_sequence(
    uniform: float = 0.5, prompt: Iterable[int] = (0,), answer: Iterable[int] = (), **asked: Any
) -> Sequence:
    prompt, answer = list(prompt), list(answer)
    sampling = Sampling(**{"max_tokens": 64, **asked})
    return Sequence("s", 0, "", prompt + answer, len(prompt), sampling, random=Given(uniform))


def sampled(logits: torch.Tensor, sequences: list[Sequence], sampler: Sampler | None = None) -> list[Sampled]:
    sampler = sampler or Sampler(logits.shape[1], frozenset({EOS}), "cpu")
    batch = sampler.prepare(sequences)
    return read(choose(logits, batch), batch)


def tokens(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return [one.token for one in sampled(logits, sequences)]


def drawn(logits: torch.Tensor = LOGITS, **asked: Any) -> dict[int, float]:
    """How often each token comes out for numbers that cover [0, 1) evenly: the same ones each time."""
    found = tokens(logits.expand(DRAWS, -1), [a_sequence((i + 0.5) / DRAWS, **asked) for i in range(DRAWS)])
    return {token: count / DRAWS for token, count in sorted(Counter(found).items())}


def near(expected: dict[int, float]) -> Any:
    """Four standard deviations of the most uncertain share."""
    return pytest.approx(expected, abs=4 * math.sqrt(0.25 / DRAWS))


def chi_square(found: Iterable[float], expected: Iterable[float]) -> float:
    """In standard deviations from what as many independent draws give."""
    terms = [(one - mean) ** 2 / mean for one, mean in zip(found, expected, strict=True)]
    return (sum(terms) - (len(terms) - 1)) / math.sqrt(2 * (len(terms) - 1))


def test_temperature_zero_is_greedy() -> None:
    assert drawn(temperature=0) == {1: 1.0}


@pytest.mark.parametrize("width", [5, 64, 1000, 4096])
def test_equal_logits_give_the_lower_token(width: int) -> None:
    logits = torch.zeros(1, width, dtype=torch.bfloat16)
    logits[0, [width // 2, width - 1, 3]] = 1.0
    assert tokens(logits, [a_sequence(temperature=0)]) == [min(3, width // 2)]


def test_temperature_one_draws_the_models_own_distribution() -> None:
    assert drawn() == near({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3})


@pytest.mark.parametrize("asked", [{}, {"top_k": 300}, {"top_p": 0.9999999}], ids=str)
def test_every_token_of_many_blocks_comes_as_often_as_its_probability_says(asked: dict[str, Any]) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(5))
    shares = drawn(logits, **asked)
    expected = logits[0].double().softmax(-1).tolist()
    assert abs(chi_square([shares.get(token, 0) * DRAWS for token in range(300)], [p * DRAWS for p in expected])) < 4
    assert max(shares.values()) == pytest.approx(max(expected), rel=0.1)


def test_the_noise_is_even_and_that_of_one_key_or_name_says_nothing_of_the_next() -> None:
    keys = torch.arange(1000)[:, None] + torch.tensor([[0], [2**53 - 1000]]).repeat_interleave(500, 0)
    found = noise(keys, torch.arange(1000))
    assert 0 < float(found.min()) < 1e-5
    assert 1 - 1e-5 < float(found.max()) < 1
    cells = torch.histc(found.float(), 1000, 0, 1).tolist()
    assert abs(chi_square(cells, [1000.0] * 1000)) < 4
    even = found - 0.5
    for one, other in ((even[1:], even[:-1]), (even[:, 1:], even[:, :-1]), (even[1:, 1:], even[:-1, :-1])):
        assert abs(float((one * other).mean()) * 12) < 4 / math.sqrt(one.numel())


def test_a_token_keeps_its_noise_whatever_else_is_a_candidate() -> None:
    rows = range(2000)
    few = tokens(LOGITS.expand(2000, -1), [a_sequence(i / 2000, top_k=2) for i in rows])
    all_ = tokens(LOGITS.expand(2000, -1), [a_sequence(i / 2000, top_k=3) for i in rows])
    assert {(a, b) for a, b in zip(few, all_, strict=True) if a != b} == {(1, 2), (3, 2)}


def test_a_temperature_sharpens_or_flattens_as_its_formula_says() -> None:
    powers = [p**2 for p in PROBABILITIES]
    expected = {token: power / sum(powers) for token, power in enumerate(powers)}
    assert drawn(temperature=0.5) == near(expected)


def test_a_temperature_near_zero_is_greedy_and_not_infinite() -> None:
    assert drawn(temperature=1e-40) == {1: 1.0}


def test_top_k_keeps_the_k_likeliest() -> None:
    assert drawn(top_k=2) == near({1: 4 / 7, 3: 3 / 7})


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    assert drawn(top_p=0.6) == near({1: 4 / 7, 3: 3 / 7})
    assert drawn(top_p=1e-9) == {1: 1.0}


def test_min_p_keeps_what_is_at_least_that_share_of_the_likeliest() -> None:
    assert drawn(min_p=0.6) == near({1: 4 / 7, 3: 3 / 7})
    assert drawn(min_p=0.4) == near({1: 4 / 9, 2: 2 / 9, 3: 3 / 9})


def test_top_p_counts_among_what_min_p_and_top_k_left() -> None:
    assert drawn(min_p=0.4, top_p=0.5) == near({1: 4 / 7, 3: 3 / 7})
    assert drawn(min_p=0.4, top_p=0.44) == {1: 1.0}
    assert drawn(top_k=2, top_p=0.57) == {1: 1.0}


def test_a_logit_bias_is_added_before_all_else() -> None:
    biased = [p * math.exp(b) for p, b in zip(PROBABILITIES, (0, -1.0, 2.0, 0), strict=True)]
    expected = {token: weight / sum(biased) for token, weight in enumerate(biased)}
    assert drawn(logit_bias=((1, -1.0), (2, 2.0))) == near(expected)
    assert drawn(temperature=0, logit_bias=((0, 100.0),)) == {0: 1.0}
    assert 1 not in drawn(logit_bias=((1, -100.0),))


def test_a_bias_for_a_token_outside_the_vocabulary_changes_nothing() -> None:
    assert drawn(temperature=0, logit_bias=((99, 100.0), (-1, 100.0))) == {1: 1.0}


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones_of_prompt_and_answer() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -0.9]])
    assert tokens(logits, [a_sequence(prompt=[0, 0], temperature=0, repetition_penalty=1.5)]) == [1]
    assert tokens(logits, [a_sequence(prompt=[0], answer=[1], temperature=0, repetition_penalty=1.05)]) == [0]
    negative = torch.tensor([[-1.0, -1.1, -3.0, -3.0]])
    assert tokens(negative, [a_sequence(prompt=[0], temperature=0, repetition_penalty=1.2)]) == [1]


def test_frequency_counts_how_often_and_presence_whether_a_token_was_given() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert tokens(logits, [a_sequence(answer=[0, 0], temperature=0, frequency_penalty=0.4)]) == [0]
    assert tokens(logits, [a_sequence(answer=[0, 0, 0], temperature=0, frequency_penalty=0.4)]) == [1]
    assert tokens(logits, [a_sequence(answer=[0, 0, 0], temperature=0, presence_penalty=0.9)]) == [0]
    assert tokens(logits, [a_sequence(answer=[0], temperature=0, presence_penalty=1.1)]) == [1]


def test_frequency_and_presence_do_not_count_the_prompt() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    asked = a_sequence(prompt=[0] * 9, temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
    assert tokens(logits, [asked]) == [0]


def test_a_negative_penalty_favours_what_was_there() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert tokens(logits, [a_sequence(answer=[1, 1], temperature=0, frequency_penalty=-0.6)]) == [1]


def test_before_the_minimum_length_neither_eos_nor_a_stop_id_is_chosen() -> None:
    held = {"min_tokens": 2, "stop_ids": (3,)}
    assert drawn(answer=[0], **held) == near({0: 1 / 3, 2: 2 / 3})
    assert drawn(answer=[0], ignore_eos=True, **held) == near({0: 1 / 7, 1: 4 / 7, 2: 2 / 7})
    assert drawn(answer=[0, 0], **held) == drawn()


def test_a_sequence_that_grows_is_penalised_as_one_that_was_always_that_long() -> None:
    asked = dict.fromkeys(("repetition_penalty", "frequency_penalty", "presence_penalty"), 1.3)
    generator = torch.Generator().manual_seed(1)
    sampler = Sampler(300, frozenset({EOS}), "cpu")
    growing = a_sequence(prompt=[5, 7, 5], temperature=0, min_tokens=3, logit_bias=((7, 1.5), (EOS, 9.0)), **asked)
    for _ in range(40):
        logits = torch.randn(1, 300, generator=generator)
        fresh = Sequence("f", 0, "", list(growing.tokens), 3, growing.sampling, random=Given(0.5))
        [one] = sampled(logits, [growing], sampler)
        assert [one] == sampled(logits, [fresh])
        growing.tokens.append(one.token)


def test_log_probabilities_are_of_the_model_whatever_changes_the_draw() -> None:
    asked = {"temperature": 0, "logit_bias": ((0, 100.0),), "repetition_penalty": 2.0, "logprobs": 2}
    [one] = sampled(LOGITS + 3, [a_sequence(**asked)])
    assert one.token == 0
    assert one.logprob == pytest.approx(math.log(0.1))
    assert [token for token, _ in one.top] == [1, 3]
    assert [value for _, value in one.top] == pytest.approx([math.log(0.4), math.log(0.3)])


def test_each_row_gets_as_many_log_probabilities_as_it_asked_for() -> None:
    rows = [a_sequence(temperature=0, logprobs=count) for count in (None, 0, 3, 9, 1)]
    found = sampled(LOGITS.expand(5, -1), rows)
    assert [len(one.top) for one in found] == [0, 0, 3, 4, 1]
    assert [one.logprob is None for one in found] == [True, False, False, False, False]
    assert found[2].top[0] == (1, found[2].logprob)


def test_a_row_of_nan_or_infinity_is_marked_and_its_neighbours_are_not() -> None:
    half = torch.tensor([[math.nan, *LOGITS[0, 1:]]])
    bad = [torch.full((1, 4), math.nan), torch.full((1, 4), -math.inf), torch.full((1, 4), math.inf), half]
    rows = torch.cat([LOGITS, *bad, LOGITS])
    wishes: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"top_p": 0.5},
        {"top_k": 2},
        {"min_p": 0.1},
        {"temperature": 0, "presence_penalty": 1.0},
        {"logprobs": 2},
        {"logit_bias": ((0, 1.0),)},
    ]
    for asked in wishes:
        found = sampled(rows, [a_sequence(0.3, **asked) for _ in range(6)])
        assert [one.token for one in found[1:5]] == [-1] * 4, asked
        assert found[0].token in range(4), asked
        assert found[0] == found[5] == sampled(LOGITS, [a_sequence(0.3, **asked)])[0], asked


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("asked", [{}, {"top_p": 0.99}, {"top_k": 3}])
def test_the_ends_of_the_interval_give_tokens_that_have_a_probability(uniform: float, asked: dict[str, Any]) -> None:
    logits = torch.full((1, 200), -math.inf)
    logits[0, [70, 71]] = torch.tensor([0.0, 1.0])
    assert tokens(logits, [a_sequence(uniform, **asked)])[0] in (70, 71)


def test_a_greedy_row_takes_no_random_number() -> None:
    greedy, drawing = a_sequence(temperature=0), a_sequence()
    greedy.random, drawing.random = Random(7), Random(7)
    sampled(LOGITS.expand(2, -1), [greedy, drawing])
    expected = Random(7)
    assert greedy.random.getstate() == expected.getstate()
    expected.random()
    assert drawing.random.getstate() == expected.getstate()
