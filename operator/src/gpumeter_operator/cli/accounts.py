"""`gpumeter accounts`: the accounts of every pod and period, and the check that they equal what was allocated.

Owns the table and the exit code. Reads the ledger without changing it, beside a running collector too:

    kubectl exec deploy/gpumeter-collector -- gpumeter accounts --check
"""

import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from decimal import Decimal

import click

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.retention import removed_seqs, removed_until_ns
from gpumeter_operator.billing.accounts import Accounts, horizon_ns
from gpumeter_operator.billing.audit import Recount, check_accounts, check_kept, check_reports, recount
from gpumeter_operator.cli.collector_settings import DEFAULT_LEDGER
from gpumeter_operator.flow.periods import facts_of, open_periods, pod_period
from gpumeter_usage.period import SECOND_NS, Period, from_rfc3339, rfc3339

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
COLUMNS = ("allocated", "init", "load", "warmup", "attributed", "nonbillable", "idle", "drain", "unaccounted")
Service = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """The accounts of one pod in one period."""

    namespace: str
    service: str
    pod: str
    worker_uid: str
    period: Period
    final: bool
    accounts: Accounts

    @property
    def adds_up(self) -> bool:
        """Whether the accounts equal what was allocated."""
        return self.accounts.allocated == self.accounts.owned + self.accounts.unaccounted


class Since(click.ParamType[int]):
    """A time (2026-11-21T14:00:00Z) or how long ago (90s, 30m, 2h, 7d); nanoseconds since 1970."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it, or say how to write it."""
        text = str(value)
        if ago := re.fullmatch(r"([0-9]{1,6})([smhd])", text):
            return time.time_ns() - int(ago[1]) * UNITS_S[ago[2]] * SECOND_NS
        try:
            return from_rfc3339(text)
        except ValueError:
            self.fail(f"{text!r} is no time; write 2026-11-21T14:00:00Z, or 2h for two hours ago.", param, ctx)


@click.command()
@click.option("--namespace", "-n", help="Only services of this namespace.")
@click.option("--service", "-s", help="Only services of this name.")
@click.option(
    "--since",
    type=Since(),
    default="1970-01-01T00:00:00Z",
    help="Only periods that end after this time, or this long ago.",
)
@click.option("--output", "-o", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--check", is_flag=True, help="Recompute everything from the raw records: chains, sums, reports.")
@click.option("--ledger", help="URL of the ledger; default GPUMETER_LEDGER_URL.")
def accounts(
    *, namespace: str | None, service: str | None, since: int, output: str, check: bool, ledger: str | None
) -> None:
    """Check that every pod's accounts add up to the GPU time that Kubernetes allocated to it.

    Exit code 0 when they do, 1 when they do not, 2 when the ledger cannot be read.
    """
    try:
        reader = Reader(ledger or os.environ.get("GPUMETER_LEDGER_URL") or DEFAULT_LEDGER)
        services = [each for each in reader.services() if namespace in (None, each[0]) and service in (None, each[1])]
        rows, problems = [], []
        for each in services:
            rows += [row for row in rows_of(reader, each, time.time_ns()) if row.period.end_ns > since]
            problems += audit(reader, each) if check else []
        problems += check_kept([], reader.kept_plans()) if check else []
    except LedgerUnavailable as problem:
        click.echo(str(problem), err=True)
        sys.exit(2)
    problems += [f"{row.namespace}/{row.pod}: the accounts do not add up" for row in rows if not row.adds_up]
    click.echo(as_json(rows, problems, checked=check) if output == "json" else as_table(rows, problems, checked=check))
    sys.exit(1 if problems else 0)


def rows_of(reader: Reader, service: Service, now_ns: int) -> list[Row]:
    """Frozen accounts for Final periods; for the others, the accounts as far as they are known now."""
    schedule = reader.schedule()
    rows = []
    for pod in reader.pods(*service, 0):
        worker = pod.worker
        for end_ns, frozen in reader.pod_accounts(worker.worker_uid):
            rows.append(Row(*service, worker.pod, worker.worker_uid, schedule.period_of(end_ns), True, frozen))
    for period in open_periods(reader, service, schedule, now_ns):
        facts = facts_of(reader, service, period)
        for pod in facts[0]:
            accounts = pod_period(pod, period, facts, horizon_ns(pod, period, now_ns, final=False)).booked.accounts
            rows.append(Row(*service, pod.worker.pod, pod.worker.worker_uid, period, False, accounts))
    return sorted(rows, key=lambda row: (row.namespace, row.service, row.period, row.pod))


def audit(reader: Reader, service: Service) -> list[str]:
    """Every difference between the raw records of a service, its pods' accounts and its reports."""
    schedule, adjustments = reader.schedule(), reader.adjustments(*service)
    final_ns = reader.last_final_ns(*service)
    removed_ns = removed_until_ns(reader, *service)  # of periods up to here there are no raw records any more
    recounts: list[Recount] = []
    problems: list[str] = []
    allocated_ns: dict[int, dict[str, int]] = {}  # by end of period and class of GPU
    for pod in reader.pods(*service, 0):
        uid = pod.worker.worker_uid
        frozen = reader.pod_accounts(uid)
        found = recount(pod, reader.kept_records(uid), schedule, adjustments, removed_seqs(reader, uid))
        problems += found.problems + check_accounts(pod, frozen, found, adjustments, final_ns, removed_ns=removed_ns)
        recounts.append(found)
        for end_ns, of_period in frozen:
            of_class = allocated_ns.setdefault(end_ns, {})
            of_class[pod.worker.gpu_class] = of_class.get(pod.worker.gpu_class, 0) + of_period.allocated
    reports: dict[int, dict[str, dict[str, object]]] = {}
    for end_ns, tenant, body in reader.final_reports(*service):
        reports.setdefault(end_ns, {})[tenant] = json.loads(body)
    told = check_kept(reader.kept_reports(*service), [])
    for end_ns in sorted(each for each in reports.keys() | allocated_ns.keys() if each > removed_ns):
        opened, of_class = reader.period_plan(*service, end_ns), allocated_ns.get(end_ns, {})
        plan = opened.plan if opened else None
        told += check_reports(schedule.period_of(end_ns), reports.get(end_ns, {}), recounts, of_class, plan)
    problems += [f"{service[0]}/{service[1]}: {problem}" for problem in told]
    return problems


def as_table(rows: list[Row], problems: list[str], *, checked: bool) -> str:
    """One line a pod and period, in seconds, exact to the nanosecond; then the sums and the verdict."""
    header = ("NAMESPACE", "SERVICE", "POD", "PERIOD", "PHASE", *(name.upper() for name in COLUMNS), "CHECK")
    cells = [header]
    for row in rows:
        figures = (_seconds(getattr(row.accounts, name)) for name in COLUMNS)
        phase, verdict = "Final" if row.final else "Open", "equal" if row.adds_up else "DIFFERS"
        cells.append((row.namespace, row.service, row.pod, rfc3339(row.period.start_ns), phase, *figures, verdict))
    total = sum((row.accounts for row in rows), Accounts())
    cells.append(("total", "", "", "", "", *(_seconds(getattr(total, name)) for name in COLUMNS), ""))
    widths = [max(len(line[index]) for line in cells) for index in range(len(header))]
    lines = [
        "  ".join(
            _pad(cell, width, index) for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines += [
        "",
        "GPU-seconds. allocated = init + load + warmup + attributed + nonbillable + idle + drain + unaccounted",
    ]
    absolute_ns = sum(abs(row.accounts.unaccounted) for row in rows)
    lines += [
        f"unaccounted: {_seconds(total.unaccounted)} s{_share(total.unaccounted, total.allocated)} in sum; "
        f"{_seconds(absolute_ns)} s{_share(absolute_ns, total.allocated)} where no row makes up for another.",
        "Kubernetes states container times in whole seconds, so a start or an end of a container leaves up to one "
        "second of each GPU.",
        "A step belongs to the period in which it ends: one that straddles an edge leaves a rest in one period that "
        "the next takes back.",
    ]
    what = (
        "chains, sums and reports recomputed from the raw records" if checked else "--check recomputes from raw records"
    )
    lines += [*(f"DIFFERS {problem}" for problem in problems)]
    lines.append(f"{'accounts = allocated: ' + ('NO' if problems else 'yes')} ({len(rows)} rows; {what})")
    return "\n".join(lines)


def as_json(rows: list[Row], problems: list[str], *, checked: bool) -> str:
    """The same as data; nanoseconds."""
    return json.dumps(
        {
            "lines": [
                {
                    "namespace": row.namespace,
                    "service": row.service,
                    "pod": row.pod,
                    "workerUid": row.worker_uid,
                    "start": rfc3339(row.period.start_ns),
                    "end": rfc3339(row.period.end_ns),
                    "final": row.final,
                    "accounts": asdict(row.accounts),
                    "addsUp": row.adds_up,
                }
                for row in rows
            ],
            "unaccounted": {
                "sum": sum(row.accounts.unaccounted for row in rows),
                "absolute": sum(abs(row.accounts.unaccounted) for row in rows),
            },
            "problems": problems,
            "checkedFromRawRecords": checked,
            "addsUp": not problems,
        },
        indent=2,
    )


def _share(part_ns: int, whole_ns: int) -> str:
    return f" ({Decimal(100 * part_ns) / whole_ns:.3f} % of allocated)" if whole_ns > 0 else ""


def _seconds(gpu_ns: int) -> str:
    sign, gpu_ns = ("-", -gpu_ns) if gpu_ns < 0 else ("", gpu_ns)
    return f"{sign}{gpu_ns // SECOND_NS}.{gpu_ns % SECOND_NS:09d}"


def _pad(cell: str, width: int, index: int) -> str:
    return cell.rjust(width) if 5 <= index < 5 + len(COLUMNS) else cell.ljust(width)
