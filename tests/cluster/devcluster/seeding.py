"""The first node's images for a node that begins: the same files, so that nothing is sent or unpacked again.

Owns the copy of a containerd's root. Content and unpacked layers are never written to once they are there, so both
nodes have them by hard links; the two databases that name them are copied while their owner stands still.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

from devcluster import tools
from devcluster.layout import ClusterPaths
from devcluster.processes import Process, children

LINKED = ("io.containerd.content.v1.content/blobs", "io.containerd.snapshotter.v1.overlayfs/snapshots")
COPIED = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")


def seed(paths: ClusterPaths, node: Process, own: ClusterPaths) -> bool:
    """Give `own` the images of the first node; False where it has some already, or where containers stand in the way.

    The databases also know the first node's containers, and the second must not take them for its own.
    """
    source, target = (one.root / "containerd" / "root" for one in (paths, own))
    if target.exists() or not all((source / name).exists() for name in (*LINKED, *COPIED)) or has_containers(paths):
        return False
    owner = next(one for one in children(node) if is_containerd(one))
    fresh = target.with_name("root.new")
    shutil.rmtree(fresh, ignore_errors=True)
    os.kill(owner.pid, signal.SIGSTOP)
    try:
        for name in COPIED:
            (fresh / name).parent.mkdir(parents=True)
            shutil.copy2(source / name, fresh / name)
        for name in LINKED:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "--archive", "--link", str(source / name), str(fresh / name)], check=True)
    finally:
        os.kill(owner.pid, signal.SIGCONT)
    fresh.rename(target)
    return True


def has_containers(paths: ClusterPaths) -> bool:
    ctr = str(tools.folder_of(tools.CONTAINERD) / "ctr")
    command = [ctr, "-a", str(paths.containerd_socket), "-n", "k8s.io", "containers", "ls", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode != 0 or bool(done.stdout.strip())


def is_containerd(process: Process) -> bool:
    return Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/containerd")
