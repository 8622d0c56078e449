"""What a person meets of the CRDs through kubectl: short names, columns, defaults, pruning, scale, explain."""

import json
from typing import Any

import pytest

from apiserver import ROOT, Run, Server, merged, rule_file

SMALL = rule_file("inferenceservices")["base"]
REPORT = rule_file("usagereports")["base"]
READY = {
    "type": "Ready",
    "status": "True",
    "reason": "AllReplicasReady",
    "message": "2 of 2 replicas are ready.",
    "lastTransitionTime": "2026-11-21T14:00:00Z",
}


def make(server: Server, namespace: str, plural: str, manifest: dict[str, Any]) -> dict[str, Any]:
    answer = server.create(namespace, plural, manifest)
    assert answer.code == 201, answer.body
    return answer.body


def with_status(server: Server, namespace: str, plural: str, made: dict[str, Any], status: dict[str, Any]) -> Any:
    answer = server.replace(namespace, plural, {**made, "status": status}, status=True)
    assert answer.code == 200, answer.body
    return answer.body


def words(text: str) -> list[str]:
    return text.split()


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_a_uri_is_enough_and_every_other_default_is_filled_in(server: Server, namespace: str) -> None:
    manifest = merged(SMALL, {"spec": {"replicas": None}})
    assert make(server, namespace, "inferenceservices", manifest)["spec"] == {
        "model": {"uri": SMALL["spec"]["model"]["uri"], "dtype": "auto", "maxModelLen": 4096},
        "engine": {
            "type": "transformers",
            "image": "",
            "maxBatchSize": 64,
            "maxBatchTokens": 2048,
            "maxWaitMs": 0,
            "maxQueueLength": 256,
            "cudaGraphs": True,
            "compile": False,
        },
        "parallelism": {"tensor": 1},
        "resources": {
            "gpu": {"count": 1, "resourceName": "nvidia.com/gpu"},
            "cpu": "1",
            "memory": "4Gi",
            "sharedMemory": "1Gi",
        },
        "metering": {
            "attribution": "knee",
            "checkpointInterval": "5s",
            "leaseTimeout": "60s",
            "billingMode": "measured",
        },
        "pricing": {"planRef": {"name": "default"}},
        "drain": {"timeout": "120s"},
        "rolloutStrategy": {"maxSurge": 1, "maxUnavailable": 0},
    }


def test_scaling_has_defaults_and_takes_the_behaviour_of_an_hpa(server: Server, namespace: str) -> None:
    behavior = {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "selectPolicy": "Max",
            "policies": [{"type": "Pods", "value": 4, "periodSeconds": 15}],
        },
        "scaleDown": {"selectPolicy": "Disabled", "tolerance": "0.05"},
    }
    manifest = merged(SMALL, {"spec": {"replicas": None, "scaling": {"maxReplicas": 8, "behavior": behavior}}})
    assert make(server, namespace, "inferenceservices", manifest)["spec"]["scaling"] == {
        "minReplicas": 1,
        "maxReplicas": 8,
        "targetQueueLength": 4,
        "targetGpuUtilization": 80,
        "behavior": behavior,
    }


def test_an_hpa_of_kubernetes_accepts_the_same_behaviour(server: Server, namespace: str, kubectl: Run) -> None:
    policies = [{"type": "Percent", "value": 50, "periodSeconds": 60}]
    behavior = {"scaleDown": {"stabilizationWindowSeconds": 300, "policies": policies}}
    scaling = {"maxReplicas": 8, "behavior": behavior}
    make(server, namespace, "inferenceservices", merged(SMALL, {"spec": {"replicas": None, "scaling": scaling}}))
    target = {"apiVersion": "gpumeter.io/v1alpha1", "kind": "InferenceService", "name": "llama"}
    spec = {
        "scaleTargetRef": target,
        "maxReplicas": 8,
        "metrics": [
            {
                "type": "Resource",
                "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}},
            }
        ],
        "behavior": behavior,
    }
    hpa = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "x"}, "spec": spec}
    kubectl("apply", "-n", namespace, "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(hpa))


def test_unknown_fields_are_pruned_and_the_pod_template_is_kept(server: Server, namespace: str) -> None:
    pod = {"nodeSelector": {"gpu": "h100"}, "containers": [{"name": "main", "env": [{"name": "A", "value": "b"}]}]}
    patch = {"spec": {"replicaz": 3, "model": {"size": "135M"}, "template": {"spec": pod, "kind": "Pod"}}, "extra": {}}
    made = make(server, namespace, "inferenceservices", merged(SMALL, patch))
    assert "replicaz" not in made["spec"]
    assert "size" not in made["spec"]["model"]
    assert "extra" not in made
    assert made["spec"]["template"] == {"spec": pod}


def test_a_status_in_a_manifest_is_ignored_and_the_status_subresource_leaves_the_spec(
    server: Server, namespace: str
) -> None:
    made = make(server, namespace, "inferenceservices", merged(SMALL, {"status": {"replicas": 9}}))
    assert "status" not in made
    changed = merged(made, {"spec": {"replicas": 7}, "status": {"replicas": 2, "mood": "good"}})
    answer = server.replace(namespace, "inferenceservices", changed, status=True)
    assert answer.code == 200, answer.body
    assert answer.body["spec"]["replicas"] == 1
    assert answer.body["status"] == {"replicas": 2}
    assert answer.body["metadata"]["generation"] == 1


def test_every_part_of_a_status_that_the_design_names_is_kept(server: Server, namespace: str) -> None:
    now = "2026-11-21T14:00:00Z"
    status = {
        "observedGeneration": 3,
        "replicas": 2,
        "readyReplicas": 1,
        "selector": "gpumeter.io/inferenceservice=smollm2",
        "url": "http://smollm2.team-a.svc:8000/v1",
        "modelStatus": {
            "state": "FailedToLoad",
            "lastFailureInfo": {
                "reason": "ModelNotFound",
                "message": "There is no such repository; correct spec.model.uri.",
                "modelRevision": "main",
                "time": now,
            },
        },
        "queueLength": 7,
        "gpuUtilization": 83,
        "capacity": {
            "measuredAt": now,
            "gpuClass": "h100",
            "profileHash": "ab" * 32,
            "boundBy": "MemoryBandwidth",
            "memoryHeadroomBytes": 2**40,
            "batches": [{"batchSize": 1, "tokensPerSecond": "91.5", "gpuSecondsPerThousandTokens": "10.9"}],
        },
        "usage": {"hour": now, "gpuSeconds": "12.5", "unaccounted": "-0.25", "gpuHours": "3.5", "cost": "8.75 USD"},
        "scalingHistory": [
            {"time": now, "from": 1, "to": 2, "reason": "QueueAboveTarget", "message": "9 wait, 4 is the target."}
        ],
        "conditions": [{**READY, "observedGeneration": 3}],
    }
    made = make(server, namespace, "inferenceservices", SMALL)
    assert with_status(server, namespace, "inferenceservices", made, status)["status"] == status


def test_every_part_of_a_report_that_the_design_names_is_kept(server: Server, namespace: str) -> None:
    accounts = rule_file("usagereports")["rules"][-1]["accepted"][0]["status"]["accounts"]
    status = {
        "phase": "Closing",
        "gpuNanoseconds": "40000000001",
        "prefillGpuNanoseconds": "10000000001",
        "decodeGpuNanoseconds": "30000000000",
        "gpuSeconds": "40.000000001",
        "sessions": 12,
        "tokens": {"prompt": 480, "cached": 32, "completion": 960, "total": 1440},
        "accounts": accounts,
        "meanBatchSize": "1.75",
        "energyJoules": "5120.5",
        "amount": "0.0278",
        "packageDeduction": "0.0200",
        "amountDue": "0.0078",
        "currency": "USD",
        "pricePerThousandTokens": "0.0193",
        "recordCount": 40,
        "seqRanges": [{"workerUid": "u", "bootId": "b", "first": 1, "last": 40}],
        "digest": "ab" * 32,
        "previousDigest": "00" * 32,
        "completeness": {
            "expectedWorkers": 2,
            "reportedWorkers": 1,
            "missing": [
                {
                    "workerUid": "v",
                    "pod": "smollm2-x",
                    "bootId": "c",
                    "first": 4,
                    "last": 9,
                    "reason": "SequenceGap",
                    "message": "Records 4 to 9 never came.",
                }
            ],
        },
        "conditions": [{**READY, "type": "Complete", "status": "False", "reason": "SequenceGap"}],
    }
    made = make(server, namespace, "usagereports", REPORT)
    assert with_status(server, namespace, "usagereports", made, status)["status"] == status


def test_short_names_and_the_category_list_what_there_is(server: Server, namespace: str, kubectl: Run) -> None:
    make(server, namespace, "inferenceservices", SMALL)
    make(server, namespace, "usagereports", REPORT)
    make(server, namespace, "usagepackages", rule_file("usagepackages")["base"])
    plan = merged(rule_file("priceplans")["base"], {"metadata": {"name": namespace}})
    make(server, namespace, "priceplans", plan)
    try:
        for short in ("misvc", "usage", "usagepackage"):
            assert len(kubectl("get", short, "-n", namespace, "-o", "name").stdout.split()) == 1, short
        assert f"priceplan.gpumeter.io/{namespace}" in kubectl("get", "priceplan", "-o", "name").stdout
        kinds = {
            name.split(".")[0] for name in kubectl("get", "gpumeter", "-n", namespace, "-o", "name").stdout.split()
        }
        assert kinds == {"inferenceservice", "usagereport", "usagepackage", "priceplan"}
    finally:
        server.delete(namespace, "priceplans", namespace)


def test_the_columns_of_a_service_tell_how_it_is(server: Server, namespace: str, kubectl: Run) -> None:
    made = make(server, namespace, "inferenceservices", SMALL)
    status = {
        "url": "http://smollm2.x.svc:8000/v1",
        "replicas": 2,
        "queueLength": 7,
        "gpuUtilization": 83,
        "usage": {"gpuHours": "3.5", "cost": "8.75"},
        "conditions": [READY],
    }
    with_status(server, namespace, "inferenceservices", made, status)
    header, row = table(kubectl("get", "misvc", "-n", namespace).stdout)
    assert header == ["NAME", "URL", "READY", "REASON", "REPLICAS", "QUEUE", "GPU%", "AGE"]
    assert row[:-1] == ["smollm2", "http://smollm2.x.svc:8000/v1", "True", "AllReplicasReady", "2", "7", "83"]
    header, row = table(kubectl("get", "misvc", "-n", namespace, "-o", "wide").stdout)
    assert header[-3:] == ["MODEL", "GPU-HOURS", "COST"]
    assert row[-3:] == ["hf://HuggingFaceTB/SmolLM2-135M-Instruct", "3.5", "8.75"]


def test_the_columns_of_a_report_read_like_a_bill(server: Server, namespace: str, kubectl: Run) -> None:
    made = make(server, namespace, "usagereports", REPORT)
    status = {
        "phase": "Final",
        "period": "2026-11-21T14:00:00Z",
        "sessions": 12,
        "gpuSeconds": "40.5",
        "tokens": {"prompt": 480, "completion": 960, "total": 1440},
        "amount": "0.0281",
        "amountDue": "0.0081",
        "pricePerThousandTokens": "0.0195",
        "currency": "USD",
    }
    with_status(server, namespace, "usagereports", made, status)
    header, row = table(kubectl("get", "usagereports", "-n", namespace).stdout)
    columns = "NAME TENANT SERVICE PERIOD SESSIONS GPU-SECONDS TOKENS AMOUNT CUR PHASE AGE"
    assert header == columns.split()
    name = "smollm2-acme-20261121t14"
    assert row[:-1] == [name, *words("acme smollm2 2026-11-21T14:00:00Z 12 40.5 1440 0.0281 USD Final")]
    header, row = table(kubectl("get", "usagereports", "-n", namespace, "-o", "wide").stdout)
    assert header[-3:] == ["GRANULARITY", "DUE", "PER-1K"]
    assert row[-3:] == ["Hour", "0.0081", "0.0195"]


def test_the_columns_of_a_package_and_of_a_plan(server: Server, namespace: str, kubectl: Run) -> None:
    made = make(server, namespace, "usagepackages", rule_file("usagepackages")["base"])
    with_status(server, namespace, "usagepackages", made, {"remaining": "3000.5", "drawn": "599.5"})
    header, row = table(kubectl("get", "usagepackages", "-n", namespace).stdout)
    assert header == words("NAME TENANT GPU-SECONDS AMOUNT CUR REMAINING VALID-UNTIL PRIORITY AGE")
    assert row[:-1] == words("acme-november acme 3600 3000.5 2026-12-01T00:00:00Z 0")
    plan = merged(rule_file("priceplans")["base"], {"metadata": {"name": namespace}})
    make(server, namespace, "priceplans", plan)
    try:
        header, row = table(kubectl("get", "priceplan", namespace).stdout)
        assert header == words("NAME CURRENCY PUBLISHED IDLE-PAYER VERSION AGE")
        assert row[:-1] == [namespace, "USD", "false", "platform", "1"]
    finally:
        server.delete(namespace, "priceplans", namespace)


def test_reports_are_found_by_tenant_service_and_phase(server: Server, namespace: str, kubectl: Run) -> None:
    for tenant in ("acme", "globex"):
        made = make(
            server,
            namespace,
            "usagereports",
            merged(REPORT, {"metadata": {"name": f"smollm2-{tenant}"}, "spec": {"tenant": tenant}}),
        )
        phase = "Final" if tenant == "acme" else "Open"
        with_status(server, namespace, "usagereports", made, {"phase": phase})
    for selector in ("spec.tenant=acme", "status.phase=Final", "spec.serviceRef.name=smollm2,spec.tenant!=globex"):
        listed = kubectl("get", "usage", "-n", namespace, "-o", "name", f"--field-selector={selector}").stdout
        assert listed.split() == ["usagereport.gpumeter.io/smollm2-acme"], selector


def test_kubectl_scale_writes_replicas(server: Server, namespace: str, kubectl: Run) -> None:
    made = make(server, namespace, "inferenceservices", SMALL)
    with_status(server, namespace, "inferenceservices", made, {"replicas": 1, "selector": "a=b"})
    kubectl("scale", "misvc/smollm2", "-n", namespace, "--replicas=3", "--current-replicas=1")
    path = f"/apis/gpumeter.io/v1alpha1/namespaces/{namespace}/inferenceservices/smollm2/scale"
    scale = server.call("GET", path).body
    assert (scale["spec"], scale["status"]) == ({"replicas": 3}, {"replicas": 1, "selector": "a=b"})


def test_kubectl_scale_works_where_neither_replicas_nor_scaling_is_set(
    server: Server, namespace: str, kubectl: Run
) -> None:
    make(server, namespace, "inferenceservices", merged(SMALL, {"spec": {"replicas": None}}))
    kubectl("scale", "misvc/smollm2", "-n", namespace, "--replicas=2")
    assert kubectl("get", "misvc/smollm2", "-n", namespace, "-o", "jsonpath={.spec.replicas}").stdout == "2"


def test_kubectl_scale_is_refused_where_the_autoscaler_writes_replicas(
    server: Server, namespace: str, kubectl: Run
) -> None:
    patch = {"spec": {"replicas": None, "scaling": {"maxReplicas": 4}}}
    make(server, namespace, "inferenceservices", merged(SMALL, patch))
    refused = kubectl("scale", "misvc/smollm2", "-n", namespace, "--replicas=2", check=False)
    assert refused.returncode != 0
    assert "Set spec.replicas (a fixed number) or spec.scaling (gpumeter's autoscaler), not both" in refused.stderr


@pytest.mark.parametrize(
    ("path", "meaning"),
    [
        ("misvc.spec.model.uri", "hf://ORG/NAME (Hugging Face), pvc://CLAIM/PATH"),
        ("misvc.spec.engine.maxBatchTokens", "Most tokens that are computed in one step"),
        ("misvc.spec.metering.leaseTimeout", "from 5s to 1h"),
        ("misvc.spec.scaling.behavior.scaleDown.policies", "periodSeconds"),
        ("usage.status.accounts", "allocated = init + load + warmup + attributed + nonbillable + idle + drain"),
        ("priceplan.spec.rates.perGpuHour", 'a decimal in quotes, for example "2.50"'),
        ("usagepackage.spec.quantity", "Either gpuSeconds, or amount and currency"),
    ],
)
def test_kubectl_explain_says_what_a_field_means(server: Server, kubectl: Run, path: str, meaning: str) -> None:
    assert meaning in " ".join(kubectl("explain", path).stdout.split())


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_accepted_by_a_strict_server(server: Server, kubectl: Run, example: Any) -> None:
    kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(example))
