"""What `helm uninstall` leaves: the definitions, the ledger's volume, its key, and what users made themselves."""

import re
import time

import pytest

from demo import manifests, steps
from demo.kube import DemoFailed
from demo.manifests import RELEASE, RELEASE_NAMESPACE

TEAM = "team-last"


@pytest.fixture
def a_service(release: steps.Demo) -> None:
    release.kube.apply(manifests.namespace(TEAM))
    manifest = manifests.inference_service("file:///mnt/nothing", release.image_version)
    manifest["metadata"] = {"name": "last", "namespace": TEAM}
    manifest["spec"]["replicas"] = 0
    release.kube.apply(manifest)


def everything(release: steps.Demo) -> set[str]:
    """Every object of the release namespace, and every cluster-wide one that names gpumeter."""
    kinds = release.kube.run("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    kinds = [kind for kind in kinds if not kind.startswith("events")]
    own = release.kube.run("-n", RELEASE_NAMESPACE, "get", ",".join(kinds), "-o", "name", "--ignore-not-found").split()
    wide = release.kube.run("api-resources", "--namespaced=false", "--verbs=list", "-o", "name").split()
    wide = [
        kind
        for kind in wide
        if not kind.startswith(("namespaces", "nodes", "csinodes", "persistentvolumes", "apiservices"))
    ]
    named = release.kube.run("get", ",".join(wide), "-o", "name", "--ignore-not-found").split()
    return set(own) | {name for name in named if "gpumeter" in name}


def upgrade(release: steps.Demo) -> None:
    chart = str(release.repository / "charts/gpumeter")
    release.kube.run_helm("upgrade", RELEASE, chart, "-n", RELEASE_NAMESPACE, "--reuse-values", "--timeout", "2m")


def test_uninstall_leaves_the_definitions_and_what_retention_keeps(release: steps.Demo, a_service: None):
    with pytest.raises(DemoFailed):
        release.kube.run_helm("uninstall", RELEASE, "-n", RELEASE_NAMESPACE, "--timeout", "60s")
    hook = release.kube.peek("-n", RELEASE_NAMESPACE, "logs", "-l", "app.kubernetes.io/component=uninstall-check")
    assert "team-last/last" in hook and "delete" in hook
    assert release.kube.run("-n", TEAM, "get", "inferenceservices.gpumeter.io/last", "-o", "name")

    # Helm leaves a refused release in a state that it does not upgrade; the refusal names the way out of it.
    with pytest.raises(DemoFailed) as stuck:
        upgrade(release)
    assert "has no deployed releases" in stuck.value.evidence
    [way_back] = re.findall(r"helm (rollback \S+ \d+ -n [^\s;]+);", hook)
    release.kube.run_helm(*way_back.split(), "--timeout", "2m")
    upgrade(release)

    release.kube.run("delete", "inferenceservices.gpumeter.io", "-A", "--all", "--timeout=100s")
    release.kube.run_helm("uninstall", RELEASE, "-n", RELEASE_NAMESPACE, "--wait", "--timeout", "2m")
    definitions = {f"customresourcedefinition.apiextensions.k8s.io/{name}" for name in DEFINITIONS}
    kept = {"persistentvolumeclaim/gpumeter-ledger", "secret/gpumeter-master-key", "secret/gpumeter-signing-key"}
    kept |= {"lease.coordination.k8s.io/gpumeter-operator"}  # made by the operators, as those of Kubernetes' own are
    of_users = {f"secret/api-key-{tenant}" for tenant in manifests.TENANTS} | {"priceplan.gpumeter.io/default"}
    of_kubernetes = {"configmap/kube-root-ca.crt", "serviceaccount/default"}
    expected = definitions | kept | of_users | of_kubernetes
    deadline = time.monotonic() + 60
    while (left := everything(release)) - expected and time.monotonic() < deadline:
        time.sleep(1)  # helm does not wait for pods to end
    assert left - expected == set()
    assert definitions | kept <= left


DEFINITIONS = (
    "inferenceservices.gpumeter.io",
    "priceplans.gpumeter.io",
    "usagepackages.gpumeter.io",
    "usagereports.gpumeter.io",
)
