"""Backend `current`: the cluster of the user's own kube context. Makes nothing in it.

Owns reading that context into a kubeconfig of its own. Does not change the user's files.
"""

import json
import subprocess

from devcluster import tools
from devcluster.errors import ClusterError
from devcluster.layout import ClusterPaths
from devcluster.progress import Progress
from devcluster.state import State


def up(paths: ClusterPaths, gpus: int, progress: Progress) -> State:
    """Write the current context, and nothing else of the user's, into the cluster's kubeconfig."""
    kubectl = tools.tool("kubectl", progress)
    view = subprocess.run(
        [kubectl, "config", "view", "--raw", "--minify", "--flatten", "-o", "json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if view.returncode != 0:
        raise ClusterError(f"There is no current kube context to use: {view.stderr.strip()}")
    paths.root.mkdir(parents=True, exist_ok=True)
    paths.kubeconfig.touch(mode=0o600)
    paths.kubeconfig.write_text(view.stdout)
    if not answers(paths, progress):
        context = json.loads(view.stdout)["current-context"]
        raise ClusterError(f"The cluster of the current context '{context}' does not answer.")
    return State("current", 0, gpus)


def answers(paths: ClusterPaths, progress: Progress) -> bool:
    kubectl = tools.tool("kubectl", progress)
    command = [str(kubectl), f"--kubeconfig={paths.kubeconfig}", "get", "--raw", "/readyz", "--request-timeout=5s"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
