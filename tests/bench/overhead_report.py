"""What the overhead's bench makes of its times: the difference with its confidence interval, and the tables.

Pure. Knows nothing of how the times came about.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.overhead_parts import Cost

_NORMAL_95 = 1.96
_TRIM = 0.1


@dataclass(frozen=True)
class Quad:
    """As many steps with metering as without it, next to each other in time; how long each half took."""

    steps: int
    with_ns: int
    without_ns: int

    @property
    def percent(self) -> float:
        """How much longer the metered half took."""
        return 100 * (self.with_ns / self.without_ns - 1)


@dataclass(frozen=True)
class Difference:
    """The trimmed mean over quads with its 95 % interval; `apart_percent` is in both and was timed by itself."""

    quads: int
    tokens_per_s_with: float
    tokens_per_s_without: float
    percent: float
    low_percent: float
    high_percent: float
    median_percent: float
    apart_percent: float


def difference(quads: Sequence[Quad], sequences: int, apart_us: float) -> Difference:
    """What metering adds to a step, in per cent of one without it.

    A tenth of the quads is trimmed at either end: a machine's pauses come to both halves alike and to few quads, and
    one of them outweighs hundreds of others in a plain mean. The interval is Yuen's, from the winsorised deviation.
    `apart_us`: microseconds a step of what metering needs and the quads do not show: what both ways do, and what is
    done once in many steps and so could be trimmed.
    """
    shares = sorted(quad.percent for quad in quads)
    count = len(shares)
    cut = int(_TRIM * count)
    kept = shares[cut : count - cut]
    mean = statistics.fmean(kept)
    winsorised = [shares[cut]] * cut + kept + [shares[count - cut - 1]] * cut
    half = _NORMAL_95 * statistics.stdev(winsorised) / ((1 - 2 * _TRIM) * math.sqrt(count))
    steps = sum(quad.steps for quad in quads)
    with_s, without_s = (sum(getattr(quad, name) for quad in quads) / 1e9 for name in ("with_ns", "without_ns"))
    apart = 100 * apart_us * 1e-6 / (without_s / steps)
    return Difference(
        quads=count,
        tokens_per_s_with=sequences * steps / with_s,
        tokens_per_s_without=sequences * steps / without_s,
        percent=mean + apart,
        low_percent=mean - half + apart,
        high_percent=mean + half + apart,
        median_percent=statistics.median(shares) + apart,
        apart_percent=apart,
    )


def tables(where: dict[str, Any], model: str, costs: Sequence[Cost], found: Difference) -> str:
    """Markdown that a document can quote."""
    names = ("parts", "wire", "split", "book", "journal", "total", "changed")
    lines = [
        f"{where['processor']}, {where['threads']} of {where['cores']} cores, Python {where['python']}, {model}",
        "",
        "| us a step | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
        *(
            f"| {cost.sequences} sequences | " + " | ".join(f"{getattr(cost, name):.1f}" for name in names) + " |"
            for cost in costs
        ),
        "",
        "| tok/s with | without | longer by | 95 % interval | median | quads |",
        "|---:|---:|---:|---:|---:|---:|",
        f"| {found.tokens_per_s_with:.1f} | {found.tokens_per_s_without:.1f} | {found.percent:.2f} % | "
        f"{found.low_percent:.2f} to {found.high_percent:.2f} % | {found.median_percent:.2f} % | {found.quads} |",
    ]
    return "\n".join(lines)
