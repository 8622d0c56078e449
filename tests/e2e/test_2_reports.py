"""The frozen bill on a real cluster: nobody edits or deletes it, and the ledger's own commands agree with it."""

import json
from decimal import Decimal

import pytest

from demo import steps
from demo.kube import DemoFailed
from demo.manifests import RELEASE, RELEASE_NAMESPACE
from e2e.story import TEAM, Evidence

COLLECTOR = ("-n", RELEASE_NAMESPACE, "exec", f"deployment/{RELEASE}-collector", "--", "gpumeter")
REPORTS = "usagereports.gpumeter.io"


@pytest.fixture(scope="module")
def final(evidence: Evidence) -> str:
    """The name of a tenant's Final report."""
    return next(
        report["metadata"]["name"]
        for report in evidence.reports
        if report["status"]["phase"] == "Final" and report["spec"]["tenant"] != "_platform"
    )


def refusal(release: steps.Demo, *arguments: str) -> str:
    """What kubectl says; the test fails where it succeeds."""
    with pytest.raises(DemoFailed) as refused:
        release.kube.run("-n", TEAM, *arguments)
    return refused.value.evidence


def test_a_final_report_cannot_be_edited_and_the_refusal_says_why(release: steps.Demo, final: str):
    cheaper = ("--type=merge", "-p", json.dumps({"status": {"gpuNanoseconds": "1"}}))
    told = refusal(release, "patch", REPORTS, final, "--subresource=status", *cheaper)
    assert "A Final usage report cannot be changed; book a correction as an adjustment" in told
    other = ("--type=merge", "-p", json.dumps({"spec": {"tenant": "somebody-else"}}))
    assert "cannot be changed" in refusal(release, "patch", REPORTS, final, *other)
    labelled = ("--type=merge", "-p", json.dumps({"metadata": {"labels": {"gpumeter.io/tenant": "somebody-else"}}}))
    assert "because it is a bill" in refusal(release, "patch", REPORTS, final, *labelled)


def test_a_final_report_cannot_be_deleted_and_the_refusal_says_why(release: steps.Demo, final: str):
    told = refusal(release, "delete", REPORTS, final)
    assert f"{final} is Final and stays until" in told
    assert release.kube.get("-n", TEAM, REPORTS, final)["status"]["phase"] == "Final"


def test_the_ledger_recomputes_itself_and_its_signatures_hold(release: steps.Demo, evidence: Evidence):
    told = json.loads(release.kube.run(*COLLECTOR, "verify", "--json", timeout_s=300))
    print(json.dumps(told)[:600])
    assert told["verified"], told["findings"]
    assert told["lookedAt"]["reportsFoldedAnew"] >= len(evidence.reports)
    assert told["lookedAt"]["digests"] > 0


def test_usage_by_tenant_is_what_the_reports_say(release: steps.Demo, evidence: Evidence):
    told = json.loads(release.kube.run(*COLLECTOR, "usage", "--by", "tenant", "-n", TEAM, "-o", "json"))
    reported: dict[str, tuple[int, Decimal]] = {}
    for report in evidence.reports:
        tenant, status = report["spec"]["tenant"], report["status"]
        if tenant != "_platform":
            gpu_ns, amount = reported.get(tenant, (0, Decimal(0)))
            reported[tenant] = (gpu_ns + int(status["gpuNanoseconds"]), amount + Decimal(status.get("amount", "0")))
    print(json.dumps(told)[:600])
    found = {line["tenant"]: (int(line["gpuNanoseconds"]), Decimal(line["amounts"]["USD"])) for line in told["usage"]}
    assert found == reported
