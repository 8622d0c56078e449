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
    parts: list[int] = []
    remainders: list[int] = []
    for weight in weights:
        part, remainder = divmod(total * weight, weight_sum)
        parts.append(part)
        remainders.append(remainder)
    left = total - sum(parts)
    if left:
        by_remainder = sorted(range(len(parts)), key=lambda index: (-remainders[index], index))
        for index in by_remainder[:left]:
            parts[index] += 1
    return parts
