"""The real node of this ring: a cluster of its own, the two images, the chart, and the story that leaves evidence."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from demo import manifests, steps
from demo.kube import Kube
from devcluster.backends import LOCAL
from devcluster.imagekeys import IMAGES, key_of
from devcluster.layout import REPOSITORY, cluster_paths
from devcluster.places import Place
from devcluster.progress import Progress
from devcluster.state import read_state
from devcluster.tools import tool
from e2e import editstory, faultstory, nodestory, outagestory, sleeper, story
from e2e.ordeal import Evidence, Scene, settle

CLUSTER = "gpumeter-e2e"
FAULTS = ("test_2_faults", "test_3_faults")
SLEEP = ("test_2_zero",)
SECOND = Place(2)
LONG = ("edits", "nodes", "outages") if os.environ.get("GPUMETER_LONG_FAULTS") else ()  # set by make test-faults
STORIES = ("faults", *LONG)
collect_ignore_glob = [] if LONG else ["test_2_faults_*.py"]


def devcluster(*arguments: str) -> None:
    """The commands of the Makefile, with a cluster of this ring's own; their progress is the test's."""
    subprocess.run([sys.executable, "-m", "devcluster", *arguments, "--name", CLUSTER], cwd=REPOSITORY, check=True)


def shall_fail(request: pytest.FixtureRequest) -> bool:
    """Whether a test was asked for that loses a node, and the nodes are processes of our own."""
    return is_local() and is_asked_for(request, FAULTS)


def is_asked_for(request: pytest.FixtureRequest, files: tuple[str, ...]) -> bool:
    return any(file in item.nodeid for item in request.session.items for file in files)


def is_local() -> bool:
    state = read_state(cluster_paths(CLUSTER).state)
    return state is not None and state.backend == LOCAL


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
        two_nodes = shall_fail(request)
        if two_nodes:
            devcluster("up", "--nodes", "2")  # it gets the images by links as long as nothing runs in the first
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
        if two_nodes:
            demo.kube.run("cordon", SECOND.name)  # it is there to be lost, and the release is not
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
        evidence = story.play(release, keys, folder)
        if shall_fail(request):
            request.getfixturevalue("faults")  # the last minute of this story is over by then
        if is_asked_for(request, SLEEP):
            sleeper.begin(release)  # it falls asleep while others are tested
        story.settle(release, evidence, folder)
        return evidence


@pytest.fixture(scope="session")
def second_node(release: steps.Demo) -> Place:
    """A second node beside the one that runs the release, with the same images, open for workers."""
    if not is_local():
        pytest.skip("nodes are lost and cut off where devcluster made them itself: with the backend local")
    release.kube.run("uncordon", SECOND.name)
    return SECOND


def played(story_of_faults: ModuleType, name: str) -> Any:
    """A fixture of that name: what a service went through in a story of faults, and what it left behind."""

    @pytest.fixture(scope="session", name=name)
    def fixture(
        request: pytest.FixtureRequest,
        release: steps.Demo,
        keys: dict[str, str],
        second_node: Place,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Evidence:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(flush=True)
            devcluster("up", "--nodes", "2")  # a story before may have lost the second one
            scene = Scene(release, keys, cluster_paths(CLUSTER), second_node)
            evidence: Evidence = story_of_faults.play(scene, tmp_path_factory.mktemp(name))
            return evidence

    return fixture


faults = played(faultstory, "faults")
edits = played(editstory, "edits")
nodes = played(nodestory, "nodes")
outages = played(outagestory, "outages")


@pytest.fixture(scope="session", params=STORIES)
def settled(request: pytest.FixtureRequest, release: steps.Demo) -> Evidence:
    """A story of faults when its last period is Final."""
    evidence: Evidence = request.getfixturevalue(request.param)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        settle(release, evidence)
    return evidence
