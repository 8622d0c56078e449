"""Splits a measured step among the sequences that shared it: the rules `knee` and `tokens`.

Owns the weights and the profile that names their parameters. Works in whole picoseconds, so that the same step is
split the same way on every machine. Does not know how a step is measured, and never changes how long it took.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from gpumeter_usage.apportion import largest_remainder
from gpumeter_usage.canonical import canonical_json


class Rule(StrEnum):
    """How a step's duration is split."""

    KNEE = "knee"  # what the work costs: shared weights, linear layers, attention
    TOKENS = "tokens"  # new tokens alone: the plain alternative


class Load(NamedTuple):
    """What one sequence asked of a step."""

    new_tokens: int
    context_tokens: int


class Costs(NamedTuple):
    """The parameters of the knee rule, in integer picoseconds.

    `t0_ps` a step's fixed cost, `phi_ps` reading the weights once, `lam_ps` the linear layers per new token, `kap_ps`
    reading the KV cache per token, `alp_ps` attention's arithmetic per pair of tokens.
    """

    t0_ps: int
    phi_ps: int
    lam_ps: int
    kap_ps: int
    alp_ps: int


@dataclass(frozen=True, slots=True)
class Profile:
    """What splits steps: the rule, and its parameters (see Costs) with the name of where they come from."""

    name: str
    rule: Rule
    t0_ps: int
    phi_ps: int
    lam_ps: int
    kap_ps: int
    alp_ps: int

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical parameters; every record names it."""
        return _hash(self)


@lru_cache(maxsize=64)
def _hash(profile: Profile) -> str:
    return sha256(canonical_json(asdict(profile))).hexdigest()


def split(duration_ns: int, loads: Sequence[tuple[int, int]], profile: Profile) -> list[int]:
    """Each sequence's share of the step in nanoseconds; the shares sum to `duration_ns` exactly.

    A load is a `Load`, or a plain (new tokens, context tokens).
    """
    return largest_remainder(duration_ns, weights(loads, profile))


def weights(loads: Sequence[tuple[int, int]], profile: Profile) -> list[int]:
    """The weights of a step, scaled by B x N so that they are whole numbers.

    With B sequences, n_i new and c_i context tokens, N = sum n_i and L = max(lam*N, phi), design section 2 says
    w_i = (t0 + phi)/B + (L - phi)*n_i/N + max(kap*(c_i + n_i), alp*(n_i*c_i + n_i*(n_i + 1)/2)).
    """
    if profile.rule is Rule.TOKENS:
        return [new for new, _ in loads]
    sequences = len(loads)
    new_tokens = sum([new for new, _ in loads])
    fixed = (profile.t0_ps + profile.phi_ps) * new_tokens
    linear = (max(profile.lam_ps * new_tokens, profile.phi_ps) - profile.phi_ps) * sequences
    scale = sequences * new_tokens
    # With one new token there are as many pairs as there are tokens to read, c + 1. Most rows are such, in every step
    # of a stream, and this runs for each of them: it is kept to two operations.
    of_context = max(profile.kap_ps, profile.alp_ps) * scale
    decode = fixed + linear + of_context
    return [
        decode + of_context * load[1]
        if load[0] == 1
        else fixed + linear * load[0] + _attention_ps(Load(*load), profile) * scale
        for load in loads
    ]


def of_a_context_token(sequences: int, profile: Profile) -> int:
    """What one more token of context adds to a weight of `weights`, where each of so many sequences decodes."""
    return 0 if profile.rule is Rule.TOKENS else max(profile.kap_ps, profile.alp_ps) * sequences * sequences


def cost_ps(loads: Sequence[Load], costs: Costs) -> int:
    """What the knee rule takes a step to last: the sum of its weights, t0 + L + the sum of a_i."""
    linear = max(costs.lam_ps * sum(load.new_tokens for load in loads), costs.phi_ps)
    return costs.t0_ps + linear + sum(_attention_ps(load, costs) for load in loads)


def _attention_ps(load: Load, profile: Profile | Costs) -> int:
    new, context = load
    pairs = new * context + new * (new + 1) // 2
    return max(profile.kap_ps * (context + new), profile.alp_ps * pairs)


def uncalibrated(rule: Rule, clock: str) -> Profile:
    """The parameters that hold until a calibration exists: the proportions of a small model on this kind of device.

    A poor profile moves cost between the sequences of one batch, never the total: that is always measured.
    """
    if clock == "host":
        proportions = {
            "t0_ps": 5 * 10**9,
            "phi_ps": 15 * 10**9,
            "lam_ps": 10**9,
            "kap_ps": 7 * 10**6,
            "alp_ps": 7 * 10**5,
        }
    else:
        proportions = {"t0_ps": 10**9, "phi_ps": 5 * 10**9, "lam_ps": 2 * 10**7, "kap_ps": 5 * 10**4, "alp_ps": 500}
    return Profile(name=f"uncalibrated-{clock}-1", rule=rule, **proportions)
