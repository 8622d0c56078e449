"""The oracle of attribution is itself right: what theory says of the Shapley value holds for it."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rigs.shapley import members, misplaced, shapley

COSTS = st.integers(1, 5).flatmap(
    lambda players: st.tuples(
        st.just(players), st.lists(st.integers(0, 1000), min_size=2**players, max_size=2**players)
    )
)


def test_three_travellers_share_a_taxi_as_computed_by_hand() -> None:
    """Homes at 6, 12 and 42 on one road: the first leg is shared by three, the second by two, the third by nobody."""
    distances = (6, 12, 42)
    value = shapley(3, lambda who: max(distances[one] for one in who))
    assert value == pytest.approx([6 / 3, 6 / 3 + 6 / 2, 6 / 3 + 6 / 2 + 30])


@given(COSTS)
def test_all_of_the_cost_is_shared_and_equals_owe_the_same(game: tuple[int, list[int]]) -> None:
    players, costs = game
    value = shapley(players, lambda who: costs[sum(1 << one for one in who)])
    assert sum(value) == pytest.approx(costs[2**players - 1], abs=1e-6)
    swapped = {0: players - 1, players - 1: 0}
    mirrored = shapley(players, lambda who: costs[sum(1 << swapped.get(one, one) for one in who)])
    assert [mirrored[swapped.get(one, one)] for one in range(players)] == pytest.approx(value, abs=1e-6)


@given(COSTS)
def test_it_is_the_mean_over_all_orders_of_arrival(game: tuple[int, list[int]]) -> None:
    players, costs = game
    costs[0] = 0
    orders = list(permutations(range(players)))
    means = [0.0] * players
    for order in orders:
        there = 0
        for one in order:
            means[one] += (costs[there | 1 << one] - costs[there]) / len(orders)
            there |= 1 << one
    assert shapley(players, lambda who: costs[sum(1 << one for one in who)]) == pytest.approx(means, abs=1e-6)


def test_whoever_adds_nothing_owes_nothing() -> None:
    value = shapley(4, lambda who: sum(one + 2 for one in who if one != 2) ** 2)
    assert value[2] == pytest.approx(0)


def test_coalitions_are_read_from_bits_and_too_many_players_are_refused() -> None:
    assert members(0b1011) == (0, 1, 3)
    for players in (0, 17):
        with pytest.raises(ValueError, match="1 to 16 players"):
            shapley(players, lambda who: 1.0)


def test_what_is_misplaced_is_counted_once() -> None:
    assert misplaced([30, 70], [50, 50]) == pytest.approx(0.2)
    assert misplaced([50, 50], [50, 50]) == 0
