"""The cgroups of one cluster: made below this process's own groups, so that everything in them is the cluster's.

Owns where they are (version 1 or 2), who is in them, and their removal. Does not know what runs in them.
"""

import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import ClusterError

NEEDED = ("cpu", "memory", "pids")
"""Without these the kubelet cannot run pods."""
WANTED_V2 = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")
CPUSET_FILES = ("cpuset.cpus", "cpuset.mems")


@dataclass(frozen=True)
class Hierarchy:
    """One mounted hierarchy: its controllers, where it is mounted, and this process's own group in it."""

    controllers: tuple[str, ...]
    mountpoint: Path
    own: Path


@dataclass(frozen=True)
class Mounted:
    """What the machine offers: version 2 when the kubelet can use it, else version 1."""

    version: int
    hierarchies: tuple[Hierarchy, ...]


def inspect() -> Mounted:
    return parse(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())


def inspect_membership() -> Mounted:
    """Find the hierarchies where nothing is mounted (yet): from the groups that this process is in."""
    return parse_membership(Path("/proc/self/cgroup").read_text(), Path("/proc/cgroups").read_text())


def parse_membership(membership: str, offered: str) -> Mounted:
    """Version 1 counts as soon as one needed controller is bound to it (hierarchy number other than 0)."""
    rows = [line.split() for line in offered.splitlines() if not line.startswith("#")]
    bound = {row[0] for row in rows if row[1] != "0"}
    if not bound & set(NEEDED):
        return Mounted(2, (Hierarchy((), Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup")),))
    hierarchies = []
    for line in membership.splitlines():
        _, controllers, _ = line.split(":", 2)
        if controllers:
            hierarchies.append(Hierarchy(tuple(controllers.split(",")), Path("/"), Path("/")))
    return Mounted(1, tuple(hierarchies))


def parse(mountinfo: str, membership: str) -> Mounted:
    """Find the hierarchies in /proc/self/mountinfo and this process's groups in /proc/self/cgroup."""
    groups: dict[str, str] = {}
    for line in membership.splitlines():
        _, controllers, group = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), group))
    version_1: list[Hierarchy] = []
    version_2: list[Hierarchy] = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, super_options = after.split()[:3]
        root, mountpoint = before.split()[3:5]
        if kind == "cgroup2":
            version_2.append(Hierarchy((), Path(mountpoint), own_folder(mountpoint, root, groups.get("", "/"))))
        elif kind == "cgroup":
            names = tuple(option for option in super_options.split(",") if option in groups)
            if names:
                own = own_folder(mountpoint, root, groups[names[0]])
                version_1.append(Hierarchy(names, Path(mountpoint), own))
    # Systemd's hybrid mounts version 2 beside version 1, without controllers: only /sys/fs/cgroup itself counts.
    unified = [hierarchy for hierarchy in version_2 if str(hierarchy.mountpoint) == "/sys/fs/cgroup"]
    if unified:
        return Mounted(2, tuple(unified[:1]))
    return Mounted(1, tuple({hierarchy.controllers: hierarchy for hierarchy in version_1}.values()))


def own_folder(mountpoint: str, root: str, group: str) -> Path:
    """Return where this process's group is seen below the mount; a mount may show only a part of the hierarchy."""
    relative = os.path.relpath(group, root) if group.startswith(root.rstrip("/") + "/") or group == root else "."
    return Path(mountpoint) / relative


def folder_name(cluster: str) -> str:
    return f"gpumeter-{cluster}"


def make(mounted: Mounted, cluster: str) -> list[Path]:
    """Make the cluster's group in every hierarchy; a process enters the cluster by entering all of them."""
    available = {controller for hierarchy in mounted.hierarchies for controller in hierarchy.controllers}
    if mounted.version == 2:
        parent = mounted.hierarchies[0].mountpoint
        available = set((parent / "cgroup.controllers").read_text().split())
    missing = [controller for controller in NEEDED if controller not in available]
    if missing:
        raise ClusterError(f"This machine offers no cgroup controller {', '.join(missing)}; the kubelet needs it.")
    folders = places(mounted, cluster)
    if mounted.version == 2:
        top = folders[0].parent
        if not hands_down(top):
            vacate(top)
            if not hands_down(top):
                raise ClusterError(f"The cgroup controllers at {top} cannot be handed down to a cluster's group.")
    for folder in folders:
        folder.mkdir(exist_ok=True)
        for file in CPUSET_FILES:  # version 1 starts a cpuset empty, and nothing can enter an empty one
            if (folder / file).exists() and not (folder / file).read_text().strip():
                (folder / file).write_text((folder.parent / file).read_text())
    return folders


def places(mounted: Mounted, cluster: str) -> list[Path]:
    """Below our own groups in version 1; at the top in version 2, where only a group without processes has children."""
    name = folder_name(cluster)
    if mounted.version == 2:
        return [mounted.hierarchies[0].mountpoint / name]
    return [hierarchy.own / name for hierarchy in mounted.hierarchies]


def hands_down(group: Path) -> bool:
    """Give a version 2 group's controllers to its children; False while the group still holds processes."""
    offered = (group / "cgroup.controllers").read_text().split()
    wanted = " ".join(f"+{controller}" for controller in WANTED_V2 if controller in offered)
    try:
        (group / "cgroup.subtree_control").write_text(wanted)
    except OSError:
        return False
    return True


def vacate(group: Path) -> None:
    """Move the processes of the topmost group into a child, as every container that runs a kubelet has to."""
    child = group / "gpumeter-others"
    child.mkdir(exist_ok=True)
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(OSError):  # kernel threads and processes that just ended
            (child / "cgroup.procs").write_text(pid)


def find(cluster: str, mounted: Mounted) -> list[Path]:
    """Find the cluster's groups, also those made by a process that was in other groups than this one."""
    name = folder_name(cluster)
    found: list[Path] = []
    for hierarchy in mounted.hierarchies:
        for folder, children, _ in os.walk(hierarchy.mountpoint):
            if name in children:
                found.append(Path(folder) / name)
            children[:] = [child for child in children if not child.startswith("gpumeter-")]
    return found


def members(folders: Iterable[Path]) -> set[int]:
    pids: set[int] = set()
    for folder in folders:
        for file in folder.rglob("cgroup.procs"):
            with suppress(OSError):
                pids.update(map(int, file.read_text().split()))
    return pids - {0, os.getpid()}


def remove(folders: Iterable[Path], timeout_s: float = 20.0) -> None:
    """Kill everything in the groups and remove them, deepest first; a group stays busy until its zombies are gone."""
    folders = list(folders)
    end = time.monotonic() + timeout_s
    while any(folder.exists() for folder in folders):
        for pid in members(folders):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for folder in folders:
            deepest_first = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
            for path in [*deepest_first, folder]:
                with suppress(OSError):
                    path.rmdir()
        if time.monotonic() > end:
            raise ClusterError(f"These cgroups cannot be removed: {', '.join(map(str, folders))}.")
        time.sleep(0.02)


def cgroup_mounts(mounted: Mounted) -> Mapping[str, str]:
    """Return what a namespace of its own mounts below /sys/fs/cgroup in version 1: folder -> mount options."""
    mounts: dict[str, str] = {}
    for hierarchy in mounted.hierarchies:
        names = [name.removeprefix("name=") for name in hierarchy.controllers]
        options = ",".join(f"none,{name}" if name.startswith("name=") else name for name in hierarchy.controllers)
        mounts[",".join(names)] = options
    return mounts
