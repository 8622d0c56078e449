"""Times and spans as people write them on the command line.

Owns how a time, a time ago and a month are read, and the sentences about what is none. Knows no ledger.
"""

import re
import time
from datetime import UTC, datetime

import click

from gpumeter_usage.period import SECOND_NS, from_rfc3339

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Moment(click.ParamType[int]):
    """A time (2026-11-21T14:00:00Z), a day (2026-11-21) or how long ago (90s, 30m, 2h, 7d); nanoseconds since 1970."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it, or say how to write it."""
        text = str(value)
        if ago := re.fullmatch(r"([0-9]{1,6})([smhd])", text):
            return time.time_ns() - int(ago[1]) * UNITS_S[ago[2]] * SECOND_NS
        try:
            if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
                return from_rfc3339(f"{text}T00:00:00Z")
            return from_rfc3339(text)
        except ValueError:
            self.fail(f"{text!r} is no time; write 2026-11-21T14:00:00Z, or 2h for two hours ago.", param, ctx)


class Month(click.ParamType[tuple[int, int]]):
    """A month of UTC (2026-11): its first nanosecond and that of the next."""

    name = "month"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Read it, or say how to write it."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{4})-(0[1-9]|1[0-2])", str(value))
        if found is None or int(found[1]) < 1970:
            self.fail(f"{value!r} is no month; write 2026-11.", param, ctx)
        year, month = int(found[1]), int(found[2])
        after = (year + 1, 1) if month == 12 else (year, month + 1)
        return _first_ns(year, month), _first_ns(*after)


def asked_span(since_ns: int | None, until_ns: int | None, month: tuple[int, int] | None) -> tuple[int, int]:
    """What was asked for as (since, until). Raises click.UsageError where it makes no sense."""
    if month is not None:
        if since_ns is not None or until_ns is not None:
            raise click.UsageError("--month is a span of its own; leave out --since and --until.")
        return month
    span = (0 if since_ns is None else since_ns, 2**62 if until_ns is None else until_ns)
    if span[0] >= span[1]:
        raise click.UsageError("The span ends before it begins: --since must lie before --until.")
    return span


def _first_ns(year: int, month: int) -> int:
    return int(datetime(year, month, 1, tzinfo=UTC).timestamp()) * SECOND_NS
