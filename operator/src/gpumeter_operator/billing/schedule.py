"""Which period a moment belongs to, also across a change of the period's length.

Owns the rule that periods never overlap: another length takes effect at a full hour, where all lengths meet.
Knows no clock.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gpumeter_usage.period import LENGTH_NS, Granularity, Period, period_of

HOUR_NS = LENGTH_NS[Granularity.HOUR]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Lengths of periods by the time from which they hold, ascending; the first holds from 0."""

    changes: tuple[tuple[int, Granularity], ...]

    def period_of(self, ended_at_ns: int) -> Period:
        """The period of what ended at this time."""
        chosen = self.changes[0][1]
        for from_ns, granularity in self.changes:
            if ended_at_ns > from_ns:
                chosen = granularity
        return period_of(ended_at_ns, chosen)

    def between(self, start_ns: int, end_ns: int) -> list[Period]:
        """All periods that hold any of the time after `start_ns` up to `end_ns`."""
        found = []
        at_ns = start_ns + 1
        while at_ns <= end_ns:
            period = self.period_of(at_ns)
            found.append(period)
            at_ns = period.end_ns + 1
        return found


def next_open(schedule: Schedule, final_ns: int, open_from_ns: Iterable[int], now_ns: int) -> Period:
    """The period in which something is booked that became known too late: the first of the service that is open, or the
    one that runs now.

    `final_ns` is the end of the last Final one, `open_from_ns` are times after which something of the service happened
    that is in no Final period yet. Never one that is Final, whatever the clock says; and none before now in which
    nothing is: a service that was asleep for a month gets no bill of that month for what is booked today.
    """
    starts_ns = [max(final_ns, from_ns) + 1 for from_ns in (*open_from_ns, now_ns - 1)]
    return schedule.period_of(min(starts_ns))


def effective_from_ns(now_ns: int) -> int:
    """When another length of periods can take effect at the earliest: the next full hour."""
    return -(-now_ns // HOUR_NS) * HOUR_NS
