from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from gpumeter_usage.apportion import largest_remainder

weights = st.lists(st.integers(0, 2**80), min_size=1, max_size=300)


@given(st.integers(0, 2**63), weights)
def test_the_parts_sum_to_the_total(total: int, given_weights: list[int]):
    assert sum(largest_remainder(total, given_weights)) == total


@given(st.integers(0, 2**63), weights.filter(any))
def test_no_part_is_a_whole_unit_away_from_its_exact_share(total: int, given_weights: list[int]):
    for part, weight in zip(largest_remainder(total, given_weights), given_weights, strict=True):
        assert abs(part - Fraction(total * weight, sum(given_weights))) < 1
