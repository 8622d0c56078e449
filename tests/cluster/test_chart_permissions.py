"""What each account of the chart may do, as the API server itself tells it: the whole list, so that none can grow."""

import json

import pytest

from apiserver import Run, Server, eventually
from charts import NAMESPACE, rendered

ELSEWHERE = "default"
READ = ("get", "list", "watch")
WRITE = ("create", "patch")
GPUMETER = "gpumeter.io"

EVERYWHERE: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "gpumeter-operator": {
        (GPUMETER, "inferenceservices"): (*READ, "patch"),
        (GPUMETER, "inferenceservices/status"): ("patch",),
        (GPUMETER, "inferenceservices/finalizers"): ("update",),
        (GPUMETER, "priceplans"): ("list", "watch"),
        ("apps", "deployments"): (*READ, *WRITE, "delete"),
        ("", "services"): (*READ, *WRITE),
        ("", "serviceaccounts"): (*READ, *WRITE),
        ("policy", "poddisruptionbudgets"): (*READ, *WRITE),
        ("networking.k8s.io", "networkpolicies"): (*READ, *WRITE, "delete"),
        ("monitoring.coreos.com", "podmonitors"): (*READ, *WRITE, "delete"),
        ("", "secrets"): WRITE,
        ("", "pods"): ("list", "watch", "patch"),
        ("", "events"): WRITE,
        ("apiextensions.k8s.io", "customresourcedefinitions"): ("list", "watch"),
    },
    "gpumeter-collector": {
        ("", "pods"): READ,
        (GPUMETER, "inferenceservices"): READ,
        (GPUMETER, "priceplans"): READ,
        (GPUMETER, "usagereports"): ("get", "list", *WRITE, "delete"),
        (GPUMETER, "usagereports/status"): ("patch",),
        (GPUMETER, "inferenceservices/status"): ("patch",),
        (GPUMETER, "priceplans/status"): ("patch",),
    },
    "gpumeter-gateway": {
        (GPUMETER, "inferenceservices"): READ,
        ("discovery.k8s.io", "endpointslices"): READ,
    },
}
IN_THE_RELEASE = {
    "gpumeter-gateway": {("", "secrets"): READ, ("", "events"): ("create",)},
    "gpumeter-operator": {
        ("discovery.k8s.io", "endpointslices"): ("list", "watch"),
        ("coordination.k8s.io", "leases"): ("create", "get", "patch"),
    },
}

MAY = [
    ("gpumeter-operator", "patch", "deployments.apps", ELSEWHERE),
    ("gpumeter-operator", "create", "secrets", ELSEWHERE),
    ("gpumeter-collector", "create", "usagereports.gpumeter.io", ELSEWHERE),
    ("gpumeter-collector", "delete", "usagereports.gpumeter.io", ELSEWHERE),
    ("gpumeter-operator", "watch", "endpointslices.discovery.k8s.io", NAMESPACE),
    ("gpumeter-gateway", "list", "secrets", NAMESPACE),
    ("gpumeter-gateway", "create", "events", NAMESPACE),
    ("gpumeter-gateway", "watch", "endpointslices.discovery.k8s.io", ELSEWHERE),
]
MAY_NOT = [
    ("gpumeter-operator", "get", "secrets", ELSEWHERE),
    ("gpumeter-operator", "list", "secrets", NAMESPACE),
    ("gpumeter-operator", "delete", "inferenceservices.gpumeter.io", ELSEWHERE),
    ("gpumeter-operator", "patch", "usagereports.gpumeter.io", ELSEWHERE),
    ("gpumeter-operator", "create", "pods", ELSEWHERE),
    ("gpumeter-operator", "delete", "pods", ELSEWHERE),
    ("gpumeter-operator", "list", "endpointslices.discovery.k8s.io", ELSEWHERE),
    ("gpumeter-operator", "create", "leases.coordination.k8s.io", ELSEWHERE),
    ("gpumeter-operator", "patch", "leases.coordination.k8s.io", NAMESPACE),
    ("gpumeter-operator", "create", "clusterrolebindings.rbac.authorization.k8s.io", ELSEWHERE),
    ("gpumeter-collector", "get", "secrets", NAMESPACE),
    ("gpumeter-collector", "patch", "inferenceservices.gpumeter.io", ELSEWHERE),
    ("gpumeter-collector", "patch", "priceplans.gpumeter.io", ELSEWHERE),
    ("gpumeter-collector", "delete", "pods", ELSEWHERE),
    ("gpumeter-collector", "deletecollection", "usagereports.gpumeter.io", ELSEWHERE),
    ("gpumeter-gateway", "get", "secrets", ELSEWHERE),
    ("gpumeter-gateway", "create", "secrets", NAMESPACE),
    ("gpumeter-gateway", "create", "events", ELSEWHERE),
    ("gpumeter-gateway", "patch", "events", NAMESPACE),
    ("gpumeter-gateway", "get", "usagereports.gpumeter.io", ELSEWHERE),
    ("gpumeter-gateway", "get", "pods", ELSEWHERE),
]


def user(account: str, namespace: str = NAMESPACE) -> str:
    return f"system:serviceaccount:{namespace}:{account}"


def rights(server: Server, account: str, namespace: str) -> set[tuple[str, str, str]]:
    """(API group, resource, verb) of all that an account may do in a namespace, less what every account may."""
    return told(server, user(account), namespace) - told(server, user("default", ELSEWHERE), namespace)


def told(server: Server, who: str, namespace: str) -> set[tuple[str, str, str]]:
    review = {
        "kind": "SelfSubjectRulesReview",
        "apiVersion": "authorization.k8s.io/v1",
        "spec": {"namespace": namespace},
    }
    answer = server.call("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", review, user=who)
    assert answer.code == 201, answer.body
    return {
        (group, resource, verb)
        for rule in answer.body["status"]["resourceRules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def flat(table: dict[tuple[str, str], tuple[str, ...]]) -> set[tuple[str, str, str]]:
    return {(group, resource, verb) for (group, resource), verbs in table.items() for verb in verbs}


@pytest.mark.parametrize("account", EVERYWHERE)
def test_an_account_may_do_this_and_nothing_else(server: Server, release: str, account: str) -> None:
    assert rights(server, account, ELSEWHERE) == flat(EVERYWHERE[account])
    both = flat(EVERYWHERE[account]) | flat(IN_THE_RELEASE.get(account, {}))
    assert rights(server, account, release) == both


def can_i(kubectl: Run, who: str, verb: str, resource: str, namespace: str) -> str:
    resource, _, subresource = resource.partition("/")
    arguments = ["auth", "can-i", verb, resource, "-n", namespace, f"--as={who}"]
    arguments += [f"--subresource={subresource}"] if subresource else []
    return kubectl(*arguments, check=False).stdout.strip()


@pytest.mark.parametrize("question", MAY, ids=" ".join)
def test_kubectl_agrees_on_what_is_allowed(release: str, kubectl: Run, question: tuple[str, str, str, str]) -> None:
    account, verb, resource, namespace = question
    assert can_i(kubectl, user(account), verb, resource, namespace) == "yes"


@pytest.mark.parametrize("question", MAY_NOT, ids=" ".join)
def test_kubectl_agrees_on_what_is_forbidden(release: str, kubectl: Run, question: tuple[str, str, str, str]) -> None:
    account, verb, resource, namespace = question
    assert can_i(kubectl, user(account), verb, resource, namespace) == "no"


def test_the_uninstall_check_may_only_look_for_services(server: Server, release: str, kubectl: Run) -> None:
    hooks = [
        each
        for each in rendered()
        if "helm.sh/hook" in each["metadata"].get("annotations", {}) and each["kind"] != "Job"
    ]
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": hooks})
    kubectl("apply", "-n", release, "-f", "-", stdin=manifest)
    try:
        expected = {(GPUMETER, "inferenceservices", "list")}
        assert rights(server, "gpumeter-uninstall-check", ELSEWHERE) == expected
    finally:
        kubectl("delete", "-n", release, "-f", "-", stdin=manifest)


PEOPLE = [
    ("view", "list", "usagereports.gpumeter.io", "yes"),
    ("view", "get", "inferenceservices.gpumeter.io", "yes"),
    ("view", "create", "inferenceservices.gpumeter.io", "no"),
    ("edit", "create", "inferenceservices.gpumeter.io", "yes"),
    ("edit", "patch", "inferenceservices.gpumeter.io/scale", "yes"),
    ("edit", "patch", "usagereports.gpumeter.io", "no"),
    ("edit", "delete", "usagereports.gpumeter.io", "no"),
    ("admin", "create", "usagepackages.gpumeter.io", "no"),
    ("admin", "patch", "usagereports.gpumeter.io/status", "no"),
]


@pytest.mark.parametrize("case", PEOPLE, ids=" ".join)
def test_people_with_the_built_in_roles_use_services_and_cannot_write_bills(
    release: str, namespace: str, kubectl: Run, case: tuple[str, str, str, str]
) -> None:
    role, verb, resource, answer = case
    kubectl("create", "rolebinding", "person", f"--clusterrole={role}", "--user=ann", "-n", namespace)
    eventually(
        lambda: can_i(kubectl, "ann", "list", "usagereports.gpumeter.io", namespace) == "yes",
        "the chart's role is aggregated into the built-in ones",
    )
    assert can_i(kubectl, "ann", verb, resource, namespace) == answer
