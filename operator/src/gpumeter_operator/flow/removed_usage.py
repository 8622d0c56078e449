"""What is left of days whose records retention removed, for whoever asks by model or session.

Owns which figures the kept reports can stand in for: a report knows its tenant and its service, so it tells a model
where it is the only one that the service ever had, and never a session. What they cannot tell is named, day by day,
and never left out in silence. Reads, changes nothing; whether a removal can be believed is the matter of `gpumeter
verify`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpumeter_operator.adapters.ledger import usage as kept
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.usage import Asked
from gpumeter_operator.billing.charges import ChargeKind
from gpumeter_operator.billing.removals import DAY_NS
from gpumeter_operator.billing.removals import day_end_ns as end_of_day_ns
from gpumeter_operator.flow.billed import Plans
from gpumeter_operator.flow.figures import Cost, Total, figures_of
from gpumeter_usage.period import MINUTE_NS, from_rfc3339, rfc3339

Days = Mapping[str, set[int]]
"""By service ("namespace/name"), the ends of UTC days."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What stands in for removed records: `lines` of figures in the order of their keys, and the days `left_out`."""

    days: frozenset[tuple[str, int]] = frozenset()
    lines: Sequence[Total] = ()
    left_out: Days = field(default_factory=dict)

    def holds(self, service: str, end_ns: int) -> bool:
        """Whether the records of a period were removed; SQLite deletes them after that, a little at a time."""
        return (service, end_of_day_ns(end_ns)) in self.days


def of_removed(reader: Reader, by: Sequence[str], asked: Asked, plans: Plans) -> Removed:
    """What the Final reports say of the removed days of the span, by keys that bills do not know."""
    days = frozenset(kept.removed_days(reader.engine, asked))
    if not days:
        return Removed()
    models = kept.models(reader.engine)
    found: dict[tuple[str, ...], Total] = {}
    left_out: dict[str, set[int]] = {}
    for service, tenant, end_ns, body in kept.tenant_reports(reader.engine, asked):
        day_ns, of_service = end_of_day_ns(end_ns), models.get(service, set())
        if (service, day_ns) not in days or (asked.model is not None and asked.model not in of_service):
            continue
        status = json.loads(body)["status"]
        told = figures_of((), status)
        if not told.records:
            continue
        if "session" in by or len(of_service) > 1:
            left_out.setdefault(service, set()).add(day_ns)
            continue
        names = {"tenant": tenant, "service": service, "model": next(iter(of_service))}
        told.cost = _as_measured(plans, service, end_ns, told.gpu_ns, status.get("charges", ()))
        told.energy_mj = None  # of records no line has it
        key = tuple(names[name] for name in by)
        found.setdefault(key, Total(key)).add(told)
    return Removed(days, [found[key] for key in sorted(found)], left_out)


def left_out_note(days: Days, by: Iterable[str]) -> Iterator[str]:
    """One sentence that names what is in no figure, and where its bill is; nothing where nothing is left out."""
    if days:
        what = "sessions" if "session" in by else "models"
        yield (
            f"Left out is what was used of {_listed(days)}: retention removed the records, and reports do not tell "
            f"{what} apart; --by tenant,service has the bills."
        )


def before_session(reader: Reader, service: str, first_ns: int) -> Days:
    """The removed day in which a session may have begun whose first slice that is there began at `first_ns`."""
    ends = [end_ns for of, end_ns in kept.removed_days(reader.engine) if of == service]
    # One that goes on past midnight has a slice in the day's first minute, or a late one of the day before.
    last_ns = max((end_ns for end_ns in ends if end_ns - DAY_NS <= first_ns < end_ns + MINUTE_NS), default=None)
    return {} if last_ns is None else {service: {last_ns}}


def before_session_note(days: Days) -> Iterator[str]:
    """The sentence about that day."""
    if days:
        yield f"Slices of {_listed(days)} may be left out: retention removed the records."


def no_session_note(reader: Reader) -> Iterator[str]:
    """A sentence for a session of which nothing is there: whether it may be that its records were removed."""
    days: dict[str, set[int]] = {}
    for service, end_ns in kept.removed_days(reader.engine):
        days.setdefault(service, set()).add(end_ns)
    if days:
        yield f"Retention removed the records of {_listed(days)}, and with them those of the sessions of these days."


def dates(ends_ns: Iterable[int]) -> list[str]:
    """UTC days as people write them, ascending."""
    return [_date(end_ns) for end_ns in sorted(ends_ns)]


def _as_measured(plans: Plans, service: str, end_ns: int, gpu_ns: int, charges: Iterable[Mapping[str, Any]]) -> Cost:
    """What the used time of a report costs at the rates of its stretches: the report has a charge for each."""
    of_usage = (charge for charge in charges if charge["kind"] == ChargeKind.USAGE.value)
    used = [(from_rfc3339(each["from"]) + 1, each["gpuClass"], int(each["gpuNanoseconds"])) for each in of_usage]
    cost = plans.cost(service, end_ns, used)
    cost.unpriced_ns += gpu_ns - sum(each[2] for each in used)  # without a plan there are no charges
    return cost


def _listed(days: Days) -> str:
    return "; ".join(f"{service} on {_runs(ends_ns)}" for service, ends_ns in sorted(days.items()))


def _runs(ends_ns: Iterable[int]) -> str:
    """Days that follow each other are written as from and to."""
    runs: list[list[int]] = []
    for end_ns in sorted(ends_ns):
        if runs and runs[-1][1] + DAY_NS == end_ns:
            runs[-1][1] = end_ns
        else:
            runs.append([end_ns, end_ns])
    return ", ".join(_date(first) if first == last else f"{_date(first)} to {_date(last)}" for first, last in runs)


def _date(day_end_ns: int) -> str:
    return rfc3339(day_end_ns - DAY_NS)[: len("2026-11-21")]
