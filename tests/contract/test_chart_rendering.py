"""What the chart makes of its values: names, environment, security, storage, and nothing that the values do not say."""

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver import ROOT
from charts import CHART, IMAGES, NAMESPACE, environment, helm, objects, one, pod_specs, rendered, sets
from gpumeter_operator.billing.signing import signing_key
from gpumeter_operator.cli.main import COMMANDS
from gpumeter_operator.decide.access import Monitoring
from gpumeter_operator.decide.placement import NodeChoice
from gpumeter_operator.settings import read_settings

pytestmark = pytest.mark.shared

PARTS = ("operator", "collector", "gateway")
OPERATOR, COLLECTOR, GATEWAY = (
    {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}},
        "podSelector": {
            "matchLabels": {
                "app.kubernetes.io/component": part,
                "app.kubernetes.io/instance": "gpumeter",
                "app.kubernetes.io/name": "gpumeter",
            }
        },
    }
    for part in PARTS
)
PEERS: dict[str, Any] = {"egress": [], "http": [GATEWAY, OPERATOR], "usage": [COLLECTOR]}
DEPLOYMENTS = tuple(f"gpumeter-{part}" for part in PARTS)


def test_helm_lint_finds_nothing() -> None:
    done = helm("lint", "--strict", str(CHART), *sets(*IMAGES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_release_called_gpumeter_has_short_names() -> None:
    names = {(each["kind"], each["metadata"]["name"]) for each in rendered()}
    workloads = {(kind, name) for kind, name in names if kind in ("Deployment", "Service", "PodDisruptionBudget")}
    assert workloads == {
        *(("Deployment", name) for name in DEPLOYMENTS),
        ("Service", "gpumeter-gateway"),
        ("PodDisruptionBudget", "gpumeter-gateway"),
        ("PodDisruptionBudget", "gpumeter-operator"),
    }
    assert ("Secret", "gpumeter-master-key") in names
    assert ("PersistentVolumeClaim", "gpumeter-ledger") in names


def test_another_release_has_its_name_before() -> None:
    one(rendered(release="prod"), "Deployment", "prod-gpumeter-operator")
    one(rendered("fullnameOverride=bill", release="prod"), "Deployment", "bill-operator")


@pytest.mark.parametrize("word", ["2024", "0x10", "1e3", "true"])
def test_names_that_yaml_takes_for_something_else_stay_names(word: str) -> None:
    ours = ("nameOverride", "pricePlan.name", "masterKey.existingSecret", "signingKey.existingSecret")
    others = ("collector.persistence.existingClaim", "gateway.priorityClassName", "imagePullSecrets[0]")
    given = [part for name in (*ours, *others) for part in ("--set-string", f"{name}={word}")]
    rates = ("pricePlan.rates[0].gpuClass=h100", "--set-string", "pricePlan.rates[0].perGpuHour=1")
    done = helm(
        *("template", word, str(CHART), "-n", word, *sets(*IMAGES, "pricePlan.create=true")),
        *("--set", *rates, *given),
    )
    assert done.returncode == 0, done.stderr
    found = objects(done.stdout)
    for each in found:
        metadata, template = each["metadata"], (each.get("spec") or {}).get("template", {}).get("metadata", {})
        names = [metadata["name"], metadata.get("namespace", word), *metadata["labels"].values()]
        names += template.get("labels", {}).values()
        assert all(isinstance(name, str) for name in names), f"{each['kind']} {metadata['name']}"
        assert [one["namespace"] for one in each.get("subjects") or ()] in ([], [word])
    pods = pod_specs(found)
    volumes = [volume for pod in pods.values() for volume in pod.get("volumes", ())]
    assert {volume["secret"]["secretName"] for volume in volumes if "secret" in volume} == {word}
    assert {each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each} == {word}
    assert pods[f"{word}-gateway"]["priorityClassName"] == word
    assert pods[f"{word}-gateway"]["imagePullSecrets"] == [{"name": word}]
    assert one(found, "PricePlan", word)
    peers = json.loads(environment(pods[f"{word}-operator"])["GPUMETER_WORKER_PEERS"])
    labels = peers["usage"][0]["podSelector"]["matchLabels"]
    assert (labels["app.kubernetes.io/instance"], labels["app.kubernetes.io/name"]) == (word, word)


def test_the_environment_is_what_the_parts_read() -> None:
    pods = pod_specs(rendered("billing.period=5m", "billing.closeGrace=90s", "collector.pullInterval=500ms"))
    shared = {
        "GPUMETER_MASTER_KEY_FILE": "/etc/gpumeter/master/master-key",
        "GPUMETER_LOG_LEVEL": "INFO",
        "GPUMETER_LOG_FORMAT": "json",
    }
    assert environment(pods["gpumeter-operator"]) == {
        **shared,
        "GPUMETER_DELETION_MARGIN_MS": "60000",
        "GPUMETER_WORKER_PEERS": json.dumps(PEERS, separators=(",", ":")),
        "GPUMETER_WORKER_MONITORING": '{"interval":"15s","labels":{}}',
        "GPUMETER_WORKER_IMAGE": "localhost/gpumeter-worker:dev",
        "GPUMETER_WORKER_IMAGE_PULL_POLICY": "IfNotPresent",
        "GPUMETER_GATEWAY_URL": "http://gpumeter-gateway.gpumeter-system.svc",
        "GPUMETER_GATEWAY_SERVICE": "gpumeter-system/gpumeter-gateway",
        "GPUMETER_LEASE": "gpumeter-operator",
    }
    assert environment(pods["gpumeter-collector"]) == {
        **shared,
        "GPUMETER_LEDGER_URL": "sqlite:////var/lib/gpumeter/ledger.db",
        "GPUMETER_SIGNING_KEY_FILE": "/etc/gpumeter/signing/signing-key",
        "GPUMETER_DIGESTS_FILE": "/var/lib/gpumeter/digests.jsonl",
        "GPUMETER_RETENTION_DAYS": "400",
        "GPUMETER_PERIOD": "5m",
        "GPUMETER_CLOSE_GRACE_S": "90",
        "GPUMETER_KEEP_DAYS": "hours=3,days=31,months=400",
        "GPUMETER_PULL_INTERVAL_MS": "500",
    }
    assert environment(pods["gpumeter-gateway"]) == {
        **shared,
        "GPUMETER_GATEWAY_DRAIN_TIMEOUT_S": "110",
        "GPUMETER_GATEWAY_WAITING_TIMEOUT_S": "300",
        "GPUMETER_GATEWAY_HEARTBEAT_S": "10",
        "GPUMETER_GATEWAY_WAITING_MAX": "512",
        "GPUMETER_GATEWAY_TENANT_WAITING_MAX": "256",
        "GPUMETER_GATEWAY_PREFIX_AFFINITY_BYTES": "0",
    }
    for pod in pods.values():
        if "env" in pod["containers"][0]:
            assert {
                "name": "GPUMETER_NAMESPACE",
                "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}},
            } in pod["containers"][0]["env"]


def test_who_may_reach_workers_is_who_the_parts_pods_are_and_nobody_where_policies_are_off() -> None:
    found = rendered()
    for part, peer in zip(PARTS, (OPERATOR, COLLECTOR, GATEWAY), strict=True):
        labels = one(found, "Deployment", f"gpumeter-{part}")["spec"]["template"]["metadata"]["labels"]
        assert peer["podSelector"]["matchLabels"].items() <= labels.items()
    off = rendered("workers.networkPolicy.enabled=false", "workers.podMonitor.enabled=false")
    names = environment(pod_specs(off)["gpumeter-operator"])
    assert not {"GPUMETER_WORKER_PEERS", "GPUMETER_WORKER_MONITORING", "GPUMETER_GPU_CLASSES"} & set(names)


def test_what_the_values_say_of_workers_is_what_the_operator_reads(tmp_path: Path) -> None:
    key = tmp_path / "master-key"
    key.write_bytes(b"k" * 32)
    monitoring = "workers.networkPolicy.scrapers[0].namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name=prom"
    found = rendered(
        "gpuClasses.h100.nodeSelector.nvidia\\.com/gpu\\.product=H100",
        "workers.podMonitor.labels.release=prom",
        "operator.deletionMargin=5m",
        monitoring,
    )
    told = environment(pod_specs(found)["gpumeter-operator"])
    by_kubernetes = {"GPUMETER_NAMESPACE": NAMESPACE}  # the pod names its own
    settings = read_settings({**told, **by_kubernetes, "GPUMETER_MASTER_KEY_FILE": str(key)})
    assert settings.installation.gpu_classes == {"h100": NodeChoice({"nvidia.com/gpu.product": "H100"})}
    assert settings.installation.monitoring == Monitoring({"release": "prom"}, "15s")
    assert settings.installation.peers is not None
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "prom"}}}
    assert settings.installation.peers.http == (GATEWAY, OPERATOR, prometheus)
    assert settings.installation.peers.usage == (COLLECTOR,)
    assert settings.deletion_margin_ms == 300_000


def test_the_chart_starts_only_commands_that_the_program_has() -> None:
    commands = [pod["containers"][0]["args"][0] for pod in pod_specs(rendered()).values()]
    assert sorted(commands) == ["collector", "gateway", "operator", "uninstall-check"]
    assert set(commands) <= set(COMMANDS)


@pytest.mark.parametrize("name", [*DEPLOYMENTS, "gpumeter-uninstall-check"])
def test_every_pod_is_restricted(name: str) -> None:
    pod = pod_specs(rendered())[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"requests", "limits"} <= set(container["resources"])
    assert pod["serviceAccountName"] == name


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_part_is_probed_on_the_port_that_it_serves(name: str) -> None:
    [container] = pod_specs(rendered())[name]["containers"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": 8080}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8080}
    port = "http" if name == "gpumeter-gateway" else "http-metrics"
    internal = [{"name": "internal", "containerPort": 8081}] if name == "gpumeter-gateway" else []
    assert container["ports"] == [{"name": port, "containerPort": 8080}, *internal]


def test_selectors_find_the_pods_of_their_part_and_no_others() -> None:
    found = rendered()
    labels = {name: one(found, "Deployment", name)["spec"]["template"]["metadata"]["labels"] for name in DEPLOYMENTS}
    selectors = {name: one(found, "Deployment", name)["spec"]["selector"]["matchLabels"] for name in DEPLOYMENTS}
    selectors["service"] = one(found, "Service", "gpumeter-gateway")["spec"]["selector"]
    for part in ("operator", "gateway"):
        budget = one(found, "PodDisruptionBudget", f"gpumeter-{part}")
        selectors[f"budget of gpumeter-{part}"] = budget["spec"]["selector"]["matchLabels"]
    for owner, selector in selectors.items():
        hit = [name for name, its in labels.items() if selector.items() <= its.items()]
        wanted = owner.removeprefix("budget of ")
        assert hit == [wanted if wanted in DEPLOYMENTS else "gpumeter-gateway"]


def test_the_service_leads_from_port_80_to_the_gateway_and_not_to_its_internal_port() -> None:
    [port] = one(rendered(), "Service", "gpumeter-gateway")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (80, "http")


def test_who_writes_alone_is_replaced_and_never_doubled() -> None:
    spec = one(rendered(), "Deployment", "gpumeter-collector")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_of_two_operators_one_stands_by_on_another_node_and_one_is_always_left() -> None:
    found = rendered("fullnameOverride=bill")
    spec = one(found, "Deployment", "bill-operator")["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    [spread] = spec["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert one(found, "PodDisruptionBudget", "bill-operator")["spec"]["maxUnavailable"] == 1
    assert environment(spec["template"]["spec"])["GPUMETER_LEASE"] == "bill-operator"
    rules = one(found, "Role", "bill-operator")["rules"]
    named = [rule for rule in rules if rule.get("resourceNames")]
    assert named == [
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "resourceNames": ["bill-operator"],
            "verbs": ["get", "patch"],
        }
    ]
    one_alone = rendered("operator.replicas=1", "operator.podDisruptionBudget.enabled=false")
    assert one(one_alone, "Deployment", "gpumeter-operator")["spec"]["replicas"] == 1
    assert ("PodDisruptionBudget", "gpumeter-operator") not in {
        (each["kind"], each["metadata"]["name"]) for each in one_alone
    }


def test_a_digest_wins_over_a_tag_and_the_version_is_the_default_tag() -> None:
    digest = "sha256:" + "a" * 64
    pods = pod_specs(rendered(f"image.digest={digest}", "workerImage.tag="))
    assert pods["gpumeter-gateway"]["containers"][0]["image"] == f"localhost/gpumeter-operator@{digest}"
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    worker = environment(pods["gpumeter-operator"])["GPUMETER_WORKER_IMAGE"]
    assert worker == f"localhost/gpumeter-worker:{version}"


def test_the_ledger_is_kept_on_a_claim_that_outlives_the_release() -> None:
    found = rendered("collector.persistence.size=20Gi", "collector.persistence.storageClass=fast")
    claim = one(found, "PersistentVolumeClaim", "gpumeter-ledger")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "20Gi"}},
    }
    assert ledger_volume(found) == {"persistentVolumeClaim": {"claimName": "gpumeter-ledger"}}
    key = one(found, "Secret", "gpumeter-master-key")
    assert key["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_an_existing_claim_is_used_and_none_is_made() -> None:
    found = rendered("collector.persistence.existingClaim=bills")
    assert [each for each in found if each["kind"] == "PersistentVolumeClaim"] == []
    assert ledger_volume(found) == {"persistentVolumeClaim": {"claimName": "bills"}}


def test_with_a_url_the_ledger_is_in_postgresql_and_there_is_no_volume() -> None:
    asked = ("ledger.url.secretName=bills-db", "ledger.url.secretKey=dsn", "ledger.retentionDays=90")
    found = rendered(*asked)
    assert [each for each in found if each["kind"] == "PersistentVolumeClaim"] == []
    pod = pod_specs(found)["gpumeter-collector"]
    assert "ledger" not in {volume["name"] for volume in pod["volumes"]}
    [container] = pod["containers"]
    assert "ledger" not in {mount["name"] for mount in container["volumeMounts"]}
    given = {each["name"]: each for each in container["env"]}
    assert given["GPUMETER_LEDGER_URL"] == {
        "name": "GPUMETER_LEDGER_URL",
        "valueFrom": {"secretKeyRef": {"name": "bills-db", "key": "dsn"}},
    }
    assert given["GPUMETER_RETENTION_DAYS"]["value"] == "90"
    assert "WARNING" not in notes(*asked, "collector.persistence.enabled=false")
    assert "with the ledger" not in notes(*asked)


def test_without_persistence_the_notes_warn_that_bills_are_lost() -> None:
    found = rendered("collector.persistence.enabled=false")
    assert [each for each in found if each["kind"] == "PersistentVolumeClaim"] == []
    assert ledger_volume(found) == {"emptyDir": {}}
    assert "WARNING: collector.persistence.enabled is false." in notes("collector.persistence.enabled=false")
    assert "WARNING" not in notes()


def test_existing_keys_are_mounted_and_none_is_made() -> None:
    found = rendered("masterKey.existingSecret=our-key", "signingKey.existingSecret=our-signer")
    assert [each for each in found if each["kind"] == "Secret"] == []
    master = {"secretName": "our-key", "defaultMode": 0o440, "items": [{"key": "master-key", "path": "master-key"}]}
    signing = {
        "secretName": "our-signer",
        "defaultMode": 0o440,
        "items": [{"key": "signing-key", "path": "signing-key"}],
    }
    for name in DEPLOYMENTS:
        mounted = [volume["secret"] for volume in pod_specs(found)[name]["volumes"] if "secret" in volume]
        assert mounted == ([master, signing] if name == "gpumeter-collector" else [master])


def test_the_signing_key_that_the_chart_makes_is_one_that_the_collector_reads() -> None:
    secrets = [one(rendered(), "Secret", "gpumeter-signing-key") for _ in range(2)]
    assert secrets[0]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    made = [signing_key(b64decode(secret["data"]["signing-key"])) for secret in secrets]
    assert made[0].key_id != made[1].key_id


def test_two_installations_get_two_master_keys() -> None:
    keys = {one(rendered(), "Secret", "gpumeter-master-key")["data"]["master-key"] for _ in range(2)}
    assert len(keys) == 2


def test_a_price_plan_is_made_only_when_asked_for() -> None:
    assert [each for each in rendered() if each["kind"] == "PricePlan"] == []
    rate = ("pricePlan.rates[0].gpuClass=h100", "pricePlan.rates[0].perGpuHour=2.50")
    plan = one(rendered("pricePlan.create=true", *rate), "PricePlan", "default")
    assert plan["spec"] == {
        "currency": "USD",
        "idlePayer": "platform",
        "published": False,
        "rates": [{"gpuClass": "h100", "perGpuHour": "2.50"}],
    }
    part = tuple(f"pricePlan.rates[1].{each}" for each in ("gpuClass=h100.1g.10gb", "of=h100", "fraction=1/7"))
    plan = one(rendered("pricePlan.create=true", "pricePlan.idlePayer=owner", *rate, *part), "PricePlan", "default")
    assert plan["spec"]["rates"][1] == {"gpuClass": "h100.1g.10gb", "of": "h100", "fraction": "1/7"}
    assert plan["spec"]["idlePayer"] == "owner"


def test_scheduling_reaches_the_pod_that_it_is_for() -> None:
    settings = (
        "collector.nodeSelector.disk=ssd",
        "collector.priorityClassName=high",
        "collector.tolerations[0].key=dedicated",
        "collector.podAnnotations.note=x",
        "collector.extraEnv[0].name=A",
        "collector.extraEnv[0].value=b",
        "imagePullSecrets[0]=registry",
    )
    found = rendered(*settings)
    pods = pod_specs(found)
    collector = pods["gpumeter-collector"]
    assert collector["nodeSelector"] == {"disk": "ssd"}
    assert collector["priorityClassName"] == "high"
    assert collector["tolerations"] == [{"key": "dedicated"}]
    assert environment(collector)["A"] == "b"
    annotations = one(found, "Deployment", "gpumeter-collector")["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"note": "x"}
    assert "nodeSelector" not in pods["gpumeter-operator"]
    assert all(pod["imagePullSecrets"] == [{"name": "registry"}] for pod in pods.values())


def test_the_uninstall_check_is_a_hook_that_tells_its_reason() -> None:
    job = one(rendered(), "Job", "gpumeter-uninstall-check")
    annotations = job["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == "pre-delete"
    assert annotations["helm.sh/hook-output-log-policy"] == "hook-failed"
    hooks = [each for each in rendered() if "helm.sh/hook" in each["metadata"].get("annotations", {})]
    assert {each["kind"] for each in hooks} == {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Job"}
    assert all("hook-succeeded" in each["metadata"]["annotations"]["helm.sh/hook-delete-policy"] for each in hooks)
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][1:] == ["--release=gpumeter", f"--namespace={NAMESPACE}", "--revision=1"]
    left = rendered("uninstallCheck.enabled=false")
    assert [each for each in left if "uninstall-check" in each["metadata"]["name"]] == []


def test_the_operator_may_not_ask_for_what_it_only_watches() -> None:
    found = rendered()
    rules = one(found, "ClusterRole", f"gpumeter-operator-{NAMESPACE}")["rules"]
    rules += one(found, "Role", "gpumeter-operator")["rules"]
    verbs = {resource: set(rule["verbs"]) for rule in rules for resource in rule["resources"]}
    assert verbs["pods"] == {"list", "watch", "patch"}
    assert verbs["endpointslices"] == {"list", "watch"}
    assert verbs["secrets"] == {"create", "patch"}


def test_no_role_has_a_wildcard() -> None:
    for each in rendered():
        for rule in each.get("rules", ()):
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]], each["metadata"]["name"]


def test_the_schema_knows_every_value_and_every_value_has_a_default() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(paths_of_values(values, schema)) == set(paths_of_schema(schema)) - {"global"}


def test_the_chart_has_the_version_of_the_programs() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    for distribution in ("operator", "worker"):
        assert f'version = "{chart["appVersion"]}"' in (ROOT / distribution / "pyproject.toml").read_text()


def ledger_volume(found: list[dict[str, Any]]) -> dict[str, Any]:
    [volume] = [each for each in pod_specs(found)["gpumeter-collector"]["volumes"] if each["name"] == "ledger"]
    return {key: value for key, value in volume.items() if key != "name"}


def notes(*settings: str) -> str:
    done = helm("install", "gpumeter", str(CHART), "--dry-run=client", *sets(*IMAGES, *settings))
    assert done.returncode == 0, done.stderr
    return done.stdout


def paths_of_values(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Paths down to where the schema leaves the rest to Kubernetes."""
    for key, value in values.items():
        below = schema["properties"].get(key, {})
        if isinstance(value, dict) and "properties" in below and not is_open(below):
            yield from paths_of_values(value, below, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def paths_of_schema(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, below in schema["properties"].items():
        if "properties" in below and not is_open(below):
            yield from paths_of_schema(below, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def is_open(schema: dict[str, Any]) -> bool:
    """Container resources: Kubernetes says what may stand there."""
    return set(schema["properties"]) == {"requests", "limits", "claims"}
