"""What a worker says it can do follows from the costs that it measured, and says why a larger batch is of no use."""

from decimal import Decimal
from typing import Any

import pytest

from gpumeter_worker.metering.attribution import Costs, Load, cost_ps
from gpumeter_worker.metering.capacity import capacity

MS = 10**9
WEIGHTS = Costs(t0_ps=MS, phi_ps=9 * MS, lam_ps=MS // 10, kap_ps=100, alp_ps=10)


def figures(costs: Costs = WEIGHTS, *, batch: int = 64, sequence: int = 4096, cache: int = 10**6) -> Any:
    return capacity(costs, batch_most=batch, sequence_most=sequence, cache_tokens=cache)


def test_the_figures_are_those_of_the_steps_that_the_costs_predict() -> None:
    alone = figures()["batches"][0]
    step_ps = cost_ps([Load(1, 512)], WEIGHTS)
    assert alone["batchSize"] == 1
    assert abs(Decimal(alone["tokensPerSecond"]) - Decimal(10**12) / step_ps) <= Decimal("0.05")
    assert abs(Decimal(alone["gpuSecondsPerThousandTokens"]) - Decimal(step_ps) / 10**9) <= Decimal("0.0000005")


def test_a_step_on_several_devices_gives_as_many_tokens_and_takes_the_time_of_each() -> None:
    one = figures()["batches"][0]
    four = capacity(WEIGHTS, batch_most=64, sequence_most=4096, cache_tokens=10**6, devices=4)
    assert four is not None
    assert four["batches"][0]["tokensPerSecond"] == one["tokensPerSecond"]
    quarter = Decimal(four["batches"][0]["gpuSecondsPerThousandTokens"]) / 4
    assert abs(quarter - Decimal(one["gpuSecondsPerThousandTokens"])) <= Decimal("0.000001")


def test_batches_go_by_doubling_to_the_largest_that_fits() -> None:
    assert [one["batchSize"] for one in figures(batch=24)["batches"]] == [1, 2, 4, 8, 16, 24]
    assert [one["batchSize"] for one in figures(cache=513 * 5)["batches"]] == [1, 2, 4, 5]
    assert len(figures(batch=4096, cache=10**9)["batches"]) <= 32, "as many as the status holds"


def test_a_batch_shares_the_reading_of_the_weights() -> None:
    found = figures()["batches"]
    rates = [Decimal(one["tokensPerSecond"]) for one in found]
    prices = [Decimal(one["gpuSecondsPerThousandTokens"]) for one in found]
    assert rates == sorted(rates)
    assert prices == sorted(prices, reverse=True)


@pytest.mark.parametrize(
    ("costs", "limits", "bound"),
    [
        (WEIGHTS, {}, "MaxBatchSize"),
        (WEIGHTS, {"cache": 513 * 5}, "Memory"),
        (WEIGHTS._replace(lam_ps=MS), {}, "Compute"),
        (WEIGHTS._replace(kap_ps=MS // 100), {}, "MemoryBandwidth"),
        (WEIGHTS._replace(alp_ps=MS // 100), {}, "Compute"),
    ],
)
def test_what_a_larger_batch_is_bound_by_is_said(costs: Costs, limits: dict[str, int], bound: str) -> None:
    assert figures(costs, **limits)["boundBy"] == bound


def test_a_model_of_short_sequences_is_reckoned_with_what_it_can_hold() -> None:
    assert figures(sequence=64)["contextTokens"] == 32
    assert figures(sequence=1)["contextTokens"] == 1


@pytest.mark.parametrize("nothing", [{"cache": 100}, {"costs": Costs(0, 0, 0, 0, 0)}])
def test_where_nothing_fits_or_nothing_was_measured_nothing_is_said(nothing: Any) -> None:
    assert figures(**nothing) is None
