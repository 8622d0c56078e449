"""What a service has used so far, as its own status shows it: the running hour's GPU time, the running month's cost.

Owns which reports are added up for that, and how the sums are written. All of it comes from reports, so it can say
nothing else than they do: the running month's report holds its Final periods, and the reports of those that are not
Final are added. Pure. Does not know how reports are made or who writes a status.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.tariff import plain, sum_of_amounts
from gpumeter_usage.period import LENGTH_NS, SECOND_NS, Granularity, from_rfc3339, month_of, rfc3339

HOUR_NS = LENGTH_NS[Granularity.HOUR]
_MONTH, _SUMS = Granularity.MONTH.value, (Granularity.MONTH.value, Granularity.DAY.value)

Manifest = Mapping[str, Any]
Service = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Usage:
    """Nanoseconds of GPU, and the amounts of the month by currency."""

    hour_ns: int  # where the running hour began
    attributed_ns: int = 0  # of that hour
    unaccounted_ns: int = 0
    allocated_ns: int = 0  # of the running month
    amounts: Mapping[str, Decimal] = field(default_factory=dict)


def usage_of(reports: Iterable[Manifest], now_ns: int, closed: Iterable[Manifest] = ()) -> Usage | None:
    """The usage of one service, from the reports of its running month and of its periods that are not Final.

    `closed` are Final reports of periods of the running hour, where periods are shorter than an hour. None where no
    report says anything about this month.
    """
    hour_ns, month = hour_of(now_ns), month_of(now_ns)
    attributed_ns = unaccounted_ns = allocated_ns = 0
    amounts: dict[str, Decimal] = {}
    found = False
    of_hour = {_key(each): each for each in closed}
    for each in reports:
        span, status = each["spec"]["period"], each["status"]
        sums, final = span["granularity"] in _SUMS, status["phase"] == Phase.FINAL.value
        start_ns = from_rfc3339(span["start"])
        if not sums and start_ns >= hour_ns:
            of_hour[_key(each)] = each
        of_month = start_ns == month.start_ns and span["granularity"] == _MONTH
        if of_month or (not sums and not final and month.start_ns <= start_ns):
            found = True
            allocated_ns += _account(each, "allocated")
            if "amount" in status:
                currency = status["currency"]
                amounts[currency] = sum_of_amounts((amounts.get(currency, Decimal(0)), Decimal(status["amount"])))
    for each in of_hour.values():
        attributed_ns += _account(each, "attributed")
        unaccounted_ns += _account(each, "unaccounted")
    return Usage(hour_ns, attributed_ns, unaccounted_ns, allocated_ns, amounts) if found else None


def hour_of(now_ns: int) -> int:
    """Where the running hour began."""
    return now_ns // HOUR_NS * HOUR_NS


def written(usage: Usage) -> dict[str, Any]:
    """The field status.usage: to the millisecond, the second and the cent, for a bill is a report and not this."""
    found = {
        "hour": rfc3339(usage.hour_ns),
        "gpuSeconds": _rounded(Decimal(usage.attributed_ns) / SECOND_NS, "0.001"),
        "unaccounted": _rounded(Decimal(usage.unaccounted_ns) / SECOND_NS, "0.001"),
        "gpuHours": _rounded(Decimal(usage.allocated_ns) / HOUR_NS, "0.001"),
    }
    if usage.amounts:
        found["cost"] = " + ".join(
            f"{amount.quantize(Decimal('0.01'), ROUND_HALF_EVEN)} {currency}"
            for currency, amount in sorted(usage.amounts.items())
        )
    return found


def _key(report: Manifest) -> tuple[str, str]:
    return report["spec"]["period"]["start"], report["spec"]["tenant"]


def _account(report: Manifest, name: str) -> int:
    """One of the accounts, which stand in the platform's report alone and are of the whole service."""
    if report["spec"]["tenant"] != PLATFORM:
        return 0
    return int((report["status"].get("accounts") or {}).get(name, 0))


def _rounded(value: Decimal, to: str) -> str:
    return plain(value.quantize(Decimal(to), ROUND_HALF_EVEN))
