"""Reports of an hour, a day and a month on a real API server: they read like a bill, stay as they are, and leave."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

from apiserver import Run, Server
from gpumeter_operator.adapters.kubernetes import USAGE_REPORTS, Cluster
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.publish import Publisher
from gpumeter_usage.period import DAY_NS, MINUTE_NS, Granularity, day_of, month_of
from rigs.ledger import START_NS, FakeWorker, ended, gone, inline, open_ledger, started, worker

HOUR_NS = 60 * MINUTE_NS
SPEC = b'{"currency":"USD","rates":[{"gpuClass":"h100","perGpuHour":"2.5"}]}'
COLUMNS = ("NAME", "TENANT", "SERVICE", "PERIOD", "SESSIONS", "GPU-SECONDS", "TOKENS", "AMOUNT", "CUR", "PHASE", "AGE")


async def test_hours_days_and_months_are_published_read_like_a_bill_and_leave_in_their_order(
    server: Server, plane: Path, kubectl: Run, namespace: str, tmp_path: Path
) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    fake = FakeWorker(replace(worker(), namespace=namespace), START_NS)
    fake.serve("s-1", "acme", START_NS + 30 * MINUTE_NS)
    fake.seal()
    end_ns = START_NS + 30 * MINUTE_NS
    ledger.observe(fake.identity, [started("c", START_NS), ended("c", end_ns), gone(end_ns)], end_ns)
    ledger.take(fake.identity, fake.page("boot-1", 0), end_ns)
    ledger.keep_plan("default", 1, SPEC, START_NS)
    cluster = Cluster.connect(plane)
    closer, publisher = Closer(ledger, MINUTE_NS), Publisher(cluster, ledger, inline)
    day_ns, month_ns = day_of(end_ns).end_ns, month_of(end_ns).end_ns
    for now_ns in (START_NS + 10 * MINUTE_NS, end_ns + HOUR_NS, day_ns + MINUTE_NS, month_ns + MINUTE_NS):
        await publisher.publish(closer.close_all(Pricing({}, {}), now_ns), now_ns)

    shown = await asyncio.to_thread(kubectl, "get", "usagereports.gpumeter.io", "-n", namespace)
    header, *rows = (line.split() for line in shown.stdout.splitlines())
    assert tuple(header) == COLUMNS
    figures = ("1800", "540", "1.25", "USD", "Final")
    assert [row[:10] for row in rows if row[1] == "acme"] == [
        ["smollm2-acme-202611", "acme", "smollm2", "2026-11", "1", *figures],
        ["smollm2-acme-20261121", "acme", "smollm2", "2026-11-21", "1", *figures],
        ["smollm2-acme-20261121t10", "acme", "smollm2", "2026-11-21T10:00:00Z", "1", *figures],
    ]
    day = await cluster.get(USAGE_REPORTS, "smollm2-acme-20261121", namespace)
    assert day is not None
    forged = {**day, "status": {**day["status"], "gpuNanoseconds": "1"}}
    refused = await asyncio.to_thread(server.replace, namespace, "usagereports", forged, status=True)
    assert refused.code == 422 and "A Final usage report cannot be changed" in json.dumps(refused.body)

    async def lengths() -> list[str]:
        found = await cluster.list(USAGE_REPORTS, namespace)
        return sorted({each["spec"]["period"]["granularity"] for each in found})

    for now_ns, left in (
        (month_ns + MINUTE_NS, ["Day", "Month"]),
        (month_ns + 31 * DAY_NS, ["Month"]),
        (month_ns + 400 * DAY_NS, []),
    ):
        while not await publisher.restore(now_ns):
            pass
        assert await lengths() == left
    await cluster.close()
    ledger.close()
