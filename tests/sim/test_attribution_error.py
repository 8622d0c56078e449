"""What calibrated attribution puts at the wrong sequence, against the exact Shapley value of simulated devices."""

import statistics
from random import Random

import pytest

from bench.attribution_sim import all_shares, calibrated, devices, draw, exact
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from rigs.shapley import misplaced

TRIED = {device.name: device for device in devices() if device.name in ("GPU, tiles", "CPU")}


@pytest.mark.parametrize("name", TRIED)
def test_fitted_to_planned_steps_the_knee_rule_misplaces_at_most_a_twentieth_and_less_than_tokens(name: str) -> None:
    device, rng = TRIED[name], Random(5)
    profiles = {"knee": calibrated(device, rng), "tokens": uncalibrated(Rule.TOKENS, device.clock)}
    for mix in ("decode", "mixed", "prompts"):
        errors: dict[str, list[float]] = {"knee": [], "tokens": [], "FLOPs": []}
        for number in range(8):
            loads = draw(rng, mix, 2 + number % 4, device.room)
            value = exact(device, loads)
            for rule, shares in all_shares(loads, profiles, device.flops).items():
                errors[rule].append(misplaced([share * sum(value) for share in shares], value))
        means = {rule: statistics.mean(found) for rule, found in errors.items()}
        assert means["knee"] <= 0.05, mix
        if mix == "mixed":
            assert means["knee"] * 2 < min(means["tokens"], means["FLOPs"])
