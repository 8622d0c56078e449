"""Attribution against the exact Shapley value on simulated devices, whose cost of every coalition is known.

Owns the devices and the mixes of batches. The devices go from the knee rule's own form to what real ones do beyond it:
a knee that is round, work in whole tiles, a cost of every token that is drawn. Calibrated here means: fitted by the
worker's own code to the worker's own planned steps, each with an error of measurement.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from gpumeter_worker.engine.calibrating import Room, planned
from gpumeter_worker.metering.attribution import Costs, Load, Profile, Rule, split, uncalibrated
from gpumeter_worker.metering.calibration import Observation, fit
from rigs.shapley import misplaced, shapley

MEASURED_WITHIN = 0.03
"""Planned steps are timed with an error of up to this share."""

_SCALE_NS = 10**12
"""Shares are made of a step of so many nanoseconds, so that rounding is nothing."""


@dataclass(frozen=True)
class Device:
    """What a step costs, in nanoseconds, and what may share one. `flops`: of a token's linear layers, and of a pair."""

    name: str
    costs: Costs
    cost_ns: Callable[[Sequence[Load]], float]
    room: Room
    flops: tuple[float, float]
    clock: str


@dataclass(frozen=True)
class Row:
    """One line of the table: shares of a step that were misplaced, mean and 95th percentile over the batches."""

    device: str
    mix: str
    batches: int
    mean: dict[str, float]
    tail: dict[str, float]


def simulate(batches: int = 40, largest: int = 8, seed: int = 7) -> list[Row]:
    """Every device with every mix of batches of 2 to `largest` sequences."""
    rows = []
    for device in devices():
        rng = Random(seed)
        fitted = calibrated(device, rng)
        profiles = {
            "knee, true": Profile("true", Rule.KNEE, *device.costs),
            "knee, fitted": fitted,
            "knee, stand-in": uncalibrated(Rule.KNEE, device.clock),
            "tokens": uncalibrated(Rule.TOKENS, device.clock),
        }
        for mix in ("decode", "mixed", "prompts"):
            errors: dict[str, list[float]] = {}
            for number in range(batches):
                loads = draw(rng, mix, 2 + number % (largest - 1), device.room)
                value = exact(device, loads)
                profiles["knee, 30 % off"] = wrong(device, rng)
                for name, shares in all_shares(loads, profiles, device.flops).items():
                    total = sum(value)
                    errors.setdefault(name, []).append(misplaced([share * total for share in shares], value))
            rows.append(
                Row(
                    device.name,
                    mix,
                    batches,
                    {name: statistics.mean(found) for name, found in errors.items()},
                    {name: sorted(found)[len(found) * 95 // 100] for name, found in errors.items()},
                )
            )
    return rows


def exact(device: Device, loads: Sequence[Load]) -> list[float]:
    """The Shapley value of a batch, in nanoseconds."""
    return shapley(len(loads), lambda who: device.cost_ns([loads[one] for one in who]))


def wrong(device: Device, rng: Random) -> Profile:
    """The device's parameters, each of them 30 % too large or too small."""
    return Profile("wrong", Rule.KNEE, *(round(one * rng.choice((0.7, 1.3))) for one in device.costs))


def calibrated(device: Device, rng: Random) -> Profile:
    """What a worker on this device would fit."""
    observations = [
        Observation(loads, round(device.cost_ns(loads) * (1 + rng.uniform(-MEASURED_WITHIN, MEASURED_WITHIN))))
        for loads in planned(device.room)
    ]
    found = fit(observations)
    if found is None:
        raise ValueError(f"nothing can be fitted on {device.name}")
    return Profile("fitted", Rule.KNEE, *found.costs)


def all_shares(
    loads: Sequence[Load], profiles: dict[str, Profile], flops: tuple[float, float]
) -> dict[str, list[float]]:
    """Shares of 1 by every profile, by the worker's own code, and by floating-point operations."""
    found = {
        name: [share / _SCALE_NS for share in split(_SCALE_NS, loads, profile)] for name, profile in profiles.items()
    }
    token, pair = flops
    work = [token * new + pair * (new * context + new * (new + 1) / 2) for new, context in loads]
    return {**found, "FLOPs": [one / sum(work) for one in work]}


def draw(rng: Random, mix: str, sequences: int, room: Room) -> list[Load]:
    """A batch: decodes of very different lengths, a chunk of a prompt beside them, or prompts alone."""
    longest = room.sequence_tokens - 1

    def decode() -> Load:
        return Load(1, round(math.exp(rng.uniform(math.log(64), math.log(min(32_000, longest))))))

    if mix == "decode":
        return [decode() for _ in range(sequences)]
    if mix == "mixed":
        chunk = min(512, longest // 2)
        context = rng.choice([one for one in (0, 512, 2048, 8192) if one + chunk <= longest])
        return [Load(chunk, context), *(decode() for _ in range(sequences - 1))]
    return [Load(rng.choice((32, 128, 512)), 0) for _ in range(sequences)]


def devices() -> list[Device]:
    """An 8-billion-parameter model on a large GPU, with graphs and without, and a small model on a CPU."""
    on_gpu = Room(256, 8192, 32_768, 400_000)
    on_cpu = Room(16, 2048, 4096, 16_384)
    large = (16e9, 4 * 32 * 4096.0)  # 2 x parameters, 4 x layers x width
    small = (2 * 106e6, 4 * 30 * 576.0)
    graphs = Costs(3 * 10**8, 4444 * 10**6, 27 * 10**6, 36_400, 883)
    eager = graphs._replace(t0_ps=15 * 10**9)
    cpu = Costs(6 * 10**9, 12 * 10**9, 16 * 10**8, 8 * 10**6, 2 * 10**5)
    return [
        Device("GPU, graphs", graphs, lambda loads: _sharp(loads, graphs), on_gpu, large, "cuda"),
        Device("GPU, eager", eager, lambda loads: _sharp(loads, eager), on_gpu, large, "cuda"),
        Device("GPU, round knee", graphs, lambda loads: _round(loads, graphs), on_gpu, large, "cuda"),
        Device("GPU, tiles", graphs, lambda loads: _tiled(loads, graphs), on_gpu, large, "cuda"),
        Device("CPU", cpu, lambda loads: _drawing(loads, cpu), on_cpu, small, "host"),
    ]


def _sharp(loads: Sequence[Load], costs: Costs) -> float:
    """A roofline: each part is bound by memory or by arithmetic."""
    linear = max(costs.lam_ps * sum(load.new_tokens for load in loads), costs.phi_ps)
    return (costs.t0_ps + linear + sum(_attention_ps(load, costs) for load in loads)) / 1000


def _round(loads: Sequence[Load], costs: Costs) -> float:
    """Near the knee memory and arithmetic hinder each other: a sum of fourth powers in the place of the larger."""
    tokens = sum(load.new_tokens for load in loads)
    linear = ((costs.lam_ps * tokens) ** 4 + costs.phi_ps**4) ** 0.25
    return (costs.t0_ps + linear + sum(_attention_ps(load, costs) for load in loads)) / 1000


def _tiled(loads: Sequence[Load], costs: Costs) -> float:
    """Matrices are multiplied in tiles of 64 rows; a tile that is begun costs as much as a full one."""
    tokens = -(-sum(load.new_tokens for load in loads) // 64) * 64
    linear = max(costs.lam_ps * tokens, costs.phi_ps)
    return (costs.t0_ps + linear + sum(_attention_ps(load, costs) for load in loads)) / 1000


def _drawing(loads: Sequence[Load], costs: Costs) -> float:
    """As `_round`, and every sequence pays for the whole vocabulary's logits, which no parameter stands for."""
    return _round(loads, costs) + len(loads) * 0.4 * costs.lam_ps / 1000


def _attention_ps(load: Load, costs: Costs) -> float:
    new, context = load
    return max(costs.kap_ps * (context + new), costs.alp_ps * (new * context + new * (new + 1) / 2))
