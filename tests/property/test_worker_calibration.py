"""The fit finds the parameters that made the steps, whatever they are, and says so when it does not."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from gpumeter_worker.engine.calibrating import Room, planned
from gpumeter_worker.metering.attribution import Costs, Load, cost_ps
from gpumeter_worker.metering.calibration import Fit, Observation, fit, problem, quality
from rigs.thoroughness import examples

ROOM = Room(16, 1024, 4096, 16_384)
PLAN = planned(ROOM)
COSTS = st.builds(
    Costs,
    st.integers(10**8, 10**10),
    st.integers(10**8, 2 * 10**10),
    st.integers(10**7, 10**9),
    st.integers(10**4, 10**7),
    st.integers(10**3, 10**6),
)


def steps(costs: Costs, error: float = 0.0, seed: int = 0) -> list[Observation]:
    rng = Random(seed)
    return [
        Observation(loads, round(cost_ps(loads, costs) / 1000 * (1 + rng.uniform(-error, error)))) for loads in PLAN
    ]


def fitted(observations: list[Observation]) -> Fit:
    found = fit(observations)
    assert found is not None
    return found


@settings(max_examples=examples(7), deadline=None)
@given(COSTS)
def test_steps_without_an_error_are_predicted_without_one(costs: Costs) -> None:
    found = fitted(steps(costs))
    assert found.quality.tail_error_ppm < 1000
    assert problem(found) == ""


@settings(max_examples=examples(7), deadline=None)
@given(COSTS, st.integers(0, 1000))
def test_errors_of_measurement_are_averaged_out_and_every_number_is_a_whole_one(costs: Costs, seed: int) -> None:
    found = fitted(steps(costs, 0.05, seed))
    truth = quality(found.costs, steps(costs))
    assert truth.median_error_ppm < 40_000
    assert truth.tail_error_ppm < 150_000
    assert all(type(one) is int and one >= 0 for one in found.costs)
    assert problem(found) == ""


@settings(max_examples=examples(6), deadline=None)
@given(COSTS, st.integers(0, 1000))
def test_a_tenth_of_steps_that_took_several_times_as_long_bends_nothing(costs: Costs, seed: int) -> None:
    rng = Random(seed)
    disturbed = [
        one._replace(gpu_ns=round(one.gpu_ns * rng.uniform(1.5, 4))) if rng.random() < 0.1 else one
        for one in steps(costs, 0.03, seed)
    ]
    truth = quality(fitted(disturbed).costs, steps(costs))
    assert truth.median_error_ppm < 40_000


@settings(max_examples=examples(3), deadline=None)
@given(COSTS, st.randoms(use_true_random=False))
def test_the_same_steps_give_the_same_parameters_in_whatever_order_they_were_timed(costs: Costs, rng: Random) -> None:
    observations = steps(costs, 0.05)
    again = fitted(observations)
    assert again == fitted(observations)
    rng.shuffle(observations)
    assert fitted(observations) == again


@settings(max_examples=examples(30), deadline=None)
@given(
    st.lists(
        st.builds(
            Observation,
            st.lists(st.builds(Load, st.integers(1, 4096), st.integers(0, 10**5)), max_size=8).map(tuple),
            st.integers(0, 10**13),
        ),
        max_size=20,
    )
)
def test_whatever_was_timed_the_fit_ends_and_is_judged(observations: list[Observation]) -> None:
    found = fit(observations)
    if found is not None:
        assert min(found.costs) >= 0
        assert problem(found) or found.quality.median_error_ppm <= 150_000
