"""Periods of UTC time, in integer nanoseconds since 1970.

Owns where one period ends and the next begins, on both sides: a worker cuts its records at every minute, and a ledger
closes periods that are whole minutes long. Knows no clock.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

SECOND_NS = 1_000_000_000
MINUTE_NS = 60 * SECOND_NS
DAY_NS = 1440 * MINUTE_NS


class Granularity(StrEnum):
    """How long a period is, as a UsageReport names it. Days and months are made of the shorter ones."""

    MINUTE = "Minute"
    FIVE_MINUTES = "FiveMinutes"
    FIFTEEN_MINUTES = "FifteenMinutes"
    HOUR = "Hour"
    DAY = "Day"
    MONTH = "Month"


LENGTH_NS = {
    Granularity.MINUTE: MINUTE_NS,
    Granularity.FIVE_MINUTES: 5 * MINUTE_NS,
    Granularity.FIFTEEN_MINUTES: 15 * MINUTE_NS,
    Granularity.HOUR: 60 * MINUTE_NS,
}


_LABELS = {Granularity.HOUR: "%Y%m%dt%H", Granularity.DAY: "%Y%m%d", Granularity.MONTH: "%Y%m"}


@dataclass(frozen=True, slots=True, order=True)
class Period:
    """The time after `start_ns` up to and with `end_ns`: what ends on the edge belongs to the period that it ends."""

    start_ns: int
    end_ns: int
    granularity: Granularity

    @property
    def label(self) -> str:
        """The period as resource names write it: 202611, 20261121, 20261121t14 for an hour, 20261121t1405 for less."""
        shape = _LABELS.get(self.granularity, "%Y%m%dt%H%M")
        return datetime.fromtimestamp(self.start_ns // SECOND_NS, UTC).strftime(shape)

    def overlap_ns(self, start_ns: int, end_ns: int) -> int:
        """How much of a span of time lies in this period."""
        return max(0, min(self.end_ns, end_ns) - max(self.start_ns, start_ns))


def period_of(ended_at_ns: int, granularity: Granularity) -> Period:
    """The period to which something that ended at this time belongs."""
    length_ns = LENGTH_NS[granularity]
    end_ns = -(-ended_at_ns // length_ns) * length_ns
    return Period(end_ns - length_ns, end_ns, granularity)


def day_of(ended_at_ns: int) -> Period:
    """The UTC day to which something that ended at this time belongs."""
    end_ns = -(-ended_at_ns // DAY_NS) * DAY_NS
    return Period(end_ns - DAY_NS, end_ns, Granularity.DAY)


def month_of(ended_at_ns: int) -> Period:
    """The UTC month to which something that ended at this time belongs: what ends with a month's last day is its."""
    first = datetime.fromtimestamp((ended_at_ns - 1) // SECOND_NS, UTC).replace(day=1, hour=0, minute=0, second=0)
    after = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return Period(int(first.timestamp()) * SECOND_NS, int(after.timestamp()) * SECOND_NS, Granularity.MONTH)


def next_minute_edge_ns(at_ns: int) -> int:
    """The first edge of a UTC minute after `at_ns`."""
    return (at_ns // MINUTE_NS + 1) * MINUTE_NS


def rfc3339(at_ns: int) -> str:
    """UTC as Kubernetes writes it, in whole seconds."""
    return datetime.fromtimestamp(at_ns // SECOND_NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def from_rfc3339(text: str) -> int:
    """Nanoseconds since 1970 from a time as Kubernetes writes it. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} names no time zone; write UTC as 2026-11-21T14:00:00Z")
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * SECOND_NS + delta.microseconds * 1000
