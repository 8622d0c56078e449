"""Days of hours that were billed in other ways than one price of one version: they add up, and the CRD holds it all."""

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster.layout import REPOSITORY
from gpumeter_operator.adapters.ledger import rollups
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.tariff import BillingMode, Terms
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import MINUTE_NS, Granularity, month_of
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, open_ledger, started, worker
from rigs.pricing import SERVICE, at, plan, rate

MODES = {
    "idle time to tenants": (Terms(), {"idlePayer": "tenant"}),
    "idle time to the owner": (Terms(owner="landlord"), {"idlePayer": "owner"}),
    "standard rates": (Terms(BillingMode.STANDARD_RATE), {"idlePayer": "platform"}),
}
TOKENS = [{"model": "smollm2", "perThousandPromptTokens": "0.37", "perThousandCompletionTokens": "2.11"}]
ADDED = ("amount", "amountDue", "measuredAmount", "standardRateDifference", "idleGpuNanoseconds", "gpuNanoseconds")
Schema = dict[str, Any]


def day_of_three_hours(folder: Path, mode: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The hours' reports and those of the day and the month; a version that doubles the price is seen at 11:29:30."""
    terms, changes = MODES[mode]
    ledger = open_ledger(folder / "ledger.db", Granularity.HOUR)
    closer, newest = Closer(ledger, 600 * MINUTE_NS), ""
    fake = FakeWorker(worker(), START_NS)
    for hour in range(3):
        fake.spend(Account.IDLE, at(60 * hour + 7))
        fake.serve(f"s-{hour}", "acme", at(60 * hour + 38), batch=3)
        fake.serve(f"t-{hour}", "beta", at(60 * hour + 41))
    fake.spend(Account.HOST_GAP, at(180))
    fake.seal()
    for version, (price, minute) in enumerate((("1.234567", 0), ("2.5", 89.5)), start=1):
        spec = plan(rate(price), standardRates=TOKENS, **changes)
        newest = ledger.keep_plan("default", version, spec, at(minute))
        ledger.observe(fake.identity, [started("c", START_NS)], at(minute))
        closer.close_all(Pricing({}, {"default": newest}, {SERVICE: terms}), at(minute + 0.1))
    ledger.observe(fake.identity, [ended("c", at(180)), gone(at(180))], at(180))
    ledger.take(fake.identity, fake.page("boot-1", 0), at(180))
    ledger.settle(fake.identity.worker_uid, at(180))
    after = month_of(START_NS + 1).end_ns + 24 * 60 * MINUTE_NS
    closer.close_all(Pricing({}, {"default": newest}, {SERVICE: terms}), after)
    assert audit(ledger, SERVICE) == [], "hours are folded and days are summed again to the same bytes"
    sums = [
        json.loads(body)
        for granularity in (Granularity.DAY, Granularity.MONTH)
        for _, _, body in rollups.rollup_bodies(ledger.engine, SERVICE, granularity, 0)
    ]
    hours = list(finals(ledger).values())
    ledger.close()
    return hours, sums


@pytest.mark.parametrize("mode", MODES)
def test_a_day_and_a_month_are_the_exact_sums_of_their_hours(tmp_path: Path, mode: str) -> None:
    hours, sums = day_of_three_hours(tmp_path, mode)
    tenants = {"acme", "beta", PLATFORM} | ({"landlord"} if mode == "idle time to the owner" else set())
    assert sorted(each["spec"]["tenant"] for each in sums) == sorted([*tenants, *tenants])
    for whole in sums:
        own = [each["status"] for each in hours if each["spec"]["tenant"] == whole["spec"]["tenant"]]
        assert len(own) == 3
        for name in ADDED:
            if any(name in status for status in own):
                expected = sum(Decimal(status.get(name, status["amount"] if "Amount" in name else 0)) for status in own)
                assert Decimal(whole["status"].get(name, 0)) == expected, name
            else:
                assert name not in whole["status"]
        versions = {each["version"] for each in whole["status"]["pricePlans"]}
        assert versions == {1, 2}
    of_day = {each["spec"]["tenant"]: each["status"] for each in sums if each["spec"]["period"]["granularity"] == "Day"}
    total = sum(Decimal(status["amount"]) for status in of_day.values())
    of_allocated = (Decimal("1.234567") + Decimal("2.5")) * 90 / 60
    assert abs(total - of_allocated) < Decimal("1e-10"), "all bills together are the price of the allocated time"
    if mode == "idle time to tenants":
        assert int(of_day["acme"]["idleGpuNanoseconds"]) + int(of_day["beta"]["idleGpuNanoseconds"]) > 0
    if mode == "standard rates":
        assert of_day["acme"]["measuredAmount"] != of_day["acme"]["amount"]
        assert of_day[PLATFORM]["standardRateDifference"] not in ("", "0")


@pytest.mark.parametrize("file", ["crds/usagereports.yaml", "charts/gpumeter/crds/usagereports.yaml"])
def test_the_schema_of_reports_has_every_field_that_reports_carry(tmp_path: Path, file: str) -> None:
    """What it has not the API server would drop without a word."""
    crd = yaml.safe_load((REPOSITORY / file).read_text())
    (version,) = crd["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    for number, mode in enumerate(MODES):
        folder = tmp_path / str(number)
        folder.mkdir()
        hours, sums = day_of_three_hours(folder, mode)
        for report in (*hours, *sums):
            for part in ("spec", "status"):
                assert list(unknown(report[part], schema["properties"][part], part)) == []


def unknown(value: Any, schema: Schema, path: str) -> Iterator[str]:
    """The paths of fields that a schema does not have."""
    if isinstance(value, list):
        for each in value:
            yield from unknown(each, schema["items"], f"{path}[]")
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    for name, inner in value.items():
        of_name = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        if of_name is None:
            yield f"{path}.{name}"
        elif isinstance(of_name, dict):
            yield from unknown(inner, of_name, f"{path}.{name}")
