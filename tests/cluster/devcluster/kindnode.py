"""Backend `kind`: a node in a Docker container, made by kind, which is built from its own pinned module.

Owns kind's configuration and calls. Does not know what is put into the cluster.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from devcluster import tools
from devcluster.errors import ClusterError
from devcluster.layout import ClusterPaths, cache_root
from devcluster.processes import choose_port
from devcluster.progress import Progress
from devcluster.state import State, read_state

FIRST_PORT = 17443
MODELS = "/var/lib/gpumeter/models"


def up(paths: ClusterPaths, gpus: int, port: int | None, progress: Progress) -> State:
    programs = tools.ensure(tools.FOR_KIND, progress)
    state = read_state(paths.state)
    if kind_name(paths) in clusters(programs["kind"]):
        start_container(paths)
        chosen = state.port if state else port or 0
    else:
        chosen = port or choose_port(state.port if state else None, FIRST_PORT)
        paths.logs.mkdir(parents=True, exist_ok=True)
        models = cache_root() / "models"
        models.mkdir(parents=True, exist_ok=True)
        config = paths.root / "kind.json"
        config.write_text(json.dumps(configuration(chosen, models), indent=1))
        log = paths.logs / "kind.log"
        with progress.step("kind makes the node (it pulls its image the first time)"), log.open("wb") as output:
            command = [str(programs["kind"]), "create", "cluster", "--name", kind_name(paths), "--config", str(config)]
            done = subprocess.run(
                [*command, "--wait", "180s", "--kubeconfig", str(paths.root / "kind.kubeconfig")],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                raise ClusterError("kind could not make the cluster.", log)
    write_kubeconfig(paths, programs)
    return State("kind", chosen, gpus)


def configuration(port: int, models: Path) -> dict[str, Any]:
    """Return kind's configuration: the API on 127.0.0.1, the models mounted where the local node has them."""
    return {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "networking": {"apiServerAddress": "127.0.0.1", "apiServerPort": port},
        "nodes": [
            {
                "role": "control-plane",
                "extraMounts": [{"hostPath": str(models), "containerPath": MODELS, "readOnly": True}],
            }
        ],
    }


def write_kubeconfig(paths: ClusterPaths, programs: dict[str, Path]) -> None:
    """Rewrite kind's kubeconfig as JSON, with the context's name that every backend has."""
    text = output(programs["kind"], "get", "kubeconfig", "--name", kind_name(paths))
    raw = paths.root / "kind.kubeconfig"
    raw.write_text(text)
    view = json.loads(output(programs["kubectl"], f"--kubeconfig={raw}", "config", "view", "--raw", "-o", "json"))
    paths.kubeconfig.touch(mode=0o600)
    paths.kubeconfig.write_text(json.dumps(renamed(view, f"gpumeter-{paths.name}"), indent=1))
    raw.unlink()


def renamed(view: dict[str, Any], context: str) -> dict[str, Any]:
    """Give the only cluster, user and context of a kubeconfig one name."""
    return {
        **view,
        "clusters": [{**view["clusters"][0], "name": context}],
        "users": [{**view["users"][0], "name": context}],
        "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
        "current-context": context,
    }


def observe(paths: ClusterPaths) -> str:
    """Return the node container's state in Docker's word (running, exited, ...), or 'absent'."""
    command = ["docker", "inspect", "-f", "{{.State.Status}}", node_name(paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "absent"


def start_container(paths: ClusterPaths) -> None:
    if observe(paths) != "running":
        subprocess.run(["docker", "start", node_name(paths)], check=True, stdout=subprocess.DEVNULL)


def load(paths: ClusterPaths, reference: str) -> None:
    output(tools.tool("kind"), "load", "docker-image", reference, "--name", kind_name(paths))


def stop(paths: ClusterPaths) -> None:
    subprocess.run(["docker", "stop", node_name(paths)], check=False, capture_output=True)


def delete(paths: ClusterPaths, progress: Progress) -> None:
    kind = tools.ensure((tools.KIND,), progress)["kind"]
    output(kind, "delete", "cluster", "--name", kind_name(paths), "--kubeconfig", os.devnull)


def clusters(kind: Path) -> list[str]:
    return output(kind, "get", "clusters").split()


def kind_name(paths: ClusterPaths) -> str:
    return paths.name


def node_name(paths: ClusterPaths) -> str:
    return f"{kind_name(paths)}-control-plane"


def output(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{program.name} {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout
