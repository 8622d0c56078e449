"""Attribution: a step's duration is split exactly, and in proportion to what each sequence asked of it."""

from hypothesis import given
from hypothesis import strategies as st

from gpumeter_worker.metering.attribution import Load, Profile, Rule, split, uncalibrated, weights

LOADS = st.lists(st.builds(Load, st.integers(1, 4096), st.integers(0, 100_000)), min_size=1, max_size=64)
KNEE = uncalibrated(Rule.KNEE, "host")
TOKENS = uncalibrated(Rule.TOKENS, "host")


@given(st.integers(0, 10**12), LOADS, st.sampled_from([KNEE, TOKENS, uncalibrated(Rule.KNEE, "cuda")]))
def test_shares_sum_to_the_measured_duration_exactly(duration_ns: int, loads: list[Load], profile: Profile) -> None:
    shares = split(duration_ns, loads, profile)
    assert sum(shares) == duration_ns
    assert min(shares) >= 0


def test_equal_work_costs_the_same() -> None:
    assert split(1_000_000, [Load(1, 50)] * 4, KNEE) == [250_000] * 4


def test_knee_weights_are_the_formula_of_the_design_scaled_to_whole_numbers() -> None:
    profile = Profile("test", Rule.KNEE, t0_ps=100, phi_ps=1000, lam_ps=300, kap_ps=7, alp_ps=2)
    loads = [Load(1, 9), Load(5, 0)]
    scale = 2 * 6  # B x N
    shared = (100 + 1000) * scale // 2
    linear = 300 * 6 - 1000
    expected = [
        shared + linear * scale * 1 // 6 + max(7 * 10, 2 * (9 + 1)) * scale,
        shared + linear * scale * 5 // 6 + max(7 * 5, 2 * 15) * scale,
    ]
    assert weights(loads, profile) == expected


def test_below_the_knee_linear_layers_are_shared_evenly() -> None:
    profile = Profile("test", Rule.KNEE, t0_ps=0, phi_ps=10**9, lam_ps=1, kap_ps=0, alp_ps=0)
    assert split(1000, [Load(1, 0), Load(9, 0)], profile) == [500, 500]


def test_far_above_the_knee_linear_layers_follow_the_tokens() -> None:
    profile = Profile("test", Rule.KNEE, t0_ps=0, phi_ps=0, lam_ps=10**6, kap_ps=0, alp_ps=0)
    assert split(1000, [Load(100, 0), Load(900, 0)], profile) == [100, 900]


def test_a_longer_context_costs_more_under_knee_and_the_same_under_tokens() -> None:
    loads = [Load(1, 10), Load(1, 4000)]
    near, far = split(10**7, loads, KNEE)
    assert near < far
    assert split(10**7, loads, TOKENS) == [5 * 10**6, 5 * 10**6]


def test_profiles_with_other_parameters_have_other_hashes() -> None:
    profiles = [uncalibrated(rule, clock) for rule in Rule for clock in ("host", "cuda")]
    assert len({profile.hash for profile in profiles}) == len(profiles)
    assert KNEE.hash == uncalibrated(Rule.KNEE, "host").hash
