"""The real node of `make test-development`: a cluster of its own, the three images, the chart, one notebook.

No ring of `make test`: the image with JupyterLab is built for nobody else.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from demo import manifests, steps
from demo.kube import Kube
from devcluster.imagekeys import DEVELOPMENT, IMAGES, key_of
from devcluster.layout import REPOSITORY, cluster_paths
from devcluster.progress import Progress
from devcluster.tools import tool
from development.notebook import Notebook, opened
from development.scene import Scene, settled
from e2e.stage import Stage

CLUSTER = "gpumeter-development"


def devcluster(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "devcluster", *arguments, "--name", CLUSTER], cwd=REPOSITORY, check=True)


@pytest.fixture(scope="session")
def release(request: pytest.FixtureRequest) -> Iterator[steps.Demo]:
    """The chart with `developmentImage`, on a node without GPUs."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        progress = Progress()
        print(flush=True)
        devcluster("down")
        devcluster("up", "--gpus", "0")
        devcluster("images", "--development")
        paths = cluster_paths(CLUSTER)
        demo = steps.Demo(
            kube=Kube(tool("kubectl", progress), tool("helm", progress), paths.kubeconfig),
            progress=progress,
            repository=REPOSITORY,
            keys_file=paths.root / "keys.json",
            image_version="-".join(key_of(image, REPOSITORY, "")[:12] for image in (*IMAGES, DEVELOPMENT)),
            model_uri=manifests.MODEL_URI,
        )
        steps.install(demo, developmentImage=DEVELOPMENT.reference)
    yield demo
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        if os.environ.get("GPUMETER_KEEP_CLUSTER"):
            print(f"\nThe cluster {CLUSTER} is kept: KUBECONFIG={paths.kubeconfig}")
        else:
            devcluster("down")


@pytest.fixture(scope="session")
def scene(release: steps.Demo) -> Scene:
    """The demo's service with `development: {jupyter: true}`, in a namespace that takes restricted pods alone."""
    service = manifests.inference_service(release.model_uri, release.image_version)
    service["spec"]["development"] = {"jupyter": True}
    release.kube.apply(manifests.price_plan(), manifests.namespace(manifests.TEAM))
    release.kube.apply(manifests.model_claim(), service)
    stage = Stage(release, manifests.TEAM, manifests.SERVICE)
    return Scene(release, stage, settled(stage))


@pytest.fixture(scope="session")
def notebook(scene: Scene) -> Iterator[Notebook]:
    """JupyterLab of that pod, opened with the commands of the condition."""
    with opened(scene.demo.kube, scene.ready["message"]) as notebook:
        yield notebook
