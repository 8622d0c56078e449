"""The chart's policy for UsageReports on a real API server: who may write one, and who may delete a Final one."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from apiserver import Answer, Run, Server, collection, eventually
from charts import NAMESPACE, rendered

COLLECTOR = f"system:serviceaccount:{NAMESPACE}:gpumeter-collector"
KEEPERS = "bill-keepers"
NAME = "smollm2-acme-20261121t14"
REPORT: dict[str, Any] = {
    "apiVersion": "gpumeter.io/v1alpha1",
    "kind": "UsageReport",
    "metadata": {"name": NAME, "labels": {"app.kubernetes.io/managed-by": "gpumeter"}},
    "spec": {
        "tenant": "acme",
        "serviceRef": {"name": "smollm2"},
        "period": {"start": "2026-11-21T14:00:00Z", "end": "2026-11-21T15:00:00Z", "granularity": "Hour"},
    },
}
KINDS = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")


def its_own(*values: str) -> list[dict[str, Any]]:
    """The policy for reports and its binding, as the chart renders them."""
    return [one for one in rendered(*values) if one["kind"] in KINDS and "usage-reports" in one["metadata"]["name"]]


@pytest.fixture(scope="module", autouse=True)
def policy(server: Server, kubectl: Run) -> Iterator[None]:
    """The policy as the chart renders it; it goes again, because other tests write reports as administrators."""
    found = its_own(f"billing.deleterGroups={{{KEEPERS}}}")
    assert [one["kind"] for one in found] == list(KINDS)
    bundle = json.dumps({"apiVersion": "v1", "kind": "List", "items": found})
    kubectl("apply", "-f", "-", stdin=bundle)
    kubectl(
        "create", "clusterrolebinding", "gpumeter-policy-tests", "--clusterrole=cluster-admin", f"--user={COLLECTOR}"
    )
    # The policy holds a moment after it was created.
    probe = {**REPORT, "metadata": {"name": "probe"}}
    eventually(lambda: server.create("default", "usagereports", probe, dry=True).code == 403, "the policy holds")
    yield
    kubectl("delete", "clusterrolebinding", "gpumeter-policy-tests")
    kubectl("delete", "-f", "-", stdin=bundle)
    eventually(lambda: server.create("default", "usagereports", probe, dry=True).code == 201, "the policy is gone")


def path(namespace: str, rest: str = "") -> str:
    return f"{collection(namespace, 'usagereports')}/{NAME}{rest}"


def a_report(server: Server, namespace: str, phase: str = "Final", **metadata: Any) -> dict[str, Any]:
    """A report as the collector leaves it."""
    manifest = {**REPORT, "metadata": {**REPORT["metadata"], **metadata}}
    made = server.call("POST", collection(namespace, "usagereports"), manifest, user=COLLECTOR)
    assert made.code == 201, made.body
    whole = {**made.body, "status": {"phase": phase, "gpuNanoseconds": "5"}}
    done = server.call("PUT", path(namespace, "/status"), whole, user=COLLECTOR)
    assert done.code == 200, done.body
    return done.body


def refused(answer: Answer) -> str:
    assert answer.code == 403, answer.body
    message: str = answer.body["message"]
    return message


def test_nobody_but_the_collector_writes_a_report(server: Server, namespace: str) -> None:
    told = refused(server.create(namespace, "usagereports", REPORT))
    assert f"UsageReport {NAME} is written by {COLLECTOR} and by nobody else, because it is a bill" in told
    report = a_report(server, namespace, "Open")
    forged = {**report, "status": {**report["status"], "gpuNanoseconds": "6"}}
    assert "by nobody else" in refused(server.replace(namespace, "usagereports", forged, status=True))
    labelled = {**report, "metadata": {**report["metadata"], "labels": {}}}
    assert "by nobody else" in refused(server.replace(namespace, "usagereports", labelled))
    held = {**report, "metadata": {**report["metadata"], "finalizers": ["example.com/mine"]}}
    assert "by nobody else" in refused(server.replace(namespace, "usagereports", held)), "it would hold its namespace"
    assert server.replace(namespace, "usagereports", report).code == 200, "what changes nothing is no edit"


def test_a_final_report_is_not_deleted_and_the_refusal_says_who_may(server: Server, namespace: str) -> None:
    a_report(server, namespace)
    told = refused(server.call("DELETE", path(namespace)))
    assert (
        f"UsageReport {NAME} is Final and stays until the collector removes it (billing.keepDays) or its namespace is "
        f"deleted; only members of {KEEPERS} may delete it before."
    ) in told
    assert refused(server.call("DELETE", collection(namespace, "usagereports"))), "all at once neither"
    assert server.call("GET", path(namespace)).code == 200


def test_a_report_that_is_not_final_may_go_because_it_is_written_again(server: Server, namespace: str) -> None:
    a_report(server, namespace, "Open")
    assert server.call("DELETE", path(namespace)).code == 200


def test_the_collector_and_members_of_the_named_group_may_delete_a_final_report(
    server: Server, kubectl: Run, namespace: str
) -> None:
    a_report(server, namespace)
    assert server.call("DELETE", path(namespace), user=COLLECTOR).code == 200
    a_report(server, namespace)
    who = ("--as=auditor", f"--as-group={KEEPERS}", "--as-group=system:masters")
    kubectl("delete", "usagereports.gpumeter.io", NAME, "-n", namespace, *who)
    assert server.call("GET", path(namespace)).code == 404


def test_a_namespace_never_hangs_on_a_bill(server: Server, kubectl: Run, namespace: str) -> None:
    a_report(server, namespace)
    assert server.call("DELETE", f"/api/v1/namespaces/{namespace}").code == 200
    # The control plane of these tests has no controllers: what the namespace's one does is done in its name.
    who = ("--as=system:serviceaccount:kube-system:namespace-controller", "--as-group=system:masters")
    kubectl("delete", "usagereports.gpumeter.io", "--all", "-n", namespace, *who)
    eventually(lambda: server.call("GET", path(namespace)).code == 404, "the report is gone")


def test_a_report_deleted_in_the_foreground_lets_its_finalizer_go(server: Server, kubectl: Run, namespace: str) -> None:
    """The API server puts the garbage collector's finalizer there by itself; whoever takes it off changes no bill."""
    a_report(server, namespace, "Open")
    kubectl("delete", "usagereports.gpumeter.io", NAME, "-n", namespace, "--cascade=foreground", "--wait=false")

    def released() -> bool:
        found = server.call("GET", path(namespace))
        if found.code == 404:
            return True
        freed = {**found.body, "metadata": {**found.body["metadata"], "finalizers": []}}
        return server.replace(namespace, "usagereports", freed).code == 200

    eventually(released, "the finalizer is taken off")
    eventually(lambda: server.call("GET", path(namespace)).code == 404, "the report is gone")


def test_without_a_group_the_refusal_says_that_nobody_may(server: Server, kubectl: Run, namespace: str) -> None:
    found = its_own()[0]
    done = kubectl("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(found))
    assert done.returncode == 0, done.stderr
    assert "names no group in billing.deleterGroups" in json.dumps(found)
    stored = json.loads(kubectl("get", "validatingadmissionpolicy", found["metadata"]["name"], "-o", "json").stdout)
    assert (stored.get("status", {}).get("typeChecking") or {}).get("expressionWarnings") in (None, [])
