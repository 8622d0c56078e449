"""The command line: python -m devcluster up|down|status|control-plane|...

Owns arguments and how a failure is printed. Does nothing itself.
"""

import argparse
import sys
from collections.abc import Sequence

from devcluster import controlplane
from devcluster.errors import ClusterError, last_lines
from devcluster.progress import Progress


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
    plane = commands.add_parser("control-plane", help="API server, etcd and controller manager alone: up or down")
    plane.add_argument("action", choices=["up", "down"])
    plane.add_argument("--name", default="test", help="name of the control plane (default: %(default)s)")
    plane.set_defaults(run=run_control_plane)
    return top


def run_control_plane(options: argparse.Namespace, progress: Progress) -> None:
    if options.action == "down":
        controlplane.down(options.name, progress)
    else:
        print(controlplane.up(options.name, progress).kubeconfig)


if __name__ == "__main__":
    sys.exit(main())
