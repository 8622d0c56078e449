"""The control plane that the cluster ring tests against: fresh, alone, and never anybody's real cluster.

Owns its life and the programs that speak to it. Every call names this kubeconfig; the user's own is never read.
"""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from apiserver import CRDS, ROOT, Run, Server, runner
from charts import CHART, IMAGES, NAMESPACE, sets
from devcluster import control_plane


@pytest.fixture(scope="session")
def plane() -> Iterator[Path]:
    """The kubeconfig of a control plane of this session's own, without any CRD."""
    with control_plane("cluster-ring") as kubeconfig:
        context = json.loads(kubeconfig.read_text())["current-context"]
        assert context == "gpumeter-cluster-ring", f"these tests did not make the context {context}"
        yield kubeconfig


@pytest.fixture(scope="session")
def kubectl(plane: Path) -> Run:
    """Run kubectl against the control plane; `check=False` hands back a failure instead of raising."""
    return runner("kubectl", plane)


@pytest.fixture(scope="session")
def helm(plane: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run helm against the control plane, with caches of its own."""
    return runner("helm", plane, HELM_CACHE_HOME=str(tmp_path_factory.mktemp("helm")))


@pytest.fixture(scope="session")
def server(plane: Path, kubectl: Run) -> Server:
    """The API server with gpumeter's CRDs."""
    kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    for plural in CRDS:
        kubectl("wait", "--for=condition=Established", "--timeout=30s", f"crd/{plural}.gpumeter.io")
    return Server(plane)


@pytest.fixture
def namespace(server: Server) -> Iterator[str]:
    """A namespace of this test's own."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    made = server.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    assert made.code == 201, made.body
    yield name
    server.call("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="session")
def release(server: Server, kubectl: Run, helm: Run) -> str:
    """The namespace of a release called gpumeter, on the API server that has the CRDs already."""
    kubectl("create", "namespace", NAMESPACE)
    kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/warn=restricted")
    helm("install", "gpumeter", str(CHART), "-n", NAMESPACE, "--skip-crds", *sets(*IMAGES))
    # Other tests write reports to this server as administrators; the policy's own tests bind it for themselves.
    kubectl("delete", "validatingadmissionpolicybindings", "-l", "app.kubernetes.io/instance=gpumeter")
    return NAMESPACE
