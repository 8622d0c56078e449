"""The collector as a process with its ledger in a real PostgreSQL: what it publishes, `gpumeter verify` proves."""

import asyncio
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from apiserver import Run
from apiserver import Server as ApiServer
from collectorrun import CollectorProcess, answering, identity_of_the_chart
from gpumeter_operator.adapters.kubernetes import PRICE_PLANS, Cluster
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.report import canonical_report
from gpumeter_usage.period import MINUTE_NS, rfc3339
from operatorrun import eventually
from rigs.audited import PRIVATE_PEM
from rigs.ports import hold_port
from rigs.postgres import Server
from test_collector_publishes import Report, a_worker, finals_of, two_minutes_ago

ADDRESS = "127.0.0.81"
KEPT = ("apiVersion", "kind", "spec", "status")


@pytest.fixture
def collector(plane: Path, kubectl: Run, helm: Run, ledger_url: str, tmp_path: Path) -> Iterator[CollectorProcess]:
    key = tmp_path / "signing-key"
    key.write_bytes(PRIVATE_PEM)
    may = identity_of_the_chart(kubectl, helm, plane, tmp_path)
    process = CollectorProcess(may, tmp_path, hold_port(), ledger_url=ledger_url, GPUMETER_SIGNING_KEY_FILE=str(key))
    yield process
    assert process.stop() == 0, process.log.read_text()
    assert "Traceback" not in process.log.read_text(), process.log.read_text()


@pytest.fixture
def ledger_url(postgres: Server, migrated: str) -> Iterator[str]:
    name = postgres.database(migrated)
    yield postgres.url(name)
    postgres.drop(name)


async def test_what_is_published_from_postgresql_adds_up_is_chained_and_verified(
    plane: Path, server: ApiServer, namespace: str, collector: CollectorProcess
) -> None:
    cluster, start_ns = Cluster.connect(plane), two_minutes_ago()
    _, fake = await a_worker(cluster, server, namespace, start_ns)
    starts = [start_ns, start_ns + MINUTE_NS]
    async with answering(fake, ADDRESS):
        collector.start()
        bill = await eventually(lambda: finals_of(cluster, namespace, starts), timeout_s=60)
        for start in starts:
            whole = [each for (at, _), each in bill.items() if at == rfc3339(start)]
            assert sum(int(each["status"]["gpuNanoseconds"]) for each in whole) == MINUTE_NS
        first, second = (bill[rfc3339(start), PLATFORM] for start in starts)
        assert first["status"]["previousDigest"] == "0" * 64, "nothing was before it"
        assert second["status"]["previousDigest"] == published_digest(first)

        async def digested() -> bool:
            told = await asyncio.to_thread(collector.beside, "digests", "export")
            return told.stdout.count(f'\\"namespace\\":\\"{namespace}\\"') >= len(starts)

        await eventually(digested, timeout_s=30)
        told = await asyncio.to_thread(collector.beside, "verify", "-o", "json")
        assert told.returncode == 0, told.stdout + told.stderr
        looked_at = json.loads(told.stdout)["lookedAt"]
        assert looked_at["periods"] >= 2 and looked_at["records"] >= 5 and looked_at["digests"] >= 2
        assert fake.boot.acknowledged_seq > 0
    await cluster.delete(PRICE_PLANS, "default")
    await cluster.close()


def published_digest(report: Report) -> str:
    """As docs/audit.md tells a customer to compute it, of what the API server hands out."""
    metadata = {name: report["metadata"][name] for name in ("labels", "name", "namespace")}
    return sha256(canonical_report({**{name: report[name] for name in KEPT}, "metadata": metadata})).hexdigest()
