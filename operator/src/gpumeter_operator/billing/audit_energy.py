"""What every report must say of energy, reckoned from raw records.

Owns a second way to the split: none of the collector's sums or shares is used. Pure.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from fractions import Fraction

from gpumeter_operator.billing.facts import PLATFORM


def energy_due(of_pods: Iterable[tuple[Mapping[str, int], Mapping[str, int]]]) -> dict[str, int]:
    """By tenant, the millijoules that are put down to it; nobody's where no pod measured any.

    Of each pod its energy by account, and its tenants' nanoseconds of measured steps, both of one period.
    """
    found: dict[str, int] = defaultdict(int)
    for energy_mj, used_ns in of_pods:
        if not energy_mj:
            continue
        attributed_mj, total_ns = energy_mj.get("attributed", 0), sum(used_ns.values())
        exact = {tenant: Fraction(attributed_mj * gpu_ns, total_ns or 1) for tenant, gpu_ns in sorted(used_ns.items())}
        shares = {tenant: share.numerator // share.denominator for tenant, share in exact.items()}
        left = attributed_mj - sum(shares.values()) if total_ns else 0
        for tenant in sorted(exact, key=lambda each: shares[each] - exact[each])[:left]:  # a sort is stable
            shares[tenant] += 1
        for tenant, share_mj in shares.items():
            found[tenant] += share_mj
        found[PLATFORM] += sum(energy_mj.values()) - sum(shares.values())
    return found
