from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from gpumeter_usage.apportion import largest_remainder
from gpumeter_worker.metering.attribution import Load, Profile, Rule
from gpumeter_worker.metering.attribution import weights as knee_weights

weights = st.lists(st.integers(0, 2**80), min_size=1, max_size=300)


@given(st.integers(0, 2**63), weights)
def test_the_parts_sum_to_the_total(total: int, given_weights: list[int]):
    assert sum(largest_remainder(total, given_weights)) == total


@given(st.integers(0, 2**63), weights.filter(any))
def test_no_part_is_a_whole_unit_away_from_its_exact_share(total: int, given_weights: list[int]):
    for part, weight in zip(largest_remainder(total, given_weights), given_weights, strict=True):
        assert abs(part - Fraction(total * weight, sum(given_weights))) < 1


@given(st.integers(0, 2**63), weights.filter(any))
def test_what_is_left_goes_to_the_largest_remainders_and_among_equals_to_the_first(
    total: int, given_weights: list[int]
):
    exact = [Fraction(total * weight, sum(given_weights)) for weight in given_weights]
    floors = [share.numerator // share.denominator for share in exact]
    line = sorted(range(len(exact)), key=lambda place: (floors[place] - exact[place], place))
    for place in line[: total - sum(floors)]:
        floors[place] += 1
    assert largest_remainder(total, given_weights) == floors


PROFILES = st.builds(Profile, st.just("any"), st.just(Rule.KNEE), *[st.integers(0, 10**11)] * 5)
LOADS = st.lists(st.builds(Load, st.integers(1, 4096), st.integers(0, 100_000)), min_size=1, max_size=64)


@given(LOADS, PROFILES)
def test_the_weights_of_a_step_are_the_designs_formula_for_every_mix_of_prompts_and_decodes(
    loads: list[Load], profile: Profile
):
    sequences, new_tokens = len(loads), sum(load.new_tokens for load in loads)
    linear = max(profile.lam_ps * new_tokens, profile.phi_ps)
    for (n, c), weight in zip(loads, knee_weights(loads, profile), strict=True):
        attention = max(profile.kap_ps * (c + n), profile.alp_ps * (n * c + n * (n + 1) // 2))
        shared = Fraction(profile.t0_ps + profile.phi_ps, sequences)
        own = (linear - profile.phi_ps) * Fraction(n, new_tokens)
        assert weight == (shared + own + attention) * sequences * new_tokens
