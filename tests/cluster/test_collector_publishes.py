"""The collector as a process against a real API server: pods in, UsageReports out, whatever it is done to it."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apiserver import Run, Server
from collectorrun import CollectorProcess, answering, create_pod, identity_of_the_chart, set_status
from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, PRICE_PLANS, USAGE_REPORTS, Cluster
from gpumeter_operator.billing.facts import PLATFORM, Worker
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, rfc3339
from gpumeter_usage.record import Account, Status
from operatorrun import eventually, service
from rigs.ledger import FakeWorker, worker
from rigs.ports import hold_port

ADDRESS = "127.0.0.81"
PLAN = {
    "apiVersion": "gpumeter.io/v1alpha1",
    "kind": "PricePlan",
    "metadata": {"name": "default"},
    "spec": {"currency": "EUR", "rates": [{"gpuClass": "h100", "perGpuHour": "3.60"}]},
}
Report = dict[str, Any]


@pytest.fixture(scope="module")
def identity(plane: Path, kubectl: Run, helm: Run, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return identity_of_the_chart(kubectl, helm, plane, tmp_path_factory.mktemp("collector"))


@pytest.fixture
async def cluster(server: Server, plane: Path) -> AsyncIterator[Cluster]:
    one = Cluster.connect(plane)
    yield one
    await one.delete(PRICE_PLANS, "default")
    await one.close()


@pytest.fixture
async def collector(identity: Path, tmp_path: Path) -> AsyncIterator[CollectorProcess]:
    process = CollectorProcess(identity, tmp_path, hold_port())
    yield process
    assert process.stop() == 0, process.log.read_text()
    assert "Traceback" not in process.log.read_text(), process.log.read_text()


async def a_worker(cluster: Cluster, server: Server, namespace: str, started_ns: int) -> tuple[Worker, FakeWorker]:
    """A service with one pod, whose container runs since `started_ns`, and the worker in it with some usage."""
    await cluster.apply(PLAN, field_manager="tests")
    made = await cluster.apply(service(namespace), field_manager="tests")
    identity = replace(worker(), namespace=namespace, service_uid=made["metadata"]["uid"])
    uid = await asyncio.to_thread(create_pod, server, identity, ADDRESS, ("containerd://c1", started_ns, None))
    identity = replace(identity, worker_uid=uid)
    fake = FakeWorker(identity, started_ns)
    fake.spend(Account.LOAD, started_ns + 5 * SECOND_NS)
    fake.serve("s-1", "acme", started_ns + 15 * SECOND_NS)
    fake.serve("s-2", "beta-corp", started_ns + 25 * SECOND_NS, Status.CANCELLED)
    return identity, fake


def two_minutes_ago() -> int:
    """The start of the minute before the last whole one: two periods are over already."""
    return time.time_ns() // MINUTE_NS * MINUTE_NS - 2 * MINUTE_NS


async def reports_of(cluster: Cluster, namespace: str) -> dict[tuple[str, str], Report]:
    """By start of the period and tenant."""
    found = await cluster.list(USAGE_REPORTS, namespace)
    return {(each["spec"]["period"]["start"], each["spec"]["tenant"]): each for each in found}


async def finals_of(cluster: Cluster, namespace: str, starts: list[int]) -> dict[tuple[str, str], Report] | None:
    """The reports of these minutes once all of them are Final."""
    wanted = {rfc3339(start) for start in starts}
    found = {key: each for key, each in (await reports_of(cluster, namespace)).items() if key[0] in wanted}
    platform = {key[0] for key, each in found.items() if key[1] == PLATFORM}
    final = all((each.get("status") or {}).get("phase") == "Final" for each in found.values())
    return found if platform == wanted and final else None


async def told_of_plan(cluster: Cluster) -> Report | None:
    """The plan, once the collector has told of it."""
    found = await cluster.get(PRICE_PLANS, "default")
    return found if found and (found.get("status") or {}).get("conditions") else None


async def told_usage(cluster: Cluster, namespace: str) -> Report | None:
    """status.usage of the service, which the collector writes with the chart's own rights."""
    found = await cluster.get(INFERENCE_SERVICES, "smollm2", namespace)
    usage: Report | None = ((found or {}).get("status") or {}).get("usage")
    return usage


async def test_reports_are_published_add_up_and_stay(
    cluster: Cluster, server: Server, namespace: str, collector: CollectorProcess
) -> None:
    start_ns = two_minutes_ago()
    _, fake = await a_worker(cluster, server, namespace, start_ns)
    starts = [start_ns, start_ns + MINUTE_NS]
    async with answering(fake, ADDRESS):
        collector.start()
        bill = await eventually(lambda: finals_of(cluster, namespace, starts), timeout_s=60)
        for start in starts:
            whole = [each for key, each in bill.items() if key[0] == rfc3339(start)]
            assert sum(int(each["status"]["gpuNanoseconds"]) for each in whole) == MINUTE_NS
            assert {each["type"]: each["status"] for each in whole[0]["status"]["conditions"]} == {
                "Complete": "True",
                "Reconciled": "True",
                "Measured": "True",
                "Priced": "True",
            }
        acme = bill[rfc3339(start_ns), "acme"]
        assert acme["metadata"]["name"].startswith("smollm2-acme-20")
        assert (acme["status"]["gpuSeconds"], acme["status"]["amount"], acme["status"]["currency"]) == (
            "10",
            "0.01",
            "EUR",
        )
        beta = bill[rfc3339(start_ns), "beta-corp"]
        assert (beta["status"]["gpuSeconds"], beta["status"]["sessions"]) == ("10", 1), "who cancels has used it"

        async def running() -> Report | None:  # written in the same round, in no order that matters
            now = rfc3339(time.time_ns() // MINUTE_NS * MINUTE_NS)
            found = (await reports_of(cluster, namespace)).get((now, PLATFORM))
            return found if found and "status" in found else None  # a status is a write of its own

        assert (await eventually(running, timeout_s=30))["status"]["phase"] == "Open"

        usage = await eventually(lambda: told_usage(cluster, namespace), timeout_s=30)
        assert float(usage["gpuHours"]) > 0 and usage["cost"].endswith(" EUR"), usage

        plan = await eventually(lambda: told_of_plan(cluster), timeout_s=30)
        assert plan["status"]["hash"] == acme["spec"]["pricePlanHash"]
        assert plan["status"]["conditions"][0]["message"] == "Version 1 is in force."

        await _final_is_immutable(cluster, server, acme)
        await cluster.delete(USAGE_REPORTS, acme["metadata"]["name"], namespace)

        async def published_again() -> Report | None:
            found = await cluster.get(USAGE_REPORTS, acme["metadata"]["name"], namespace)
            return found if found and (found.get("status") or {}).get("phase") == "Final" else None

        again = await eventually(published_again, timeout_s=60)
        assert (again["spec"], again["status"]) == (acme["spec"], acme["status"])
        assert fake.boot.acknowledged_seq > 0

        told = collector.accounts("--check", "--namespace", namespace)
        assert told.returncode == 0, told.stdout + told.stderr
        assert "accounts = allocated: yes" in told.stdout
        assert _get(collector.url + "/healthz")[0] == _get(collector.url + "/readyz")[0] == 200
        assert "gpumeter_collector_records_committed_total" in _get(collector.url + "/metrics")[1]


async def _final_is_immutable(cluster: Cluster, server: Server, report: Report) -> None:
    forged = {**report, "status": {**report["status"], "gpuNanoseconds": "1"}}
    answer = await asyncio.to_thread(
        server.replace, report["metadata"]["namespace"], "usagereports", forged, status=True
    )
    assert answer.code == 422
    assert "A Final usage report cannot be changed" in json.dumps(answer.body)


async def test_a_collector_killed_again_and_again_loses_and_doubles_nothing(
    cluster: Cluster, server: Server, namespace: str, collector: CollectorProcess
) -> None:
    start_ns = two_minutes_ago()
    identity, fake = await a_worker(cluster, server, namespace, start_ns)
    for number in range(60):  # more pages than one run of the collector survives
        fake.serve(f"s-more-{number}", "acme", fake.frontier_ns + SECOND_NS // 10)
    async with answering(fake, ADDRESS):
        for _ in range(6):
            before = fake.boot.acknowledged_seq
            collector.start()
            await eventually(lambda before=before: _more_than(fake, before), timeout_s=60)
            await asyncio.to_thread(collector.kill)
        collector.start()
        bill = await eventually(lambda: finals_of(cluster, namespace, [start_ns, start_ns + MINUTE_NS]), timeout_s=60)
        acme_ns = int(bill[rfc3339(start_ns), "acme"]["status"]["gpuNanoseconds"])
        assert acme_ns == 10 * SECOND_NS + 60 * (SECOND_NS // 10)
        assert bill[rfc3339(start_ns), "acme"]["status"]["sessions"] == 61

        # The pod drains and goes while the collector is away.
        fake.spend(Account.DRAIN, time.time_ns())
        fake.seal()
        await eventually(lambda: _more_than(fake, len(fake.boot.links) - 1), timeout_s=30)
        await asyncio.to_thread(collector.kill)
        ended_ns = time.time_ns() // SECOND_NS * SECOND_NS + SECOND_NS
        lives = ("containerd://c1", start_ns, ended_ns)
        await asyncio.to_thread(set_status, server, identity, ADDRESS, lives)
        collector.start()
    await eventually(lambda: _ended(collector), timeout_s=30)
    answer = server.call("DELETE", f"/api/v1/namespaces/{namespace}/pods/{identity.pod}", {"gracePeriodSeconds": 0})
    assert answer.code == 200
    told = collector.accounts("--check")
    assert told.returncode == 0, told.stdout + told.stderr


async def _more_than(fake: FakeWorker, seq: int) -> bool:
    return fake.boot.acknowledged_seq > seq


async def _ended(collector: CollectorProcess) -> bool:
    told = json.loads((await asyncio.to_thread(collector.accounts, "-o", "json")).stdout)
    return any(row["accounts"]["drain"] > 0 for row in told["lines"])


async def test_a_pod_without_its_service_is_not_asked_and_a_namespace_that_goes_harms_nobody(
    cluster: Cluster, server: Server, namespace: str, collector: CollectorProcess
) -> None:
    start_ns = two_minutes_ago()
    identity, fake = await a_worker(cluster, server, namespace, start_ns)
    foreign = replace(identity, pod="somebody-elses", service_uid="00000000-0000-0000-0000-000000000000")
    await asyncio.to_thread(create_pod, server, foreign, ADDRESS, ("containerd://c2", start_ns, None))
    async with answering(fake, ADDRESS):
        collector.start()
        await eventually(lambda: finals_of(cluster, namespace, [start_ns]), timeout_s=60)
        assert "belongs to another InferenceService" in collector.log.read_text()
        told = json.loads(collector.accounts("-o", "json").stdout)
        assert {row["pod"] for row in told["lines"]} == {identity.pod}

        await cluster.delete(INFERENCE_SERVICES, "smollm2", namespace)
        server.call("DELETE", f"/api/v1/namespaces/{namespace}")
        await eventually(lambda: _says(collector, "the namespace is gone; the ledger keeps its facts"), timeout_s=90)
        assert _get(collector.url + "/readyz")[0] == 200
        assert collector.accounts("--check").returncode == 0


async def _says(collector: CollectorProcess, sentence: str) -> bool:
    return sentence in collector.log.read_text()


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
