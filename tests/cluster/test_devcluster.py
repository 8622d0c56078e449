"""The local cluster itself: side by side with another, repaired after a death, and gone without a trace."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster import backends, cgroups, cluster, control_plane, controlplane, localnode, othernodes, places, processes
from devcluster.apiclient import open_api
from devcluster.layout import ClusterPaths, cluster_paths, control_plane_paths, other_node_paths
from devcluster.processes import Process, is_alive, wait_until
from devcluster.progress import Progress
from devcluster.state import State, read_state

CONFIGMAPS = "/api/v1/namespaces/default/configmaps"
NAME = "gpumeter-ring"
SECOND = places.Place(2)
QUIET = Progress(quiet=True)
HOLDER = """
import sys
from devcluster import control_plane
with control_plane("orphan") as kubeconfig:
    print(kubeconfig, flush=True)
    sys.stdin.read()
"""


def test_two_control_planes_side_by_side_know_nothing_of_each_other(plane: Path) -> None:
    with control_plane("beside") as other:
        open_api(other).request("POST", CONFIGMAPS, {"metadata": {"name": "only-there"}})
        assert open_api(other).exists(f"{CONFIGMAPS}/only-there")
        assert not open_api(plane).exists(f"{CONFIGMAPS}/only-there")


def test_a_control_plane_leaves_no_process_no_port_and_no_file() -> None:
    with control_plane("gone") as kubeconfig:
        folder = kubeconfig.parent
        state = running(folder / "state.json")
        assert set(state.processes) == {"etcd", "kube-apiserver", "kube-controller-manager"}
        assert all(map(is_alive, state.processes.values()))
        assert not processes.port_is_free(state.port)
    assert not any(map(is_alive, state.processes.values()))
    assert processes.port_is_free(state.port)
    assert not folder.exists()


def test_a_control_plane_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) binds the control plane's life to its process, and is not here")
    package = str(Path(controlplane.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package}
    pipe = subprocess.PIPE
    child = subprocess.Popen(["python3", "-c", HOLDER], stdin=pipe, stdout=pipe, text=True, env=environment)
    assert child.stdout is not None
    folder = Path(child.stdout.readline().strip()).parent
    try:
        state = running(folder / "state.json")
        child.kill()
        child.wait()
        assert wait_until(lambda: not any(map(is_alive, state.processes.values())), 10)
    finally:
        child.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_control_plane_from_the_command_line_stays_until_it_is_taken_down() -> None:
    paths = controlplane.up("ring", QUIET)
    try:
        first = running(paths.state)
        controlplane.up("ring", QUIET)
        assert running(paths.state) == first, "a second `up` started something again"
        os.kill(first.processes["etcd"].pid, signal.SIGKILL)
        assert wait_until(lambda: not is_alive(first.processes["etcd"]), 10)
        controlplane.up("ring", QUIET)
        assert open_api(paths.kubeconfig).is_ready()
    finally:
        last = running(paths.state)
        controlplane.down("ring", QUIET)
    assert not any(map(is_alive, last.processes.values()))
    assert not control_plane_paths("ring").root.exists()


@pytest.fixture(scope="module")
def node() -> Iterator[ClusterPaths]:
    """A cluster of this ring's own with two nodes, without a model; removed afterwards whatever happens."""
    if not backends.can_be_local():
        pytest.skip("a node in namespaces of its own needs Linux and root")
    try:
        yield cluster.up(cluster.Wish(NAME, backends.LOCAL, gpus=3, nodes=2, with_model=False), QUIET)
    finally:
        cluster.down(NAME, QUIET, keep_data=False)


def test_the_node_offers_what_was_asked_for(node: ClusterPaths) -> None:
    api = open_api(node.kubeconfig)
    status = api.get(places.FIRST.path)["status"]
    assert status["capacity"]["nvidia.com/gpu"] == status["allocatable"]["nvidia.com/gpu"] == "3"
    assert json.loads(node.kubeconfig.read_text())["current-context"] == f"gpumeter-{NAME}"


def test_the_second_node_is_reached_until_its_wire_is_cut(node: ClusterPaths) -> None:
    api = open_api(node.kubeconfig, timeout_s=3)
    assert api.get(SECOND.path)["status"]["capacity"]["nvidia.com/gpu"] == "3"
    kubelet = f"{SECOND.path}/proxy/healthz"
    assert api.get(kubelet) == "ok"
    othernodes.cut_off(node, SECOND)
    assert not api.exists(kubelet)
    othernodes.mend(node, SECOND)
    assert wait_until(lambda: api.exists(kubelet), 10)


def test_a_second_node_that_was_lost_comes_back_with_its_disk(node: ClusterPaths) -> None:
    own = other_node_paths(node, SECOND.number)
    before = running(own.state)
    inside = [child for process in before.processes.values() for child in processes.children(process)]
    (own.root / "var/lib/gpumeter/volumes/kept.txt").write_text("still here")
    othernodes.lose(node, SECOND)
    assert [one for one in (*before.processes.values(), *inside) if is_alive(one)] == []
    assert cluster.problems(node, running(node.state)) == [f"{SECOND.name} does not run (`up` starts it again)"]
    othernodes.bring_back(node, SECOND, QUIET)
    assert cluster.problems(node, running(node.state)) == []
    assert (own.root / "var/lib/gpumeter/volumes/kept.txt").exists()


def test_up_on_a_running_node_starts_nothing_again(node: ClusterPaths) -> None:
    before = running(node.state)
    cluster.up(cluster.Wish(NAME), QUIET)
    assert running(node.state) == before


def test_a_released_volume_comes_back_empty_with_the_next_up(node: ClusterPaths) -> None:
    api = open_api(node.kubeconfig)
    folder = node.root / "var/lib/gpumeter/volumes/standard-00"
    (folder / "old.txt").write_text("left by somebody")
    path = "/api/v1/persistentvolumes/standard-00"
    reference = {"kind": "PersistentVolumeClaim", "namespace": "default", "name": "gone", "uid": "1-2-3"}
    api.merge(path, {"spec": {"claimRef": reference}})
    assert wait_until(lambda: api.get(path)["status"]["phase"] == "Released", 30)
    cluster.up(cluster.Wish(NAME), QUIET)
    assert wait_until(lambda: api.get(path)["status"]["phase"] == "Available", 30)
    assert list(folder.iterdir()) == []


def test_a_dead_component_is_named_and_up_starts_it_again(
    node: ClusterPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    state = running(node.state)
    scheduler = next(one for one in processes.children(state.processes["node"]) if is_program(one, "kube-scheduler"))
    os.kill(scheduler.pid, signal.SIGKILL)
    assert wait_until(lambda: bool(localnode.observe(node, state).ended), 10)
    assert cluster.status(NAME, QUIET) == 1
    assert "problem: kube-scheduler has ended with code -9" in capsys.readouterr().out
    cluster.up(cluster.Wish(NAME), QUIET)
    assert cluster.status(NAME, QUIET) == 0


def test_a_node_that_was_killed_comes_back_with_its_data(node: ClusterPaths) -> None:
    open_api(node.kubeconfig).request("POST", CONFIGMAPS, {"metadata": {"name": "kept"}})
    killed = running(node.state).processes["node"]
    os.kill(killed.pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(killed), 10)
    cluster.up(cluster.Wish(NAME), QUIET)
    assert open_api(node.kubeconfig).exists(f"{CONFIGMAPS}/kept")


def test_down_leaves_no_process_mount_socket_cgroup_port_or_file(node: ClusterPaths) -> None:
    cluster.up(cluster.Wish(NAME), QUIET)
    state, second = running(node.state), other_node_paths(node, SECOND.number)
    everything = [*state.processes.values(), *running(second.state).processes.values()]
    inside = [child for process in everything for child in processes.children(process)]
    assert len(inside) >= 8 + 3
    groups = (NAME, second.name)
    assert all(cgroups.find(name, cgroups.inspect()) for name in groups)
    cluster.down(NAME, QUIET, keep_data=False)
    assert [one for one in (*everything, *inside) if is_alive(one)] == []
    assert not any(cgroups.find(name, cgroups.inspect()) for name in groups)
    assert NAME not in Path("/proc/self/mountinfo").read_text()
    assert NAME not in Path("/proc/net/unix").read_text()
    assert processes.port_is_free(state.port)
    paths = cluster_paths(NAME)
    assert [path for path in (paths.root, paths.lock, paths.sockets, second.sockets) if path.exists()] == []


def running(state_file: Path) -> State:
    state = read_state(state_file)
    assert state is not None
    return state


def is_program(process: Process, name: str) -> bool:
    return Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0].endswith(name.encode())
