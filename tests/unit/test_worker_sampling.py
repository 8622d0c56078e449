"""Sampling: the distribution that was asked for, from one uniform number a row."""

import math

import pytest
import torch

from gpumeter_worker.engine.sampling import choose
from gpumeter_worker.engine.sequence import Sampling

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


def drawn(sampling: Sampling, draws: int = 1000) -> dict[int, float]:
    """How often each token comes out when the uniform numbers cover [0, 1) evenly."""
    tokens = choose(LOGITS.expand(draws, -1), [sampling] * draws, [(i + 0.5) / draws for i in range(draws)]).tolist()
    return {token: tokens.count(token) / draws for token in sorted(set(tokens))}


def test_temperature_zero_is_greedy() -> None:
    assert drawn(Sampling(1, temperature=0)) == {1: 1.0}


def test_temperature_one_draws_the_models_own_distribution() -> None:
    assert drawn(Sampling(1)) == pytest.approx({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, abs=0.002)


def test_a_temperature_sharpens_or_flattens_as_its_formula_says() -> None:
    powers = [p**2 for p in (0.1, 0.4, 0.2, 0.3)]
    expected = {token: power / sum(powers) for token, power in enumerate(powers)}
    assert drawn(Sampling(1, temperature=0.5)) == pytest.approx(expected, abs=0.002)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert drawn(Sampling(1, top_k=2)) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=0.002)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    assert drawn(Sampling(1, top_p=0.6)) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=0.002)
    assert drawn(Sampling(1, top_p=1e-9)) == {1: 1.0}


def test_rows_do_not_influence_each_other() -> None:
    samplings = [Sampling(1, temperature=0), Sampling(1, top_k=1), Sampling(1), Sampling(1, top_p=0.6)]
    rows = LOGITS.expand(4, -1)
    together = choose(rows, samplings, [0.99, 0.99, 0.05, 0.9]).tolist()
    alone = [choose(LOGITS, [s], [u]).item() for s, u in zip(samplings, [0.99, 0.99, 0.05, 0.9], strict=True)]
    assert together == alone == [1, 1, 0, 3]


def test_a_row_of_nan_or_infinity_is_marked_and_its_neighbours_are_not() -> None:
    rows = torch.cat([LOGITS, torch.full((1, 4), math.nan), torch.full((1, 4), -math.inf), LOGITS])
    for sampling in (Sampling(1, temperature=0), Sampling(1), Sampling(1, top_p=0.5)):
        tokens = choose(rows, [sampling] * 4, [0.3] * 4).tolist()
        assert tokens[1:3] == [-1, -1]
        assert tokens[0] == tokens[3] == 1


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_give_tokens_that_have_a_probability(uniform: float) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    assert choose(logits, [Sampling(1)], [uniform]).item() in (1, 2)
