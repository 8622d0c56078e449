"""Who a service's energy of a period is put down to: an estimate, in whole millijoules, that loses none.

Owns the split of what each pod's records state. Pure. Nobody is billed by it: NVML counts the whole board.

    tenant   = largest_remainder(attributed of the pod, its tenants' nanoseconds of measured steps)
    platform = all of the pod's energy - what its tenants have

The worker has split its windows already, between what it drew idle, which is the platform's, and what steps drew; see
the worker's `metering.energy`. A window belongs to the period in which it was stated. Where nobody ran a step in that
period, the platform has the last of it, too.
"""

from collections import defaultdict
from collections.abc import Iterable

from gpumeter_operator.billing.facts import PLATFORM, Line, sum_of_stated
from gpumeter_usage.apportion import largest_remainder
from gpumeter_usage.record import Account, Kind


def energy_mj(of_pods: Iterable[Iterable[Line]]) -> dict[str, int]:
    """By owner, the millijoules of a service in a period, from the sums of the records of each of its pods.

    Who ran only on pods where nobody measured any is not in it; where nobody did anywhere, nobody is.
    """
    found: dict[str, int] = defaultdict(int)
    for lines in of_pods:
        own = tuple(lines)
        total_mj = sum_of_stated(line.energy_mj for line in own)
        if total_mj is None:
            continue
        used_ns: dict[str, int] = defaultdict(int)
        for line in own:
            if line.kind is Kind.SESSION and line.account == Account.ATTRIBUTED:
                used_ns[line.owner] += line.gpu_ns
        owners = sorted(used_ns)
        steps_mj = sum(line.energy_mj or 0 for line in own if line.account == Account.ATTRIBUTED)
        weights = [used_ns[owner] for owner in owners]
        shares_mj = largest_remainder(steps_mj, weights) if any(weights) else [0] * len(owners)
        for owner, share_mj in zip(owners, shares_mj, strict=True):
            found[owner] += share_mj
        found[PLATFORM] += total_mj - sum(shares_mj)
    return found
