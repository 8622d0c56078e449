"""The real node of this ring: a cluster of its own, the two images, the chart, and the story that leaves evidence."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import manifests, steps
from demo.kube import Kube
from devcluster.imagekeys import IMAGES, key_of
from devcluster.layout import REPOSITORY, cluster_paths
from devcluster.progress import Progress
from devcluster.tools import tool
from e2e import story

CLUSTER = "gpumeter-e2e"


def devcluster(*arguments: str) -> None:
    """The commands of the Makefile, with a cluster of this ring's own; their progress is the test's."""
    subprocess.run([sys.executable, "-m", "devcluster", *arguments, "--name", CLUSTER], cwd=REPOSITORY, check=True)


@pytest.fixture(scope="session")
def release(request: pytest.FixtureRequest) -> Iterator[steps.Demo]:
    """The installed chart on a real node that offers two GPUs it does not have, with the tenants' keys in place."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        progress = Progress()
        print(flush=True)
        devcluster("down")
        devcluster("up", "--gpus", "2")
        devcluster("images")
        paths = cluster_paths(CLUSTER)
        demo = steps.Demo(
            kube=Kube(tool("kubectl", progress), tool("helm", progress), paths.kubeconfig),
            progress=progress,
            repository=REPOSITORY,
            keys_file=paths.root / "keys.json",
            image_version="-".join(key_of(image, REPOSITORY, "")[:12] for image in IMAGES),
            model_uri=manifests.MODEL_URI,
        )
        context = demo.kube.run("config", "current-context").strip()
        assert context == f"gpumeter-{CLUSTER}", f"these tests did not make the context {context}"
        steps.install(demo)
        demo.kube.apply(manifests.price_plan())
    yield demo
    with capture.global_and_fixture_disabled():
        if os.environ.get("GPUMETER_KEEP_CLUSTER"):
            print(f"\nThe cluster {CLUSTER} is kept: KUBECONFIG={paths.kubeconfig}")
        else:
            devcluster("down")


@pytest.fixture(scope="session")
def keys(release: steps.Demo) -> dict[str, str]:
    """Key by tenant; the cluster has the hashes."""
    made = steps.kept_keys(release.keys_file)
    release.kube.apply(*(manifests.api_key_secret(tenant, key) for tenant, key in made.items()))
    return made


@pytest.fixture(scope="session")
def evidence(
    request: pytest.FixtureRequest,
    release: steps.Demo,
    keys: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> story.Evidence:
    """What the story left behind."""
    folder: Path = tmp_path_factory.mktemp("evidence")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(flush=True)
        return story.play(release, keys, folder)
