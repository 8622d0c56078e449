"""What the local cluster concludes from the machine: backend, ports, processes, cgroups, programs, names."""

import io
from pathlib import Path

import pytest

from devcluster import backends, cgroups, layout, packages, processes, tools
from devcluster.backends import Machine
from devcluster.errors import ClusterError, last_lines
from devcluster.processes import Process
from devcluster.progress import Progress
from devcluster.state import State, decode, encode, read_state

ROOT_ON_LINUX = Machine(docker_works=False, system="Linux", is_root=True)
DOCKER_ON_MAC = Machine(docker_works=True, system="Darwin", is_root=False)


@pytest.mark.parametrize(
    ("wanted", "remembered", "machine", "chosen"),
    [
        ("auto", None, DOCKER_ON_MAC, "kind"),
        ("auto", None, ROOT_ON_LINUX, "local"),
        ("local", None, Machine(True, "Linux", True), "local"),
        ("current", None, ROOT_ON_LINUX, "current"),
        ("auto", "local", Machine(True, "Linux", True), "local"),
        ("auto", "current", DOCKER_ON_MAC, "current"),
    ],
)
def test_a_machine_gets_the_backend_that_works_there(
    wanted: str, remembered: str | None, machine: Machine, chosen: str
) -> None:
    assert backends.choose(wanted, remembered, machine).backend == chosen


@pytest.mark.parametrize(
    ("wanted", "remembered", "machine", "sentence"),
    [
        ("auto", None, Machine(False, "Linux", False), "start Docker, or run this as root"),
        ("auto", None, Machine(False, "Darwin", False), "Docker does not answer"),
        ("kind", None, ROOT_ON_LINUX, "kind needs it"),
        ("local", None, DOCKER_ON_MAC, "Only on Linux"),
        ("kind", "local", DOCKER_ON_MAC, "take it down first"),
    ],
)
def test_a_backend_that_cannot_work_is_refused_with_what_to_do(
    wanted: str, remembered: str | None, machine: Machine, sentence: str
) -> None:
    with pytest.raises(ClusterError, match=sentence):
        backends.choose(wanted, remembered, machine)


def test_the_remembered_port_is_taken_again() -> None:
    assert processes.choose_port(16500, 16443, lambda port: True) == 16500


def test_a_taken_port_is_passed_over() -> None:
    assert processes.choose_port(16443, 16443, lambda port: port > 16444) == 16445


def test_no_free_port_is_an_error() -> None:
    with pytest.raises(OSError, match="no free port"):
        processes.choose_port(None, 16443, lambda port: False)


def test_a_programs_name_with_parentheses_does_not_hide_its_start() -> None:
    rest = " ".join(["S", *("0" for _ in range(18)), "4711", "0"])
    assert processes.parse_stat(f"12 (a (b) c) {rest}\n") == ("S", 4711)


def test_another_process_with_the_same_pid_is_not_taken_for_ours(tmp_path: Path) -> None:
    running = processes.start(["sleep", "60"], tmp_path / "log")
    try:
        assert processes.is_alive(running)
        assert not processes.is_alive(Process(running.pid, running.start_ticks - 1))
    finally:
        assert processes.kill([running]) == []
    assert not processes.is_alive(running)


def test_a_process_enters_its_cgroups_before_it_begins(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    process = processes.start(["sleep", "60"], tmp_path / "log", cgroups=folders)
    try:
        assert processes.wait_until(lambda: all((folder / "cgroup.procs").exists() for folder in folders), 5)
        entered = {(folder / "cgroup.procs").read_text().strip() for folder in folders}
        assert entered == {str(process.pid)}
    finally:
        processes.kill([process])


VERSION_1 = """25 20 0:22 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
26 20 0:23 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
27 20 0:24 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
28 20 0:25 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
29 20 0:26 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
MEMBER_1 = "4:memory:/jobs/7\n3:cpu,cpuacct:/\n2:pids:/\n1:name=systemd:/\n0::/\n"
VERSION_2 = "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
OFFERED_1 = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t3\t1\t1\nmemory\t4\t1\t1\npids\t2\t1\t1\n"


def test_version_1_places_the_cluster_below_this_processs_own_groups() -> None:
    places = cgroups.places(cgroups.parse(VERSION_1, MEMBER_1), "demo")
    assert places == [
        Path("/sys/fs/cgroup/cpu,cpuacct/gpumeter-demo"),
        Path("/sys/fs/cgroup/memory/jobs/7/gpumeter-demo"),
        Path("/sys/fs/cgroup/pids/gpumeter-demo"),
        Path("/sys/fs/cgroup/systemd/gpumeter-demo"),
    ]


def test_version_2_places_the_cluster_at_the_top() -> None:
    mounted = cgroups.parse(VERSION_2, "0::/user.slice/session-1.scope\n")
    assert mounted.version == 2
    assert cgroups.places(mounted, "demo") == [Path("/sys/fs/cgroup/gpumeter-demo")]


def test_a_mount_that_shows_a_part_of_the_hierarchy_is_understood() -> None:
    line = "26 20 0:23 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    mounted = cgroups.parse(line, "4:memory:/docker/abc/inner\n")
    assert mounted.hierarchies[0].own == Path("/sys/fs/cgroup/memory/inner")


def test_a_missing_controller_is_named() -> None:
    mounted = cgroups.parse(VERSION_1.replace("pids", "net_cls"), MEMBER_1.replace("pids", "net_cls"))
    with pytest.raises(ClusterError, match="no cgroup controller pids"):
        cgroups.make(mounted, "demo")


def test_the_node_mounts_every_version_1_hierarchy_anew() -> None:
    mounts = cgroups.cgroup_mounts(cgroups.parse_membership(MEMBER_1, OFFERED_1))
    assert mounts == {"memory": "memory", "cpu,cpuacct": "cpu,cpuacct", "pids": "pids", "systemd": "none,name=systemd"}


def test_a_machine_without_version_1_controllers_has_version_2() -> None:
    unbound = OFFERED_1.replace("\t3\t", "\t0\t").replace("\t4\t", "\t0\t").replace("\t2\t", "\t0\t")
    assert cgroups.parse_membership("0::/\n", unbound).version == 2


@pytest.mark.parametrize("name", ["", "Demo", "1demo", "demo-", "a" * 31, "a/b", "../x"])
def test_a_name_that_would_break_paths_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="cannot name a cluster"):
        layout.checked_name(name)


def test_sockets_fit_into_the_108_bytes_that_the_kernel_allows() -> None:
    paths = layout.cluster_paths("a" * 30)
    assert len(str(paths.containerd_socket)) < 108


def test_the_cache_is_where_the_environment_says() -> None:
    assert layout.cache_root({"GPUMETER_CACHE": "/somewhere"}) == Path("/somewhere")


def module(folder: Path) -> Path:
    folder.mkdir()
    (folder / "go.mod").write_text("module example\n\nrequire k8s.io/kubernetes v1.36.3\n")
    (folder / "go.sum").write_text("sums\n")
    return folder


def test_another_pin_another_sum_or_another_source_is_another_tool(tmp_path: Path) -> None:
    folder = module(tmp_path / "kubernetes")
    keys = [tools.key_of(tools.KUBERNETES, folder)]
    (folder / "go.sum").write_text("other sums\n")
    keys.append(tools.key_of(tools.KUBERNETES, folder))
    (folder / "main.go").write_text("package main\n")
    keys.append(tools.key_of(tools.KUBERNETES, folder))
    (folder / "go.mod").write_text("module example\n\nrequire k8s.io/kubernetes v1.36.4\n")
    keys.append(tools.key_of(tools.KUBERNETES, folder))
    assert len(set(keys)) == 4


def test_kubernetes_is_told_its_own_version(tmp_path: Path) -> None:
    flags = tools.linker_flags(module(tmp_path / "kubernetes"))
    assert "gitVersion=v1.36.3" in flags
    assert "gitMajor=1" in flags
    assert "gitMinor=36" in flags


@pytest.mark.parametrize("tool_set", [*tools.FOR_NODE, tools.KIND], ids=lambda tool_set: tool_set.name)
def test_every_tool_has_its_pinned_module(tool_set: tools.ToolSet) -> None:
    assert (layout.MODULES / tool_set.module / "go.mod").is_file()


@pytest.mark.parametrize(
    ("text", "version"),
    [("go version go1.26.8 linux/amd64", (1, 26)), ("go version go1.19 linux/arm64", (1, 19)), ("", (0, 0))],
)
def test_gos_version_is_read(text: str, version: tuple[int, int]) -> None:
    assert tools.parse_go_version(text) == version


def test_a_program_that_no_machine_has_is_missing() -> None:
    assert packages.missing(["sh", "no-such-program"]) == ["no-such-program"]


def test_a_state_survives_being_written(tmp_path: Path) -> None:
    state = State("local", 16443, 2, {"node": Process(7, 99)}, ready=True)
    assert decode(encode(state)) == state
    (tmp_path / "state.json").write_text("{ cut off")
    assert read_state(tmp_path / "state.json") is None


def test_a_slow_step_says_that_it_lives() -> None:
    out = io.StringIO()
    progress = Progress(out=out, first_sign_s=0.01, next_sign_s=0.01)
    with progress.step("building", lambda: "7 packages"):
        assert processes.wait_until(lambda: out.getvalue().count("so far, 7 packages") >= 2, 10, 0.01)
    assert "] building (" in out.getvalue().splitlines()[-1]


def test_a_failed_step_says_so_and_the_log_is_cut_to_its_end(tmp_path: Path) -> None:
    out = io.StringIO()
    with pytest.raises(ClusterError), Progress(out=out).step("building"):
        raise ClusterError("It failed.")
    assert "building: FAILED after" in out.getvalue()
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    assert last_lines(log, 2) == ["line 98", "line 99"]
    assert last_lines(tmp_path / "none") == []
