"""Usage for people: sums by key with their price, and how complete they are.

Owns how the sums of periods become lines, at which price, and what is told about periods that are open or incomplete.
Reads the ledger and not the API, because the API holds reports of tenants only, and not for long: sessions, models and
last month are in the ledger alone. Amounts are those of the reports: reckoned and rounded by (service, tenant, period).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import groupby

from gpumeter_operator.adapters.ledger import usage as sums_of
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.usage import Asked, Sum
from gpumeter_operator.billing.tariff import PeriodPlan, price
from gpumeter_usage.period import rfc3339

_ADDED = (
    "records",
    "sessions",
    "gpu_ns",
    "prefill_ns",
    "decode_ns",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
)


@dataclass(slots=True)
class Line:
    """What one key used over the whole span. `amounts` by currency; `unpriced_ns` is GPU time without a price."""

    key: tuple[str, ...]
    records: int = 0
    sessions: int = 0
    gpu_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    unpriced_ns: int = 0
    amounts: dict[str, Decimal] = field(default_factory=dict)

    def add(self, other: "Line | Sum") -> None:
        """Add figures; amounts of a line too."""
        for name in _ADDED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if isinstance(other, Line):
            self.unpriced_ns += other.unpriced_ns
            for currency, amount in other.amounts.items():
                self.amounts[currency] = self.amounts.get(currency, Decimal(0)) + amount


class Priced:
    """The plans of periods, each read once."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._plans: dict[tuple[str, int], tuple[PeriodPlan | None, int]] = {}
        self._schedule = reader.schedule()

    def amount(self, service: str, end_ns: int, by_class: dict[str, int]) -> tuple[str, Decimal] | None:
        """(currency, amount) of GPU time of one service in one period; None where it has no price (yet)."""
        known = self._plans.get((service, end_ns))
        if known is None:
            namespace, _, name = service.partition("/")
            plan = self._reader.period_plan(namespace, name, end_ns)
            known = self._plans[service, end_ns] = (plan, self._schedule.period_of(end_ns).start_ns)
        plan, start_ns = known
        if plan is None or plan.plan is None:
            return None
        found = price(plan, by_class, start_ns)
        return None if found.amount is None else (plan.plan.currency, found.amount)


def lines(reader: Reader, by: Sequence[str], asked: Asked) -> Iterator[Line]:
    """A line a key, in the order of the keys, as they come out of the database."""
    priced = Priced(reader)
    # Priced by tenant as reports are, so that the amounts of a service are those of its tenants' reports in sum.
    fine = tuple(by) if "tenant" in by or "session" in by else (*by, "tenant")
    for key, group in groupby(sums_of.sums(reader.engine, fine, asked), key=lambda each: each.key[: len(by)]):
        line = Line(key)
        for (_, service, end_ns), of_period in groupby(group, key=lambda each: (each.key, each.service, each.end_ns)):
            by_class: dict[str, int] = {}
            for each in of_period:
                line.add(each)
                by_class[each.gpu_class] = by_class.get(each.gpu_class, 0) + each.gpu_ns
            found = priced.amount(service, end_ns, by_class)
            if found is None:
                line.unpriced_ns += sum(by_class.values())
            else:
                line.amounts[found[0]] = line.amounts.get(found[0], Decimal(0)) + found[1]
        yield line


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice of a session, as its record states it, and what it costs where it is priced."""

    started_ns: int
    ended_ns: int
    service: str
    tenant: str
    model: str
    pod: str
    account: str
    status: str
    gpu_ns: int
    prefill_ns: int
    decode_ns: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    steps: int
    batch_ns: int
    booked_end_ns: int
    amount: tuple[str, Decimal] | None


def slices(reader: Reader, session_id: str) -> Iterator[Slice]:
    """The slices of a session, oldest first."""
    priced = Priced(reader)
    for body, end_ns, pod, gpu_class in sums_of.slices(reader.engine, session_id):
        told = json.loads(body)
        billed = told["account"] == "attributed"
        yield Slice(
            started_ns=told["started_at"],
            ended_ns=told["ended_at"],
            pod=pod,
            booked_end_ns=end_ns,
            amount=priced.amount(told["service"], end_ns, {gpu_class: told["gpu_ns"]}) if billed else None,
            **{name: told[name] for name in _TOLD},
        )


_TOLD = ("service", "tenant", "model", "account", "status", "steps", "batch_ns", *_ADDED[2:])


def notes(reader: Reader, services: Iterable[tuple[str, str]], asked: Asked, now_ns: int) -> list[str]:
    """What must be known of the periods of the span: which are open, and which were closed incomplete."""
    incomplete: dict[str, list[int]] = {}
    for service, end_ns, body in sums_of.platform_reports(reader.engine, asked):
        told: dict[str, str] = next(
            (each for each in json.loads(body)["status"]["conditions"] if each["type"] == "Complete"), {}
        )
        if told.get("status") == "False":
            incomplete.setdefault(service, []).append(end_ns)
    found = []
    for namespace, name in services:
        service = f"{namespace}/{name}"
        if ends := incomplete.get(service):
            first = rfc3339(min(ends))
            found.append(
                f"{service}: {_periods(len(ends))} closed incomplete (Complete=False), the first ended {first}."
            )
        final_ns = reader.last_final_ns(namespace, name)
        later = [
            end_ns
            for end_ns in reader.booked_ends(namespace, name, final_ns)
            if asked.since_ns < end_ns <= asked.until_ns
        ]
        if later:
            closed = f"closed until {rfc3339(final_ns)}" if final_ns else "none is closed yet"
            found.append(f"{service}: {_periods(len(later))} not Final yet, so the figures may grow; {closed}.")
    return found


def _periods(count: int) -> str:
    return "1 period is" if count == 1 else f"{count} periods are"
