"""The chart's policy for spec.pricing.owner on a real API server: whom a service may name as who pays for idle time."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from apiserver import Run, Server, eventually
from charts import rendered


def a_service(owner: str | None = None, *, replicas: int = 1) -> dict[str, Any]:
    pricing = {} if owner is None else {"pricing": {"owner": owner}}
    return {
        "apiVersion": "gpumeter.io/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "s2"},
        "spec": {"model": {"uri": "pvc://models/a"}, "replicas": replicas, **pricing},
    }


@pytest.fixture(scope="module", autouse=True)
def policy(server: Server, kubectl: Run) -> Iterator[None]:
    """The policy as the chart renders it; it goes again, because other tests name owners as they like."""
    found = [one for one in rendered() if "service-owners" in one["metadata"]["name"]]
    assert [one["kind"] for one in found] == ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]
    bundle = json.dumps({"apiVersion": "v1", "kind": "List", "items": found})
    kubectl("apply", "-f", "-", stdin=bundle)
    named = a_service("acme")
    eventually(lambda: server.create("default", "inferenceservices", named, dry=True).code == 403, "the policy holds")
    yield
    kubectl("delete", "-f", "-", stdin=bundle)
    eventually(lambda: server.create("default", "inferenceservices", named, dry=True).code == 201, "the policy is gone")


def label(server: Server, namespace: str, owner: str | None) -> None:
    path = f"/api/v1/namespaces/{namespace}"
    found = server.call("GET", path).body
    found["metadata"]["labels"].pop("gpumeter.io/owner", None)
    if owner is not None:
        found["metadata"]["labels"]["gpumeter.io/owner"] = owner
    assert server.call("PUT", path, found).code == 200


def test_a_tenant_whose_namespace_it_is_not_cannot_be_named_as_owner(server: Server, namespace: str) -> None:
    refused = server.create(namespace, "inferenceservices", a_service("acme"))
    assert refused.code == 403
    assert (
        f"spec.pricing.owner is acme, who would pay for idle time, and the namespace {namespace} is not labelled as "
        f"that tenant's; an administrator may do it: kubectl label namespace {namespace} gpumeter.io/owner=acme"
    ) in refused.body["message"]
    made = server.create(namespace, "inferenceservices", a_service())
    assert made.code == 201, "without an owner nobody is charged"
    made.body["spec"]["pricing"] = {"owner": "acme"}
    assert server.replace(namespace, "inferenceservices", made.body).code == 403, "nor later"


def test_the_tenant_of_the_namespaces_label_may_be_named_and_nobody_else(server: Server, namespace: str) -> None:
    label(server, namespace, "acme")
    see = "the API server has seen the label"
    named = a_service("acme")
    eventually(lambda: server.create(namespace, "inferenceservices", named, dry=True).code == 201, see)
    assert server.create(namespace, "inferenceservices", a_service("beta"), dry=True).code == 403
    made = server.create(namespace, "inferenceservices", named)
    assert made.code == 201, made.body

    label(server, namespace, None)
    unseen = {**named, "metadata": {"name": "another"}}
    eventually(lambda: server.create(namespace, "inferenceservices", unseen, dry=True).code == 403, "it is gone")
    made.body["spec"]["replicas"] = 0
    kept = server.replace(namespace, "inferenceservices", made.body)
    assert kept.code == 200, "what stands there can still be edited and stopped"
    kept.body["spec"]["pricing"]["owner"] = "beta"
    assert server.replace(namespace, "inferenceservices", kept.body).code == 403


def test_the_api_server_has_nothing_to_say_against_the_policys_types(server: Server, kubectl: Run) -> None:
    name = next(one["metadata"]["name"] for one in rendered() if "service-owners" in one["metadata"]["name"])

    def stored() -> dict[str, Any]:
        told = kubectl("get", "validatingadmissionpolicy", name, "-o", "json").stdout
        return dict(json.loads(told).get("status", {}))

    assert (stored().get("typeChecking") or {}).get("expressionWarnings") in (None, [])
