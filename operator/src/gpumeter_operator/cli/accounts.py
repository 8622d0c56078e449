"""`gpumeter accounts`: the accounts of every pod and period, and the check that they equal what was allocated.

Owns the table and the exit code. Reads the ledger without changing it, beside a running collector too:

    kubectl exec deploy/gpumeter-collector -- gpumeter accounts --check
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from decimal import Decimal

import click

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.accounts import Accounts, horizon_ns
from gpumeter_operator.billing.audit import check_kept
from gpumeter_operator.cli.ledger import LEDGER, open_reader
from gpumeter_operator.cli.span import Moment
from gpumeter_operator.flow.periods import facts_of, open_periods, pod_period
from gpumeter_operator.flow.recount import Whole, recount_service
from gpumeter_operator.flow.removals import removed_of
from gpumeter_operator.flow.verify import Tally
from gpumeter_usage.period import SECOND_NS, Period, rfc3339

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


@click.command()
@click.option("--namespace", "-n", help="Only services of this namespace.")
@click.option("--service", "-s", help="Only services of this name.")
@click.option(
    "--since",
    type=Moment(),
    default="1970-01-01T00:00:00Z",
    help="Only periods that end after this time, or this long ago.",
)
@click.option("--output", "-o", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--check", is_flag=True, help="Recompute everything from the raw records: chains, sums, reports.")
@LEDGER
def accounts(
    *, namespace: str | None, service: str | None, since: int, output: str, check: bool, ledger: str | None
) -> None:
    """Check that every pod's accounts add up to the GPU time that Kubernetes allocated to it.

    Exit code 0 when they do, 1 when they do not, 2 when the ledger cannot be read.
    """
    try:
        reader = open_reader(ledger)
        services = [each for each in reader.services() if namespace in (None, each[0]) and service in (None, each[1])]
        rows, problems = [], []
        checked = Tally() if check else None
        for each in services:
            rows += [row for row in rows_of(reader, each, time.time_ns()) if row.period.end_ns > since]
            problems += audit(reader, each, tally=checked) if check else []
        problems += check_kept([], reader.kept_plans()) if check else []
    except LedgerUnavailable as problem:
        click.echo(str(problem), err=True)
        sys.exit(2)
    problems += [f"{row.namespace}/{row.pod}: the accounts do not add up" for row in rows if not row.adds_up]
    click.echo((as_json if output == "json" else as_table)(rows, problems, checked))
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


def audit(reader: Reader, service: Service, now_ns: int | None = None, tally: Tally | None = None) -> list[str]:
    """Every difference between the raw records of a service, its pods' accounts and its reports; `tally` is told how
    much was looked at."""
    removed, unproved = removed_of(reader, service, None, time.time_ns() if now_ns is None else now_ns)
    found = recount_service(reader, service, Whole, tally or Tally(), lambda *_: None, removed=removed)
    return [problem for _, problem in (*unproved, *found)]


def as_table(rows: list[Row], problems: list[str], checked: Tally | None) -> str:
    """One line a pod and period, in seconds, exact to the nanosecond; then the sums, and the verdict with what was
    `checked`."""
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
    lines += [*(f"DIFFERS {problem}" for problem in problems)]
    lines.append(f"{'accounts = allocated: ' + ('NO' if problems else 'yes')} ({len(rows)} rows; {_told(checked)})")
    return "\n".join(lines)


def _told(checked: Tally | None) -> str:
    if checked is None:
        return "--check recomputes from raw records"
    told = f"chains, sums and reports of {_periods(checked.periods)} recomputed from {checked.records} raw records"
    if not checked.only_compared:
        return told
    return (
        f"{told}; those of {_periods(checked.only_compared)} only compared with each other and with what was "
        "allocated, because retention removed their records"
    )


def _periods(count: int) -> str:
    return "1 closed period" if count == 1 else f"{count} closed periods"


def as_json(rows: list[Row], problems: list[str], checked: Tally | None) -> str:
    """The same as data; nanoseconds."""
    looked_at = (
        {
            "records": checked.records,
            "periods": checked.periods,
            "periodsOnlyCompared": checked.only_compared,
        }
        if checked is not None
        else None
    )
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
            "checkedFromRawRecords": checked is not None and not checked.only_compared,
            "lookedAt": looked_at,
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
