"""Splits a whole number among weights so that nothing is lost or made up.

Owns the one rounding that happens between a measured step and the sessions that shared it. Does not know what the
weights mean.
"""

from collections.abc import Sequence


def largest_remainder(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` in proportion to `weights`; the parts are integers and sum to `total` exactly.

    The method of largest remainders (Hamilton): every part gets the floor of its exact share, and the units that
    are left go one each to the largest fractional parts, ties to the lower index. `total` is not negative; weights
    are not negative; where all of them are zero the split is even.

    Raises ValueError when there is nobody to give to, or when a number is negative.
    """
    if not weights:
        raise ValueError("nothing can be split among no weights")
    if total < 0 or min(weights) < 0:
        raise ValueError("a total and its weights cannot be negative")
    weight_sum = sum(weights)
    if weight_sum == 0:
        weights, weight_sum = [1] * len(weights), len(weights)
    exact = [divmod(total * weight, weight_sum) for weight in weights]
    parts = [part for part, _ in exact]
    left = total - sum(parts)
    if left:
        remainders = [remainder for _, remainder in exact]
        # A sort is stable, also in reverse: among equal remainders the lower index comes first.
        by_remainder = sorted(range(len(parts)), key=remainders.__getitem__, reverse=True)
        for index in by_remainder[:left]:
            parts[index] += 1
    return parts
