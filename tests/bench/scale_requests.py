"""How many requests the operator makes, counted by the API server itself, kind by kind.

Owns the FlowSchemas that sort the operator's requests and the reading of their counters: each request of its service
account is counted under the one schema that it fits, at the priority that every service account has. Changes nothing in
how a request is served. Does not know what the requests are for.
"""

import http.client
import re
import time
from typing import Any

from apiserver import Server

WRITES = ("create", "update", "patch", "delete", "deletecollection")
READS = ("get", "list", "watch")
# name -> verbs, API groups, resources. A request counts where it fits first.
KINDS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "write status": (WRITES, "gpumeter.io", ("inferenceservices/status",)),
    "write InferenceService": (WRITES, "gpumeter.io", ("inferenceservices",)),
    "write Secret": (WRITES, "", ("secrets",)),
    "write ServiceAccount": (WRITES, "", ("serviceaccounts",)),
    "write Service": (WRITES, "", ("services",)),
    "write PodDisruptionBudget": (WRITES, "policy", ("poddisruptionbudgets",)),
    "write Deployment": (WRITES, "apps", ("deployments",)),
    "write Event": (WRITES, "*", ("events",)),
    "write other": (WRITES, "*", ("*",)),
    "get": (("get",), "*", ("*",)),
    "list or watch": (("list", "watch"), "*", ("*",)),
}
_COUNTER = re.compile(
    r'^apiserver_flowcontrol_dispatched_requests_total\{flow_schema="bench-([a-z-]+)",[^}]*\} ([0-9.e+]+)$',
    re.MULTILINE,
)


def sort_requests_of(server: Server, namespace: str, account: str) -> None:
    """Make the schemas and wait until the API server sorts by them."""
    for precedence, name in enumerate(KINDS, start=1_000):
        path = "/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas"
        made = server.call("POST", path, _schema(name, precedence, namespace, account))
        if made.code != 201:
            raise RuntimeError(f"The API server refuses the FlowSchema of '{name}': {made.body}")
    user, end_s = f"system:serviceaccount:{namespace}:{account}", time.monotonic() + 30
    while counted(server)["get"] == 0:
        if time.monotonic() > end_s:
            raise RuntimeError("The API server does not count by the bench's FlowSchemas.")
        server.call("GET", "/api/v1/namespaces/default/services/kubernetes", user=user)
        time.sleep(0.2)


def counted(server: Server) -> dict[str, int]:
    """Requests so far, by kind."""
    status, text = _metrics(server)
    if status != 200:
        raise RuntimeError(f"The API server does not tell its metrics: {text[:200]}")
    found = dict.fromkeys(KINDS, 0)
    names = {_dashed(name): name for name in KINDS}
    for dashed, value in _COUNTER.findall(text):
        found[names[dashed]] += int(float(value))
    return found


def since(former: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """What was asked between two counts, without the kinds that were not."""
    return {name: now[name] - former[name] for name in now if now[name] != former[name]}


def _dashed(name: str) -> str:
    return name.lower().replace(" ", "-")


def _schema(name: str, precedence: int, namespace: str, account: str) -> dict[str, Any]:
    verbs, group, resources = KINDS[name]
    rule = {"verbs": list(verbs), "apiGroups": [group], "resources": list(resources), "namespaces": ["*"]}
    subject = {"kind": "ServiceAccount", "serviceAccount": {"namespace": namespace, "name": account}}
    return {
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
        "kind": "FlowSchema",
        "metadata": {"name": f"bench-{_dashed(name)}"},
        "spec": {
            "priorityLevelConfiguration": {"name": "workload-low"},
            "matchingPrecedence": precedence,
            "distinguisherMethod": {"type": "ByUser"},
            "rules": [{"subjects": [subject], "resourceRules": [{**rule, "clusterScope": True}]}],
        },
    }


def _metrics(server: Server) -> tuple[int, str]:
    api = server.api
    connection = http.client.HTTPSConnection(api.address.hostname or "", api.address.port, timeout=60, context=api.tls)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
