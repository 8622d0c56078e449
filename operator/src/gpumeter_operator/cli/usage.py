"""`gpumeter usage`: who used how much GPU time, and what it costs.

Owns the options, the table, the JSON and the sentences about what was not found. Reads the ledger without changing it:

    kubectl exec deploy/gpumeter-collector -- gpumeter usage --month 2026-11 --by tenant,model
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from decimal import Decimal
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any

import click

from gpumeter_operator.adapters.ledger import usage as sums
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.usage import Asked
from gpumeter_operator.billing.facts import USED
from gpumeter_operator.billing.report import joules
from gpumeter_operator.billing.tariff import plain
from gpumeter_operator.cli.ledger import LEDGER, open_reader
from gpumeter_operator.cli.span import Moment, Month, asked_span
from gpumeter_operator.flow.billed import Plans, bills_that_differ
from gpumeter_operator.flow.figures import Cost, Total
from gpumeter_operator.flow.removed_usage import Days, before_session, before_session_note, dates, no_session_note
from gpumeter_operator.flow.usage import Answer, Slice, answer, is_billed, slices
from gpumeter_usage.period import SECOND_NS, rfc3339

KEYS = ("tenant", "service", "model", "session")
FIGURES = ("GPU-SECONDS", "GPU-NS", "SESSIONS", "PROMPT", "CACHED", "COMPLETION", "AMOUNT")
LOOKED_AT_FOR_WIDTH = 1_000
"""Lines that are held to find the widths of columns; of the rest, what is wider stands out, and nothing is held."""


class By(click.ParamType[tuple[str, ...]]):
    """Keys with commas between: tenant,model."""

    name = "keys"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Read them, or say which there are."""
        if isinstance(value, tuple):
            return value
        keys = tuple(str(value).split(","))
        if wrong := [key for key in keys if key not in KEYS]:
            self.fail(
                f"{wrong[0]!r} is no key; write one or more of {', '.join(KEYS)}, with commas between.", param, ctx
            )
        if len(set(keys)) != len(keys):
            self.fail(f"{value!r} names a key twice.", param, ctx)
        return keys


@click.command()
@click.option("--by", type=By(), default="tenant", show_default=True, help="tenant, service, model, session.")
@click.option("--since", type=Moment(), help="Only periods that end after this time, or this long ago.")
@click.option("--until", type=Moment(), help="Only periods that end at this time at the latest.")
@click.option("--month", type=Month(), help="Only the periods of a month of UTC, as 2026-11.")
@click.option("--namespace", "-n", help="Only services of this namespace.")
@click.option("--service", "-s", help="Only services of this name.")
@click.option("--tenant", "-t", help="Only this tenant.")
@click.option("--model", "-m", help="Only this model.")
@click.option("--session", "session_id", help="Every slice of one session, whenever it was.")
@click.option("--output", "-o", type=click.Choice(["table", "json"]), default="table", show_default=True)
@LEDGER
def usage(
    *,
    by: tuple[str, ...],
    since: int | None,
    until: int | None,
    month: tuple[int, int] | None,
    namespace: str | None,
    service: str | None,
    tenant: str | None,
    model: str | None,
    session_id: str | None,
    output: str,
    ledger: str | None,
) -> None:
    """Print the GPU time that tenants used, and its price, by whole billing periods.

    What the platform itself used, and what was lost, is in `gpumeter accounts`. By tenant and service it is what their
    reports say. Exit code 0; 1 where something that is named is not in the ledger, or retention removed the records of
    days of which reports cannot tell what is asked for (they are named), 2 where the ledger cannot be read.
    """
    asked = Asked(*asked_span(since, until, month), namespace, service, tenant, model)
    try:
        reader = open_reader(ledger)
        if session_id is not None:
            left_out = _tell_session(reader, session_id, output)
        else:
            _refuse_unknown(reader, asked)
            found = answer(reader, by, asked, time.time_ns())
            left_out = found.left_out
            _print(_as_json(by, found, asked) if output == "json" else _as_table(by, found, asked))
    except LedgerUnavailable as problem:
        click.echo(str(problem), err=True)
        sys.exit(2)
    sys.exit(1 if left_out else 0)


def _refuse_unknown(reader: Reader, asked: Asked) -> None:
    for what, value in (
        ("namespace", asked.namespace),
        ("service", asked.service),
        ("model", asked.model),
        ("tenant", asked.tenant),
    ):
        if value is None or value in (known := sums.names(reader.engine, what)):
            continue
        if what == "tenant" and sums.has_tenant(reader.engine, value):
            continue
        close = get_close_matches(value, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else _those(known)
        click.echo(f"The ledger knows no {what} {value!r:.80}; {hint}", err=True)
        sys.exit(1)


def _those(known: list[str]) -> str:
    if not known:
        return "it has none at all yet."
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    return f"it has {', '.join(known[:10])}{more}."


def _as_table(by: tuple[str, ...], found: Answer, asked: Asked) -> Iterator[str]:
    """Line by line; only the first thousand are held, for the widths."""
    total = Total(("total",))

    def cells() -> Iterator[tuple[str, ...]]:
        for line in found.lines:
            total.add(line)
            yield (*line.key, *_figures(line))

    yield f"usage {_span(asked)}"
    yield from _columns((*(key.upper() for key in by), *FIGURES), cells(), len(by))
    yield (
        f"total: {_seconds(total.gpu_ns)} GPU-seconds ({total.gpu_ns} ns), {total.sessions} sessions ended, "
        f"{total.prompt_tokens + total.completion_tokens} tokens, amount {_figures(total)[-1]}"
    )
    as_billed = is_billed(by, asked)
    what = "All figures as in the reports" if as_billed else "AMOUNT at the rate of each slice's time"
    yield f"{what}, before the rounding of an invoice."
    if total.cost.idle_ns:
        idle = f"{_seconds(total.cost.idle_ns)} GPU-seconds ({total.cost.idle_ns} ns)"
        yield f"{idle} of idle time are charged besides, and are in AMOUNT."
    if total.cost.adjusted_ns:
        adjusted = f"{_seconds(total.cost.adjusted_ns)} GPU-seconds ({total.cost.adjusted_ns} ns)"
        yield f"{adjusted} of corrections are booked besides, and are in AMOUNT."
    if total.cost.unpriced_ns:
        unpriced = _seconds(total.cost.unpriced_ns)
        yield f"{unpriced} GPU-seconds have no price: no usable PricePlan, or no rate for the GPU."
    yield from found.notes


def _columns(header: tuple[str, ...], cells: Iterator[tuple[str, ...]], left: int) -> Iterator[str]:
    first = list(islice(cells, LOOKED_AT_FOR_WIDTH))
    widths = [max(len(line[index]) for line in (header, *first)) for index in range(len(header))]
    for line in chain([header], first, cells):
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()


def _figures(line: Total) -> tuple[str, ...]:
    amount = " + ".join(f"{plain(amount)} {currency}" for currency, amount in sorted(line.cost.amounts.items())) or "-"
    counts = (line.gpu_ns, line.sessions, line.prompt_tokens, line.cached_tokens, line.completion_tokens)
    return (_seconds(line.gpu_ns), *map(str, counts), amount)


def _as_json(by: tuple[str, ...], found: Answer, asked: Asked) -> Iterator[str]:
    """One object, a line of usage on a line of its own, so that millions can be read as they come."""
    total = Total(())
    yield json.dumps({"since": _time(asked.since_ns), "until": _time(asked.until_ns), "by": by})[:-1] + ', "usage": ['
    before = ""
    for line in found.lines:
        total.add(line)
        if before:
            yield before + ","
        before = json.dumps(dict(zip(by, line.key, strict=True)) | _data(line))
    yield from [before] if before else []
    after = {"total": _data(total), "notes": found.notes, "leftOut": _days(found.left_out)}
    yield "], " + json.dumps(after)[1:]


def _data(line: Total) -> dict[str, Any]:
    energy = {} if line.energy_mj is None else {"energyJoules": joules(line.energy_mj)}
    return {
        "gpuNanoseconds": str(line.gpu_ns),
        "gpuSeconds": plain(Decimal(line.gpu_ns) / SECOND_NS),
        "prefillGpuNanoseconds": str(line.prefill_ns),
        "decodeGpuNanoseconds": str(line.decode_ns),
        "sessions": line.sessions,
        "records": line.records,
        "tokens": {
            "prompt": line.prompt_tokens,
            "cached": line.cached_tokens,
            "completion": line.completion_tokens,
        },
        "amounts": {currency: plain(amount) for currency, amount in sorted(line.cost.amounts.items())},
        "idleGpuNanoseconds": str(line.cost.idle_ns),
        "adjustedGpuNanoseconds": str(line.cost.adjusted_ns),
        "unpricedGpuNanoseconds": str(line.cost.unpriced_ns),
        **energy,
    }


def _days(left_out: Days) -> list[dict[str, Any]]:
    return [{"service": service, "days": dates(ends_ns)} for service, ends_ns in sorted(left_out.items())]


def _tell_session(reader: Reader, session_id: str, output: str) -> Days:
    """Print the slices of one session, which are at most one each five seconds of its life; returns the removed day
    that it may have slices in."""
    plans = Plans(reader, Asked(*asked_span(None, None, None)))
    found = list(slices(reader, session_id, plans))
    if not found:
        click.echo(f"The ledger has no slice of a session {session_id!r:.120}; ids are those of the answers.", err=True)
        for note in no_session_note(reader):
            click.echo(note, err=True)
        sys.exit(1)
    left_out = before_session(reader, found[0].service, found[0].started_ns)
    told = [*before_session_note(left_out), *bills_that_differ(plans.looked_at())]
    _print(_of_session(found, session_id, output, told, left_out))
    return left_out


def _of_session(found: list[Slice], session_id: str, output: str, told: list[str], left_out: Days) -> Iterator[str]:
    total = Total(())
    for each in found:
        if each.account == "attributed":
            for name in USED:
                setattr(total, name, getattr(total, name) + getattr(each, name))
            if each.amount:
                total.cost.add(Cost({each.amount[0]: each.amount[1]}))
            else:
                total.cost.unpriced_ns += each.gpu_ns
        total.records += 1
    last = found[-1]
    about = {
        "session": session_id,
        "tenant": last.tenant,
        "service": last.service,
        "model": last.model,
        "status": last.status,
    }
    if output == "json":
        data = {"slices": [_slice_data(each) for each in found], "total": _data(total), "notes": told}
        data["leftOut"] = _days(left_out)
        yield json.dumps(about | data, indent=2)
        return
    yield "  ".join(f"{name}={value}" for name, value in about.items())
    header = (
        "STARTED",
        "ENDED",
        "POD",
        "STATUS",
        "GPU-NS",
        "PREFILL-NS",
        "DECODE-NS",
        "PROMPT",
        "CACHED",
        "COMPLETION",
        "STEPS",
        "BATCH",
        "AMOUNT",
    )
    yield from _columns(header, (_slice_cells(each) for each in found), 4)
    time_used = f"{_seconds(total.gpu_ns)} GPU-seconds ({total.gpu_ns} ns)"
    yield f"total: {time_used} in {len(found)} slices, amount {_figures(total)[-1]}"
    yield from told


def _slice_cells(each: Slice) -> tuple[str, ...]:
    counts = (
        each.gpu_ns,
        each.prefill_ns,
        each.decode_ns,
        each.prompt_tokens,
        each.cached_tokens,
        each.completion_tokens,
        each.steps,
    )
    amount = f"{plain(each.amount[1])} {each.amount[0]}" if each.amount else "-"
    status = each.status if each.account == "attributed" else f"{each.status} ({each.account})"
    batch = f"{Decimal(each.batch_ns) / each.gpu_ns:.2f}" if each.gpu_ns else "-"
    return (_exact(each.started_ns), _exact(each.ended_ns), each.pod, status, *map(str, counts), batch, amount)


def _slice_data(each: Slice) -> dict[str, Any]:
    return {
        "start": _exact(each.started_ns),
        "end": _exact(each.ended_ns),
        "pod": each.pod,
        "account": each.account,
        "status": each.status,
        "gpuNanoseconds": str(each.gpu_ns),
        "prefillGpuNanoseconds": str(each.prefill_ns),
        "decodeGpuNanoseconds": str(each.decode_ns),
        "tokens": {"prompt": each.prompt_tokens, "cached": each.cached_tokens, "completion": each.completion_tokens},
        "steps": each.steps,
        "batchNanoseconds": str(each.batch_ns),
        "bookedInPeriodUntil": rfc3339(each.booked_end_ns),
        "amount": plain(each.amount[1]) if each.amount else None,
        "currency": each.amount[0] if each.amount else None,
    }


def _print(text: Iterable[str]) -> None:
    for line in text:
        click.echo(line)


def _seconds(gpu_ns: int) -> str:
    sign, gpu_ns = ("-", -gpu_ns) if gpu_ns < 0 else ("", gpu_ns)
    return f"{sign}{gpu_ns // SECOND_NS}.{gpu_ns % SECOND_NS:09d}"


def _exact(at_ns: int) -> str:
    return f"{rfc3339(at_ns)[:-1]}.{at_ns % SECOND_NS:09d}Z"


def _time(at_ns: int) -> str | None:
    return rfc3339(at_ns) if 0 < at_ns < 2**62 else None


def _span(asked: Asked) -> str:
    since, until = _time(asked.since_ns), _time(asked.until_ns)
    if since is None and until is None:
        return "of all periods"
    return f"of periods that ended {f'after {since} ' if since else ''}{f'until {until}' if until else ''}".rstrip()
