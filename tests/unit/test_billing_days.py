"""Days and months, from the hours to frozen sums: what they say, and when."""

import json
import random
from pathlib import Path
from typing import Any

from gpumeter_operator.adapters.ledger import rollups
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import DAY_NS, MINUTE_NS, SECOND_NS, Granularity, day_of
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, ended, gone, open_ledger, started, worker

SERVICE = ("team-a", "smollm2")
HOUR_NS = 60 * MINUTE_NS
DAY = day_of(START_NS + 1)
GRACE_NS = 10 * MINUTE_NS


def lived(ledger: Ledger, number: int, hours: int, seed: int = 1) -> FakeWorker:
    """A pod that ran for some hours from START_NS, with a session of a tenant now and then; all of it is collected."""
    identity, random_ = worker(number), random.Random(seed)
    fake = FakeWorker(identity, START_NS)
    for hour in range(hours):
        fake.spend(Account.IDLE, START_NS + hour * HOUR_NS + random_.randrange(1, 50 * MINUTE_NS))
        tenant = random_.choice(("acme", "beta-corp"))
        fake.serve(f"s-{number}-{hour}", tenant, fake.frontier_ns + random_.randrange(1, 9 * MINUTE_NS), batch=3)
    fake.spend(Account.DRAIN, START_NS + hours * HOUR_NS)
    fake.seal()
    end_ns = START_NS + hours * HOUR_NS
    ledger.observe(identity, [started("c", START_NS), ended("c", end_ns), gone(end_ns)], end_ns)
    ledger.take(identity, fake.page("boot-1", 0, 10**6), end_ns)
    return fake


def closed(ledger: Ledger, now_ns: int, spec: bytes = b"") -> dict[str, dict[str, Any]]:
    """What the round at this time publishes, by name."""
    hashes = {"default": ledger.keep_plan("default", 1, spec, START_NS)} if spec else {}
    found = Closer(ledger, GRACE_NS).close_all(Pricing({}, hashes), now_ns)
    return {each["metadata"]["name"]: each for each in found}


def days(ledger: Ledger, granularity: Granularity = Granularity.DAY) -> dict[tuple[int, str], dict[str, Any]]:
    """The Final days or months that the ledger keeps."""
    found = rollups.rollup_bodies(ledger.engine, SERVICE, granularity, 0)
    return {(end_ns, tenant): json.loads(body) for end_ns, tenant, body in found}


def hours_of(ledger: Ledger) -> list[dict[str, Any]]:
    return [json.loads(body) for _, _, body in ledger.final_reports(*SERVICE)]


SPEC = b'{"currency":"USD","rates":[{"gpuClass":"h100","perGpuHour":"1.234567"}]}'


def test_a_day_is_the_exact_sum_of_its_hours_amounts_and_accounts_included(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db", Granularity.HOUR)
    for number in (1, 2):
        lived(ledger, number, 5, seed=number)
    closed(ledger, DAY.end_ns + HOUR_NS, SPEC)
    found, parts = days(ledger), hours_of(ledger)
    assert {tenant for _, tenant in found} == {"acme", "beta-corp", PLATFORM}
    for (end_ns, tenant), day in found.items():
        own = [each for each in parts if each["spec"]["tenant"] == tenant]
        assert end_ns == DAY.end_ns
        for name in ("gpuNanoseconds", "prefillGpuNanoseconds", "decodeGpuNanoseconds", "batchNanoseconds"):
            assert int(day["status"][name]) == sum(int(each["status"][name]) for each in own)
        from decimal import Decimal

        assert Decimal(day["status"]["amount"]) == sum(Decimal(each["status"]["amount"]) for each in own)
        assert day["status"]["sessions"] == sum(each["status"]["sessions"] for each in own)
        assert day["status"]["recordCount"] == sum(each["status"]["recordCount"] for each in own)
    whole = found[DAY.end_ns, PLATFORM]
    assert int(whole["status"]["accounts"]["allocated"]) == 2 * 5 * HOUR_NS
    assert sum(int(day["status"]["gpuNanoseconds"]) for day in found.values()) == 2 * 5 * HOUR_NS
    assert whole["metadata"]["name"] == "smollm2-platform-20261121"
    assert whole["metadata"]["labels"]["gpumeter.io/granularity"] == "Day"
    assert whole["status"]["completeness"] == {
        "periods": 5,
        "completePeriods": 5,
        "expectedWorkers": 2,
        "reportedWorkers": 2,
        "missing": [],
    }
    assert {each["type"]: each["status"] for each in whole["status"]["conditions"]} == dict.fromkeys(
        ("Complete", "Reconciled", "Measured", "Priced"), "True"
    )
    assert audit(ledger, SERVICE) == []
    _ = SECOND_NS, DAY_NS
