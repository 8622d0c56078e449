"""The exact Shapley value: the only split of a joint cost that is efficient, symmetric, additive and free for idlers.

Owns the sum over all coalitions (Shapley, A Value for n-Person Games, 1953). What a coalition costs is the caller's:
a formula in a simulation, or the measured time of a step that held only those sequences.
"""

from collections.abc import Callable, Sequence
from math import factorial

PLAYERS_MAX = 16
"""65,536 coalitions. More are not summed but sampled, which this oracle does not do."""


def shapley(players: int, cost: Callable[[tuple[int, ...]], float]) -> list[float]:
    """What each of the players, 0 to players - 1, owes; `cost` is asked once for every coalition that is not empty.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! x (cost(S + i) - cost(S)), with cost of nobody 0.
    """
    if not 1 <= players <= PLAYERS_MAX:
        raise ValueError(f"the exact value is summed for 1 to {PLAYERS_MAX} players, not {players}")
    costs = [0.0] + [cost(members(coalition)) for coalition in range(1, 1 << players)]
    weights = [factorial(size) * factorial(players - size - 1) / factorial(players) for size in range(players)]
    return [
        sum(
            weights[coalition.bit_count()] * (costs[coalition | 1 << one] - costs[coalition])
            for coalition in range(1 << players)
            if not coalition >> one & 1
        )
        for one in range(players)
    ]


def members(coalition: int) -> tuple[int, ...]:
    """The players of a coalition that is written as bits."""
    return tuple(one for one in range(coalition.bit_length()) if coalition >> one & 1)


def misplaced(shares: Sequence[float], value: Sequence[float]) -> float:
    """What share of the whole was put at the wrong sequences: half of the differences' sum, as both sum to the same."""
    return sum(abs(a - b) for a, b in zip(shares, value, strict=True)) / 2 / sum(value)
