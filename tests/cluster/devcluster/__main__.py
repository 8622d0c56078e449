"""The command line: python -m devcluster up|down|status|images|model|control-plane|...

Owns arguments and how a failure is printed. Does nothing itself.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from devcluster import backends, cluster, controlplane, images, model, othernodes, tools
from devcluster.errors import ClusterError, last_lines
from devcluster.layout import cluster_paths
from devcluster.places import NODES_MAX, Place
from devcluster.progress import Progress
from devcluster.state import locked


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    progress = Progress()
    try:
        return int(options.run(options, progress) or 0)
    except ClusterError as problem:
        print(f"\n{problem.sentence}", file=sys.stderr)
        if problem.log:
            print(f"The last lines of {problem.log}:", file=sys.stderr)
            print("\n".join(f"  {line}" for line in last_lines(problem.log)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where this one ended.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="devcluster", description="A real local Kubernetes for development and tests.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, *, named: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        if named:
            made.add_argument("--name", default=cluster.DEFAULT_NAME, help="the cluster's name (default: %(default)s)")
        made.set_defaults(run=run)
        return made

    up = command("up", run_up, "bring the cluster up, or repair it; does nothing where nothing is to do")
    up.add_argument("--backend", choices=backends.NAMES, default=backends.AUTO, help="default: %(default)s")
    up.add_argument("--gpus", type=int, help=f"nvidia.com/gpu that the node offers (default: {cluster.DEFAULT_GPUS})")
    up.add_argument("--nodes", type=int, help=f"nodes, 1 to {NODES_MAX}, of the backend local (default: as it was)")
    up.add_argument("--port", type=int, help="port of the API on 127.0.0.1 (default: a free one, remembered)")
    up.add_argument("--no-model", action="store_true", help="do not convert the model; offer it if it is there")
    down = command("down", run_down, "end the cluster and remove all that it made")
    down.add_argument("--keep-data", action="store_true", help="keep etcd, images and volumes for the next up")
    fault = command("node", run_node, "lose a node beside the first, cut it off, mend the cut, or bring it back")
    fault.add_argument("action", choices=["lose", "cut", "mend", "back"])
    fault.add_argument("--number", type=int, default=2, help="which node (default: %(default)s)")
    command("status", run_status, "say what runs and where its logs are; exit code 1 when something is wrong")
    built = command("images", run_images, "build the images that have changed and load them into the cluster")
    built.add_argument("--only", choices=["operator", "worker"], help="one of the two (default: both)")
    built.add_argument(
        "--development", action="store_true", help="the worker's and, of it, the one with JupyterLab too"
    )
    built.add_argument("--operator-base", metavar="IMAGE", help="base image of the operator")
    built.add_argument("--worker-base", metavar="IMAGE", help="base image of the worker: python3 with torch and pip")
    command("kubeconfig", run_kubeconfig, "print the path of the cluster's kubeconfig")
    command("env", run_env, 'print what `eval "$(...)"` needs for kubectl and helm to meet this cluster')
    command("model", run_model, "convert the model and print its folder", named=False)
    command("tools", run_tools, "build every program of the local backend ahead of time", named=False)
    plane = commands.add_parser("control-plane", help="API server, etcd and controller manager alone: up or down")
    plane.add_argument("action", choices=["up", "down"])
    plane.add_argument("--name", default="test", help="name of the control plane (default: %(default)s)")
    plane.set_defaults(run=run_control_plane)
    return top


def run_up(options: argparse.Namespace, progress: Progress) -> None:
    if options.gpus is not None and options.gpus < 0:
        raise ClusterError(f"--gpus takes 0 or more, not {options.gpus}.")
    if options.nodes is not None and not 1 <= options.nodes <= NODES_MAX:
        raise ClusterError(f"--nodes takes 1 to {NODES_MAX}, not {options.nodes}.")
    wish = cluster.Wish(
        options.name, options.backend, options.gpus, options.port, options.nodes, with_model=not options.no_model
    )
    cluster.up(wish, progress)


def run_down(options: argparse.Namespace, progress: Progress) -> None:
    cluster.down(options.name, progress, keep_data=options.keep_data)


def run_node(options: argparse.Namespace, progress: Progress) -> None:
    paths, place = cluster_paths(options.name), Place(options.number)
    with locked(paths.lock, progress):
        if options.action == "back":
            othernodes.bring_back(paths, place, progress)
        else:
            {"lose": othernodes.lose, "cut": othernodes.cut_off, "mend": othernodes.mend}[options.action](paths, place)
    progress.say(f"{place.name}: {options.action}")


def run_status(options: argparse.Namespace, progress: Progress) -> int:
    return cluster.status(options.name, progress)


def run_images(options: argparse.Namespace, progress: Progress) -> None:
    named = {"operator": options.operator_base, "worker": options.worker_base}
    bases = {distribution: base for distribution, base in named.items() if base}
    only = (options.only,) if options.only else ()
    images.build_and_load(images.Wish(options.name, bases, only, development=options.development), progress)


def run_kubeconfig(options: argparse.Namespace, progress: Progress) -> None:
    kubeconfig = cluster_paths(options.name).kubeconfig
    if not kubeconfig.exists():
        raise ClusterError(f"There is no cluster '{options.name}': bring it up with `devcluster up`.")
    print(kubeconfig)


def run_env(options: argparse.Namespace, progress: Progress) -> None:
    folders = {str(tools.tool(program, progress).parent): None for program in ("kubectl", "helm")}
    print(f"export KUBECONFIG={shlex.quote(str(cluster_paths(options.name).kubeconfig))}")
    print(f"export PATH={shlex.quote(os.pathsep.join(folders))}:$PATH")


def run_model(options: argparse.Namespace, progress: Progress) -> None:
    print(model.ensure(progress) / model.FOLDER)


def run_tools(options: argparse.Namespace, progress: Progress) -> None:
    for program, path in sorted(tools.ensure(tools.FOR_NODE, progress).items()):
        print(f"{program}\t{path}")


def run_control_plane(options: argparse.Namespace, progress: Progress) -> None:
    if options.action == "down":
        controlplane.down(options.name, progress)
    else:
        print(controlplane.up(options.name, progress).kubeconfig)


if __name__ == "__main__":
    sys.exit(main())
