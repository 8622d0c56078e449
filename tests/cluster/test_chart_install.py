"""The chart's life on a real API server: install, upgrade, uninstall, and what each leaves."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apiserver import CRDS, Run, eventually, runner
from charts import CHART, IMAGES, NAMESPACE, rendered, sets
from devcluster import control_plane, tool

RATES = ("pricePlan.rates[0].gpuClass=h100", "pricePlan.rates[0].perGpuHour=2.50")
WITH_PLAN = ("pricePlan.create=true", *RATES)


@pytest.fixture(scope="module")
def bare() -> Iterator[Path]:
    """A control plane that has never heard of gpumeter."""
    with control_plane("chart-ring") as kubeconfig:
        yield kubeconfig


@pytest.fixture(scope="module")
def bare_kubectl(bare: Path) -> Run:
    return runner("kubectl", bare)


@pytest.fixture(scope="module")
def bare_helm(bare: Path) -> Run:
    return runner("helm", bare)


def names(kubectl: Run, kinds: str) -> set[str]:
    return set(kubectl("get", kinds, "-n", NAMESPACE, "-o", "name").stdout.split())


def key(kubectl: Run) -> str:
    return kubectl("get", "secret/gpumeter-master-key", "-n", NAMESPACE, "-o", "jsonpath={.data.master-key}").stdout


def test_install_upgrade_uninstall_and_install_again(bare_kubectl: Run, bare_helm: Run) -> None:
    assert bare_kubectl("get", "crd", "-o", "name").stdout == ""
    bare_helm("install", "gpumeter", str(CHART), "-n", NAMESPACE, "--create-namespace", *sets(*IMAGES, *WITH_PLAN))
    crds = set(bare_kubectl("get", "crd", "-o", "name").stdout.split())
    assert {f"customresourcedefinition.apiextensions.k8s.io/{plural}.gpumeter.io" for plural in CRDS} == crds
    plan = json.loads(bare_kubectl("get", "priceplan", "default", "-o", "json").stdout)
    assert plan["spec"]["rates"][0]["perGpuHour"] == "2.50"
    made = key(bare_kubectl)
    assert len(made) >= 44

    bare_helm("upgrade", "gpumeter", str(CHART), "-n", NAMESPACE, *sets(*IMAGES, *WITH_PLAN, "billing.period=1m"))
    assert key(bare_kubectl) == made
    assert "helm show crds CHART | kubectl apply" in bare_helm("get", "notes", "gpumeter", "-n", NAMESPACE).stdout
    shown = bare_helm("show", "crds", str(CHART)).stdout
    applied = bare_kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=shown).stdout
    assert len(applied.splitlines()) == len(CRDS)
    collector = json.loads(bare_kubectl("get", "deployment/gpumeter-collector", "-n", NAMESPACE, "-o", "json").stdout)
    env = {each["name"]: each.get("value") for each in collector["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["GPUMETER_PERIOD"] == "1m"

    # No node runs the hook's Job here; the e2e ring runs it.
    bare_helm("uninstall", "gpumeter", "-n", NAMESPACE, "--no-hooks")
    left = {"secret/gpumeter-master-key", "secret/gpumeter-signing-key", "persistentvolumeclaim/gpumeter-ledger"}
    every_namespace_has = {"configmap/kube-root-ca.crt", "serviceaccount/default"}
    kinds = "all,pdb,role,rolebinding,configmap,serviceaccount,secret,pvc"
    eventually(
        lambda: names(bare_kubectl, kinds) == left | every_namespace_has, "only the ledger and the keys are left"
    )
    for kind in ("clusterrole", "clusterrolebinding", "priceplan"):
        assert "gpumeter" not in bare_kubectl("get", kind, "-o", "name").stdout.replace("gpumeter.io", "")
    assert set(bare_kubectl("get", "crd", "-o", "name").stdout.split()) == crds

    bare_helm("install", "gpumeter", str(CHART), "-n", NAMESPACE, *sets(*IMAGES))
    assert key(bare_kubectl) == made


def test_a_named_master_key_must_be_there(release: str, helm: Run) -> None:
    refused = install_dry(helm, "masterKey.existingSecret=ours")
    assert (
        'masterKey.existingSecret is "ours" and there is no such Secret in namespace gpumeter-system; make it with: '
        'kubectl -n gpumeter-system create secret generic ours --from-literal=master-key="$(openssl rand -hex 32)"'
    ) in refused.stderr


def test_a_named_master_key_must_hold_a_key(release: str, helm: Run, kubectl: Run) -> None:
    kubectl("create", "secret", "generic", "keyless", "--from-literal=key=x", "-n", release)
    refused = install_dry(helm, "masterKey.existingSecret=keyless")
    assert (
        "The Secret keyless in namespace gpumeter-system (masterKey.existingSecret) has no entry called master-key; "
        "add it."
    ) in refused.stderr
    kubectl("create", "secret", "generic", "keyed", "--from-literal=master-key=" + "x" * 32, "-n", release)
    assert install_dry(helm, "masterKey.existingSecret=keyed").returncode == 0


def test_a_second_install_is_refused_because_two_operators_would_undo_each_others_work(
    release: str, namespace: str, helm: Run
) -> None:
    refused = install_dry(helm, namespace=namespace)
    assert refused.returncode != 0
    assert (
        "gpumeter is installed already, as release gpumeter in namespace gpumeter-system, and serves the whole "
        "cluster; upgrade that release, or uninstall it first."
    ) in refused.stderr
    assert install_dry(helm, namespace=release).returncode == 0, "its own upgrade is no second install"


def test_a_kept_secret_without_a_key_is_refused(namespace: str, helm: Run, kubectl: Run) -> None:
    kubectl("create", "secret", "generic", "gpumeter-master-key", "--from-literal=key=x", "-n", namespace)
    refused = install_dry(helm, namespace=namespace)
    assert (
        f"The Secret gpumeter-master-key in namespace {namespace} exists without an entry called master-key; add the "
        "key that the workers were given, or delete the Secret for a new one."
    ) in refused.stderr


def test_a_named_signing_key_must_be_there(release: str, helm: Run) -> None:
    refused = install_dry(helm, "signingKey.existingSecret=ours")
    assert (
        'signingKey.existingSecret is "ours" and there is no such Secret with the entry signing-key in namespace '
        "gpumeter-system; make it with: openssl genpkey"
    ) in refused.stderr


def test_a_kept_secret_without_a_signing_key_is_refused(namespace: str, helm: Run, kubectl: Run) -> None:
    kubectl("create", "secret", "generic", "gpumeter-signing-key", "--from-literal=key=x", "-n", namespace)
    refused = install_dry(helm, namespace=namespace)
    assert (
        f"The Secret gpumeter-signing-key in namespace {namespace} exists without an entry called signing-key; add the "
        "key that signed the ledger's digests, or delete the Secret for"
    ) in refused.stderr


def install_dry(helm: Run, *settings: str, namespace: str = NAMESPACE) -> Any:
    arguments = ["--dry-run=server", "--skip-crds", *sets(*IMAGES, *settings)]
    return helm("upgrade", "--install", "gpumeter", str(CHART), "-n", namespace, *arguments, check=False)


EVERYTHING = (
    *WITH_PLAN,
    "gateway.service.type=LoadBalancer",
    "collector.priorityClassName=",
    "operator.nodeSelector.disk=ssd",
    "imagePullSecrets[0]=registry",
    "gateway.podDisruptionBudget.maxUnavailable=50%",
    "gateway.topologySpreadConstraints[0].maxSkew=1",
    "gateway.topologySpreadConstraints[0].topologyKey=zone",
    "gateway.topologySpreadConstraints[0].whenUnsatisfiable=DoNotSchedule",
)


@pytest.mark.parametrize("settings", [(), EVERYTHING], ids=["defaults", "everything"])
def test_a_strict_server_accepts_every_object_and_no_pod_is_unrestricted(
    release: str, kubectl: Run, settings: tuple[str, ...]
) -> None:
    found = rendered(*settings)
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": found})
    arguments = ["--dry-run=server", "--validate=strict", "--force-conflicts", "--server-side", "-f", "-"]
    done = kubectl("apply", "-n", release, *arguments, stdin=manifest)
    assert len(done.stdout.splitlines()) == len(found)
    assert "violate PodSecurity" not in done.stderr


def test_the_notes_make_a_key_that_the_gateway_can_find(release: str, helm: Run, kubectl: Run, plane: Path) -> None:
    notes = helm("get", "notes", "gpumeter", "-n", release).stdout
    commands = re.search(r"\n(  API_KEY=.*?)\n\n", notes, re.DOTALL)
    assert commands is not None
    script = f"set -e\nkubectl() {{ '{tool('kubectl')}' --kubeconfig='{plane}' \"$@\"; }}\n{commands[1]}"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    api_key = shown.stdout.splitlines()[-1].strip()
    assert api_key.startswith("gm-")
    secret = json.loads(kubectl("get", "secret/api-key-acme", "-n", release, "-o", "json").stdout)
    assert secret["metadata"]["labels"] == {"gpumeter.io/api-key": "true", "gpumeter.io/tenant": "acme"}
    digest = subprocess.run(["sha256sum"], input=api_key, capture_output=True, text=True, check=True).stdout.split()[0]
    stored = kubectl("get", "secret/api-key-acme", "-n", release, "-o", "go-template={{.data.sha256 | base64decode}}")
    assert stored.stdout == digest


def test_the_service_of_the_notes_is_accepted(release: str, helm: Run, kubectl: Run) -> None:
    notes = helm("get", "notes", "gpumeter", "-n", release).stdout
    manifest = re.search(r"<<'END'\n(.*?)\n  END", notes, re.DOTALL)
    assert manifest is not None
    text = "\n".join(line.removeprefix("  ") for line in manifest[1].splitlines())
    kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
