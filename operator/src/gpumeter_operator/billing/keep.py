"""How long a report stays in the API, after which the ledger alone has it.

Owns the rule that keeps the cluster's store small: hours go some days after their day, days after their month, months
after a time of their own, and none before the longer report that holds it is Final. Pure; knows no cluster.
"""

from dataclasses import dataclass

from gpumeter_usage.period import DAY_NS, Granularity, Period, day_of, month_of


@dataclass(frozen=True, slots=True)
class Keep:
    """For how many days after the end of their day, of their month, and of themselves."""

    hours: int = 3
    days: int = 31
    months: int = 400


DEFAULT_KEEP = Keep()


def leaves_ns(period: Period, keep: Keep) -> int:
    """When a report of this period leaves the API, provided that what holds it is Final."""
    if period.granularity is Granularity.MONTH:
        return period.end_ns + keep.months * DAY_NS
    if period.granularity is Granularity.DAY:
        return month_of(period.end_ns).end_ns + keep.days * DAY_NS
    return day_of(period.end_ns).end_ns + keep.hours * DAY_NS


def holder_of(period: Period) -> Period | None:
    """The longer period that holds it; None for a month."""
    if period.granularity is Granularity.MONTH:
        return None
    return month_of(period.end_ns) if period.granularity is Granularity.DAY else day_of(period.end_ns)


def stay_since_ns(granularity: Granularity, keep: Keep, now_ns: int) -> int:
    """Reports of this granularity whose periods ended by this time have left by now; the later ones stay."""
    if granularity is Granularity.MONTH:
        return now_ns - keep.months * DAY_NS
    if granularity is Granularity.DAY:
        holder = month_of(now_ns - keep.days * DAY_NS + 1)
        return holder.start_ns
    return day_of(now_ns - keep.hours * DAY_NS + 1).start_ns


def most_reports(keep: Keep, period_ns: int) -> int:
    """The most reports of one tenant of one service that the API holds at once, with closing periods of this length."""
    # Of hours also those of the running day and of the one before, which may still be closing; of days likewise.
    hours = DAY_NS // period_ns * (keep.hours + 2)
    return hours + (keep.days + 2 * 31) + (keep.months // 28 + 2)
