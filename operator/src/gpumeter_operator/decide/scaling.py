"""spec.scaling, read: bounds, targets and the rules of HPA v2's `behavior` with every default filled in.

Owns those defaults. They are Kubernetes' own (k8s.io/kubernetes 1.36 pkg/apis/autoscaling/v2/defaults.go): up at once
by 4 pods or 100 % in 15 s, whichever is more; down by up to 100 % in 15 s after 300 s of stabilisation; 10 % tolerance.
The CRD's schema checked the single fields before. Does not decide.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

TOLERANCE_PPM = 100_000  # 10 %, --horizontal-pod-autoscaler-tolerance
SCALE_TO_ZERO_AFTER = "30m"
_QUANTITY = re.compile(r"([+-]?[0-9]*\.?[0-9]+)(m|u|n|k|e[+-]?[0-9]+|E[+-]?[0-9]+)?")
_EXPONENT = {None: 0, "m": -3, "u": -6, "n": -9, "k": 3}


@dataclass(frozen=True, slots=True)
class Policy:
    """At most `value` pods, or per cent of the pods, in `period_ms`."""

    percent: bool
    value: int
    period_ms: int


@dataclass(frozen=True, slots=True)
class Rules:
    """One direction. `select` is Max, Min or Disabled."""

    window_ms: int
    select: str
    policies: tuple[Policy, ...]
    tolerance_ppm: int = TOLERANCE_PPM


@dataclass(frozen=True, slots=True)
class Scaling:
    """spec.scaling. `gpu_percent` is targetGpuUtilization."""

    least: int
    most: int
    queue_length: int
    gpu_percent: int
    zero_after_ms: int
    up: Rules
    down: Rules


UP = Rules(0, "Max", (Policy(False, 4, 15_000), Policy(True, 100, 15_000)))
DOWN = Rules(300_000, "Max", (Policy(True, 100, 15_000),))


def read_scaling(scaling: Mapping[str, Any], zero_after_ms: int) -> Scaling:
    """`zero_after_ms` is scaleToZeroAfter, which the caller reads as it reads all durations."""
    behavior = scaling.get("behavior") or {}
    return Scaling(
        least=int(scaling.get("minReplicas", 1)),
        most=int(scaling.get("maxReplicas", 1)),
        queue_length=int(scaling.get("targetQueueLength", 4)),
        gpu_percent=int(scaling.get("targetGpuUtilization", 80)),
        zero_after_ms=zero_after_ms,
        up=_rules(behavior.get("scaleUp") or {}, UP),
        down=_rules(behavior.get("scaleDown") or {}, DOWN),
    )


def _rules(raw: Mapping[str, Any], default: Rules) -> Rules:
    policies = tuple(
        Policy(one["type"] == "Percent", int(one["value"]), int(one["periodSeconds"]) * 1_000)
        for one in raw.get("policies") or ()
    )
    window_s, tolerance = raw.get("stabilizationWindowSeconds"), raw.get("tolerance")
    return Rules(
        window_ms=default.window_ms if window_s is None else int(window_s) * 1_000,
        select=raw.get("selectPolicy") or default.select,
        policies=policies or default.policies,
        tolerance_ppm=default.tolerance_ppm if tolerance is None else _parts_per_million(str(tolerance)),
    )


def _parts_per_million(quantity: str) -> int:
    """A Kubernetes quantity, as "0.1" or "100m", in millionths."""
    match = _QUANTITY.fullmatch(quantity.strip())
    if match is None:
        return TOLERANCE_PPM  # the schema admits quantities only; the rest (Ki and larger) is no tolerance
    unit = match[2]
    exponent = _EXPONENT[unit] if unit in _EXPONENT else int(unit[1:])
    return int(Decimal(match[1]).scaleb(exponent + 6))
