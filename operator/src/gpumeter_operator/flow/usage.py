"""Usage for people: sums by key with their price, and how complete they are.

Owns how the sums of periods become lines, and what is told about periods that are open or incomplete.
Reads the ledger and not the API, because the API holds reports of tenants only, and not for long: sessions, models and
last month are in the ledger alone. What tenants and services used and owe is what their reports say, also where
retention removed the records; of records it is what is asked by model or session.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from heapq import merge
from itertools import groupby

from gpumeter_operator.adapters.ledger import corrections
from gpumeter_operator.adapters.ledger import usage as sums_of
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.usage import Asked
from gpumeter_operator.billing.facts import USED, Correction
from gpumeter_operator.flow.billed import Plans, billed, bills_that_differ, measured
from gpumeter_operator.flow.figures import Total
from gpumeter_operator.flow.removed_usage import Days, Removed, left_out_note, of_removed
from gpumeter_usage.period import rfc3339


@dataclass(frozen=True, slots=True)
class Answer:
    """The lines of usage, one a key, in the order of the keys (of finer keys than reports know as they come out of the
    database); what must be known of them; and the removed days that they do not hold."""

    lines: Iterator[Total]
    notes: list[str]
    left_out: Days


def answer(reader: Reader, by: Sequence[str], asked: Asked, now_ns: int) -> Answer:
    """Who used what in the span, and what it costs."""
    services = [
        each for each in reader.services() if asked.namespace in (None, each[0]) and asked.service in (None, each[1])
    ]
    told = notes(reader, services, asked)
    if is_billed(by, asked):
        return Answer(_as_billed(reader, by, asked, now_ns), told, {})
    plans = Plans(reader, asked)
    removed = of_removed(reader, by, asked, plans)
    told += [*left_out_note(removed.left_out, by), *bills_that_differ(plans.opened())]
    return Answer(_as_measured(reader, by, asked, plans, removed), told, removed.left_out)


def is_billed(by: Sequence[str], asked: Asked) -> bool:
    """Whether amounts are those of bills: reports know tenants and services, not models and sessions."""
    return asked.model is None and set(by) <= {"tenant", "service"}


def _as_billed(reader: Reader, by: Sequence[str], asked: Asked, now_ns: int) -> Iterator[Total]:
    found = billed(reader, by, asked, now_ns)
    # Who has a report and used nothing, as one whose only records were lost, is on no line.
    return (found[key] for key in sorted(found) if not found[key].is_empty)


def _as_measured(reader: Reader, by: Sequence[str], asked: Asked, plans: Plans, removed: Removed) -> Iterator[Total]:
    of_both = merge(_of_records(reader, by, asked, plans, removed), removed.lines, key=lambda line: line.key)
    for key, group in groupby(of_both, key=lambda line: line.key):
        total = Total(key)
        for line in group:
            total.add(line)
        yield total


def _of_records(reader: Reader, by: Sequence[str], asked: Asked, plans: Plans, removed: Removed) -> Iterator[Total]:
    # Rounded by tenant as reports are, so that where a service has one model its amounts are those of its reports.
    fine = tuple(by) if "tenant" in by or "session" in by else (*by, "tenant")
    sums = sums_of.sums(reader.engine, fine, asked, plans.edges_ns())
    there = (each for each in sums if not removed.holds(each.service, each.end_ns))
    for key, group in groupby(there, key=lambda each: each.key[: len(by)]):
        line = Total(key)
        for (_, service, end_ns), of_period in groupby(group, key=lambda each: (each.key, each.service, each.end_ns)):
            of_one = list(of_period)
            for each in of_one:
                line.add(each)
            line.cost.add(measured(plans, service, end_ns, of_one))
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


def slices(reader: Reader, session_id: str, plans: Plans) -> Iterator[Slice]:
    """The slices of a session, oldest first, each at its measured price."""
    for body, end_ns, pod, gpu_class in sums_of.slices(reader.engine, session_id):
        told = json.loads(body)
        used = [(told["ended_at"], gpu_class, told["gpu_ns"])] if told["account"] == "attributed" else []
        yield Slice(
            started_ns=told["started_at"],
            ended_ns=told["ended_at"],
            pod=pod,
            booked_end_ns=end_ns,
            amount=next(iter(plans.cost(told["service"], end_ns, used).amounts.items()), None),
            **{name: told[name] for name in _TOLD},
        )


_TOLD = ("service", "tenant", "model", "account", "status", "steps", "batch_ns", *USED)


def notes(reader: Reader, services: Iterable[tuple[str, str]], asked: Asked) -> list[str]:
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
        for each in corrections.of_service(reader, namespace, name):
            if asked.since_ns < each.booked_end_ns <= asked.until_ns and asked.tenant in (None, each.tenant):
                found.append(f"{service}: {_told(each)}")
    return found


def _told(each: Correction) -> str:
    by = f"{each.told} of {each.tenant}'s report {each.report}"
    booked = f"booked in the period until {rfc3339(each.booked_end_ns)}"
    return f"correction {each.id} of {by}, {booked} by {each.actor}: {each.reason}"


def _periods(count: int) -> str:
    return "1 period is" if count == 1 else f"{count} periods are"
