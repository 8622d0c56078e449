"""How long a worker that was told to stop may still take: one end for everything that it does on its way out.

Pure: the clock is an argument. Owns the time between the drain timeout and the end. Does not know what the steps are.
"""

from dataclasses import dataclass

AFTER_DRAIN_S = 33.0
"""What cutting off, the seal and its acknowledgement may take together, however their own limits add up. The pod has
45 s after the drain timeout; the rest is for the last responses and for the process to end on a busy machine."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock that no step outlasts."""

    at_s: float

    def left_s(self, now_s: float, limit_s: float) -> float:
        """A step's own limit, or what is left where that is less; never negative."""
        return max(0.0, min(limit_s, self.at_s - now_s))


def leave_by(told_s: float, drain_timeout_s: float) -> Deadline:
    """When a worker that was told to stop at `told_s` has drained and sealed."""
    return Deadline(told_s + drain_timeout_s + AFTER_DRAIN_S)
