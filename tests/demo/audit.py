"""The demo's own sum: do a period's reports add up to the time that Kubernetes says the pods ran?

Reads UsageReports and pods as kubectl prints them and uses nothing of the project, so that it cannot share its errors.
Pure. Nanoseconds throughout.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

SECOND_NS = 10**9
LATELY_NS = 600 * SECOND_NS
"""A worker that was here long before the traffic would fill the table with its life."""

PLATFORM = "_platform"
DEVICES_ANNOTATION = "gpumeter.io/devices"
WORKER = "main"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a worker's container; `ended_ns` is None while it runs."""

    pod: str
    started_ns: int
    ended_ns: int | None
    devices: int


@dataclass(frozen=True, slots=True)
class Line:
    """One period of one service: what the pods' statuses give, and what the reports claim."""

    start_ns: int
    end_ns: int
    allocated_ns: int
    by_tenant: dict[str, int]
    stated_ns: int  # accounts.allocated in the platform's report
    unaccounted_ns: int

    @property
    def reported_ns(self) -> int:
        """The sum of all reports of the period, the platform's among them."""
        return sum(self.by_tenant.values())

    @property
    def holds(self) -> bool:
        """Accounts = allocated, to the nanosecond."""
        return self.allocated_ns == self.reported_ns == self.stated_ns


def runs_of(pods: Iterable[dict[str, Any]]) -> list[Run]:
    """Every run of a worker's container that the pods' statuses still tell of."""
    runs = []
    for pod in pods:
        devices = int(pod["metadata"].get("annotations", {}).get(DEVICES_ANNOTATION, "1"))
        for container in pod.get("status", {}).get("containerStatuses", ()):
            if container["name"] != WORKER:
                continue
            for state in (container.get("lastState", {}), container.get("state", {})):
                running, ended = state.get("running"), state.get("terminated")
                if running:
                    runs.append(Run(pod["metadata"]["name"], ns(running["startedAt"]), None, devices))
                elif ended and ended.get("startedAt") and ended.get("finishedAt"):
                    runs.append(Run(pod["metadata"]["name"], ns(ended["startedAt"]), ns(ended["finishedAt"]), devices))
    return runs


def lines_of(reports: Sequence[dict[str, Any]], runs: Sequence[Run], service: str) -> list[Line]:
    """One line for every period of the service whose reports are all Final, in order."""
    periods: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for report in reports:
        spec = report["spec"]
        sums = spec["period"].get("granularity") in ("Day", "Month")  # of the others
        if spec["serviceRef"]["name"] == service and not sums:
            periods.setdefault((ns(spec["period"]["start"]), ns(spec["period"]["end"])), []).append(report)
    return [
        _line(start_ns, end_ns, own, runs)
        for (start_ns, end_ns), own in sorted(periods.items())
        if all(report.get("status", {}).get("phase") == "Final" for report in own)
        and any(report["spec"]["tenant"] == PLATFORM for report in own)
    ]


def since_start(lines: Sequence[Line], runs: Sequence[Run], traffic_ns: int) -> list[Line]:
    """The lines of the traffic, and those before it in which the oldest run started, if that was lately."""
    first_ns = min([traffic_ns, *(run.started_ns for run in runs if run.started_ns >= traffic_ns - LATELY_NS)])
    return [line for line in lines if line.end_ns > first_ns]


def ns(text: str) -> int:
    """A time as Kubernetes writes it, in nanoseconds since 1970."""
    return int(datetime.fromisoformat(text).timestamp()) * SECOND_NS


def _line(start_ns: int, end_ns: int, reports: Sequence[dict[str, Any]], runs: Sequence[Run]) -> Line:
    by_tenant: dict[str, int] = {}
    for report in reports:
        tenant = report["spec"]["tenant"]
        by_tenant[tenant] = by_tenant.get(tenant, 0) + int(report["status"]["gpuNanoseconds"])
    accounts = next(report for report in reports if report["spec"]["tenant"] == PLATFORM)["status"]["accounts"]
    allocated_ns = 0
    for run in runs:
        last_ns = end_ns if run.ended_ns is None else min(run.ended_ns, end_ns)
        allocated_ns += max(0, last_ns - max(run.started_ns, start_ns)) * run.devices
    return Line(start_ns, end_ns, allocated_ns, by_tenant, int(accounts["allocated"]), int(accounts["unaccounted"]))


def table(lines: Sequence[Line]) -> str:
    """The lines as a table in seconds with all nine decimals, and whether each holds."""
    tenants = sorted({tenant for line in lines for tenant in line.by_tenant} - {PLATFORM})
    head = ("PERIOD (UTC)", *tenants, PLATFORM, "SUM OF REPORTS", "POD RAN (KUBERNETES)", "DIFFERENCE", "")
    rows: list[tuple[str, ...]] = [head]
    for line in lines:
        start = datetime.fromtimestamp(line.start_ns // SECOND_NS).astimezone().utctimetuple()
        rows.append(
            (
                f"{start.tm_hour:02}:{start.tm_min:02}",
                *(seconds(line.by_tenant.get(tenant, 0)) for tenant in (*tenants, PLATFORM)),
                seconds(line.reported_ns),
                seconds(line.allocated_ns),
                f"{line.reported_ns - line.allocated_ns} ns",
                "adds up" if line.holds else "DOES NOT ADD UP",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, len(head) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def seconds(value_ns: int) -> str:
    """Nanoseconds as seconds, exactly."""
    sign, value_ns = ("-", -value_ns) if value_ns < 0 else ("", value_ns)
    return f"{sign}{value_ns // SECOND_NS}.{value_ns % SECOND_NS:09}"
