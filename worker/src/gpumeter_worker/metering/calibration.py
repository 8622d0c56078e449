"""Fits the knee rule's parameters to steps that were timed, and judges whether the fit may be used.

Owns the search for the two knees, the least squares between them, and the bounds of a good fit. Pure: no clock, no
torch, the same steps give the same integers. Does not know how a step was run, nor where a profile is kept.

The cost of a step is piecewise linear (metering.attribution.cost_ps): which side of the linear layers' knee a step is
on depends on its new tokens alone, and which side of attention's knee a sequence is on on its pairs a token. So every
pair of knees that the measured steps can tell apart is tried; between them the parameters are a least-squares problem
that allows nothing negative. Errors are relative, because a step of 2 ms is as much a step as one of 2 s, and weigh
less the larger they are (iteratively reweighted towards least absolute errors), because a machine that was busy for a
moment, or a kernel that goes another way for some shapes, must not bend the rest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import NamedTuple

from gpumeter_worker.metering.attribution import Costs, Load, cost_ps

VERSION = 1
"""Of this fit and of the planned steps (engine.calibrating): a profile of another version is measured again."""

STEPS_MIN = 12
MEDIAN_ERROR_PPM_MAX = 150_000
TAIL_ERROR_PPM_MAX = 800_000
"""A fit is used when it predicts half of the measured steps within 15 % and 95 % of them within 80 %. The rule bears
much: with every parameter wrong by 30 % it still splits far better than the plain alternatives (`make
bench-attribution`). The second bound leaves room for single steps that a busy machine made several times longer."""

_CUTS_MAX = 12
_KNEES_KEPT = 6
_REWEIGHTS = 10
_FLAT_ERROR = 0.005
"""Errors below half a percent weigh alike: that near, one step is as good as another."""

_PARAMETER_PS_MAX = 10**16
"""Nothing that is measured in a start-up has a part that takes longer than ten thousand seconds."""


@dataclass(frozen=True, slots=True)
class Subject:
    """All that a calibration depends on. When any part of it is another, steps are timed again."""

    model: str  # a digest of the files' own description of the model
    dtype: str
    device: str
    torch: str
    transformers: str
    engine: str
    options: str
    calibration: int = VERSION


class Observation(NamedTuple):
    """A step that was run on purpose, and how long the shortest of its runs took."""

    loads: tuple[Load, ...]
    gpu_ns: int


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a fit predicts the steps it was made from, in parts per million of each step's measured duration.

    `explained_ppm` is R squared of the durations: the share of their variance that the fit explains.
    """

    steps: int
    median_error_ppm: int
    tail_error_ppm: int  # the 95th percentile
    explained_ppm: int


@dataclass(frozen=True, slots=True)
class Fit:
    """Parameters in integer picoseconds, and how good they are."""

    costs: Costs
    quality: Quality


@dataclass(frozen=True, slots=True)
class Calibration:
    """What an engine says about the costs of its steps. `problem`: why `fit` may not be used, empty where it may."""

    subject: Subject
    fit: Fit | None
    problem: str = ""
    stored: bool = False
    """Nothing was timed: a former start had fitted the same subject."""
    took_ns: int = 0
    """What of the warm-up it took."""


def fit(observations: Sequence[Observation]) -> Fit | None:
    """The best fit, good or not; None where nothing can be fitted because there are no steps of any length."""
    timed = sorted(one for one in observations if one.loads and one.gpu_ns > 0)  # the order of sums is part of them
    if not timed:
        return None
    rows = [_Row.of(one) for one in timed]
    linear = _cuts([row.new_tokens for row in rows])
    attention = _cuts([ratio for row in rows for ratio, _, _ in row.sequences])
    tried: dict[tuple[float, float], tuple[float, Costs]] = {}

    def best(knees: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        for pair in knees:
            if pair not in tried:
                costs = _least_squares([row.columns(*pair) for row in rows], rows, [1.0] * len(rows))
                tried[pair] = (_mean_error(costs, timed), costs)
        return sorted(tried, key=lambda pair: (tried[pair], pair))[:_KNEES_KEPT]

    first = best(product(_some(linear), _some(attention)))[0]
    second = best([(knee, first[1]) for knee in linear])[0]
    kept = best([(second[0], knee) for knee in attention])
    costs = min(_reweighted([row.columns(*pair) for row in rows], rows, timed, *tried[pair]) for pair in kept)[1]
    return Fit(costs, quality(costs, timed))


def quality(costs: Costs, observations: Sequence[Observation]) -> Quality:
    """How well given parameters predict given steps, which need not be those that they were fitted to."""
    errors = sorted(_relative_errors(costs, observations))
    mean_ns = sum(one.gpu_ns for one in observations) / len(observations)
    spread = sum((one.gpu_ns - mean_ns) ** 2 for one in observations)
    missed = sum((one.gpu_ns - cost_ps(one.loads, costs) / 1000) ** 2 for one in observations)
    return Quality(
        steps=len(observations),
        median_error_ppm=round(1e6 * errors[len(errors) // 2]),
        tail_error_ppm=round(1e6 * errors[min(len(errors) - 1, len(errors) * 95 // 100)]),
        explained_ppm=round(1e6 * max(0.0, 1 - missed / spread)) if spread else 0,
    )


def problem(found: Fit | None) -> str:
    """Why a fit may not be used, as the end of a sentence; empty where it may."""
    if found is None or found.quality.steps < STEPS_MIN:
        steps = found.quality.steps if found else 0
        return f"only {steps} steps could be timed in the time allowed (at least {STEPS_MIN} are needed)"
    costs, good = found.costs, found.quality
    if min(costs) < 0 or max(costs) > _PARAMETER_PS_MAX or costs.t0_ps + costs.phi_ps + costs.lam_ps == 0:
        return f"the fitted parameters make no sense ({', '.join(f'{k} {v}' for k, v in costs._asdict().items())})"
    if good.median_error_ppm > MEDIAN_ERROR_PPM_MAX or good.tail_error_ppm > TAIL_ERROR_PPM_MAX:
        return (
            f"half of {good.steps} timed steps are predicted within {good.median_error_ppm / 1e4:.1f} % and 95 % of "
            f"them within {good.tail_error_ppm / 1e4:.1f} % (at most {MEDIAN_ERROR_PPM_MAX / 1e4:.0f} % and "
            f"{TAIL_ERROR_PPM_MAX / 1e4:.0f} %)"
        )
    return ""


class _Row(NamedTuple):
    """A step as the fit sees it. Each sequence: pairs a token, tokens that are read, pairs."""

    gpu_ns: int
    new_tokens: int
    sequences: tuple[tuple[float, int, int], ...]

    @staticmethod
    def of(one: Observation) -> "_Row":
        sequences = []
        for new, context in one.loads:
            pairs = new * context + new * (new + 1) // 2
            sequences.append((pairs / (context + new), context + new, pairs))
        return _Row(one.gpu_ns, sum(load.new_tokens for load in one.loads), tuple(sequences))

    def columns(self, linear_knee: float, attention_knee: float) -> list[float]:
        """What t0, phi, lam, kap and alp are multiplied by in this step, when the knees are where they are said."""
        above = self.new_tokens > linear_knee
        return [
            1.0,
            0.0 if above else 1.0,
            float(self.new_tokens) if above else 0.0,
            float(sum(read for ratio, read, _ in self.sequences if ratio <= attention_knee)),
            float(sum(pairs for ratio, _, pairs in self.sequences if ratio > attention_knee)),
        ]


def _cuts(values: Sequence[float]) -> list[float]:
    """Every place of a knee that these values can tell apart: below all of them, between two, above all."""
    distinct = sorted(set(values))
    return [0.0, *((a + b) / 2 for a, b in pairwise(distinct)), distinct[-1] + 1.0]


def _some(cuts: list[float]) -> list[float]:
    """A few of many cuts, the first and the last among them."""
    if len(cuts) <= _CUTS_MAX:
        return cuts
    return [cuts[round(index * (len(cuts) - 1) / (_CUTS_MAX - 1))] for index in range(_CUTS_MAX)]


def _reweighted(
    columns: list[list[float]], rows: list[_Row], timed: list[Observation], error: float, costs: Costs
) -> tuple[float, Costs]:
    best = (error, costs)
    for _ in range(_REWEIGHTS):
        weights = [1 / max(_FLAT_ERROR, missed) for missed in _relative_errors(costs, timed)]
        costs = _least_squares(columns, rows, weights)
        best = min(best, (_mean_error(costs, timed), costs))
    return best


def _least_squares(columns: list[list[float]], rows: list[_Row], weights: list[float]) -> Costs:
    """The least squares of relative errors without negative parameters."""
    size = len(columns[0])
    scales = [max(column[at] / row.gpu_ns for column, row in zip(columns, rows, strict=True)) for at in range(size)]
    scaled = [
        [value / row.gpu_ns / scale if scale else 0.0 for value, scale in zip(column, scales, strict=True)]
        for column, row in zip(columns, rows, strict=True)
    ]
    products = [
        [sum(w * one[a] * one[b] for w, one in zip(weights, scaled, strict=True)) for b in range(size)]
        for a in range(size)
    ]
    wanted = [sum(w * one[a] for w, one in zip(weights, scaled, strict=True)) for a in range(size)]
    solution = _without_negatives(products, wanted)
    return Costs(*(round(1000 * value / scale) if scale else 0 for value, scale in zip(solution, scales, strict=True)))


def _without_negatives(products: list[list[float]], wanted: list[float]) -> list[float]:
    """The x >= 0 that minimises x'Px/2 - w'x.

    It solves the equations of those of its parts that are not zero, so with five of them every choice can be tried.
    """
    some = [a for a in range(len(wanted)) if products[a][a] > 0]
    best, least = [0.0] * len(wanted), 0.0
    for count in range(len(some), 0, -1):
        for free in combinations(some, count):
            solution = _solve([[products[a][b] for b in free] for a in free], [wanted[a] for a in free])
            if solution is None or min(solution) < 0:
                continue
            # Where the equations hold, the objective is half of -w'x.
            objective = -sum(wanted[a] * value for a, value in zip(free, solution, strict=True))
            if objective < least:
                placed = dict(zip(free, solution, strict=True))
                best, least = [placed.get(a, 0.0) for a in range(len(wanted))], objective
        if count == len(some) and least < 0:
            break  # nothing had to be held at zero
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gauss with pivots; None where the matrix is singular."""
    size = len(right)
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for at in range(size):
        pivot = max(range(at, size), key=lambda index: abs(rows[index][at]))
        if abs(rows[pivot][at]) < 1e-14 * max(abs(value) for value in matrix[at]):
            return None
        rows[at], rows[pivot] = rows[pivot], rows[at]
        for below in range(at + 1, size):
            factor = rows[below][at] / rows[at][at]
            rows[below] = [a - factor * b for a, b in zip(rows[below], rows[at], strict=True)]
    solution = [0.0] * size
    for at in reversed(range(size)):
        known = sum(rows[at][other] * solution[other] for other in range(at + 1, size))
        solution[at] = (rows[at][size] - known) / rows[at][at]
    return solution


def _relative_errors(costs: Costs, observations: Sequence[Observation]) -> list[float]:
    return [abs(cost_ps(one.loads, costs) / 1000 / one.gpu_ns - 1) for one in observations]


def _mean_error(costs: Costs, observations: Sequence[Observation]) -> float:
    return sum(_relative_errors(costs, observations)) / len(observations)
