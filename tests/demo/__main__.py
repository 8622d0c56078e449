"""The command line of the demo: python -m demo [--cluster NAME]. The cluster runs and holds the images already."""

import argparse
import sys
from pathlib import Path

from demo import steps
from demo.kube import DemoFailed, Kube
from demo.manifests import MODEL_URI, RELEASE, RELEASE_NAMESPACE
from devcluster.errors import ClusterError
from devcluster.imagekeys import IMAGES, key_of
from devcluster.layout import REPOSITORY, cluster_paths
from devcluster.progress import Progress
from devcluster.tools import tool


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--cluster", default="gpumeter", help="name of the local cluster (%(default)s)")
    parser.add_argument("--seconds", type=float, default=65, help="how long the tenants chat (%(default)s)")
    parser.add_argument("--model-uri", default=MODEL_URI, help="another model (%(default)s)")
    given = parser.parse_args()
    progress = Progress()
    try:
        play(given, progress)
    except (DemoFailed, ClusterError) as failed:
        evidence = getattr(failed, "evidence", "")
        if evidence:
            print(f"\n{evidence}", file=sys.stderr)
        print(f"\nThe demo failed after {progress.elapsed_s:.0f} s. {failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run it again: it goes on with what is there.", file=sys.stderr)
        return 130
    progress.say("the demo is done")
    return 0


def play(given: argparse.Namespace, progress: Progress) -> None:
    """All steps, from a cluster that runs to a bill that adds up."""
    paths = cluster_paths(given.cluster)
    if not paths.kubeconfig.exists():
        raise DemoFailed(f"There is no cluster {given.cluster}. Make it and the images first: make cluster-up images")
    demo = steps.Demo(
        kube=Kube(tool("kubectl", progress), tool("helm", progress), paths.kubeconfig),
        progress=progress,
        repository=REPOSITORY,
        keys_file=paths.root / "demo-keys.json",
        image_version="-".join(key_of(image, REPOSITORY, "")[:12] for image in IMAGES),
        model_uri=given.model_uri,
    )
    steps.install(demo)
    keys = steps.apply(demo)
    settled_ns = steps.wait_until_serving(demo)
    with demo.kube.forwarded(RELEASE_NAMESPACE, f"{RELEASE}-gateway", 80) as port:
        exchanges = steps.chat(demo, keys, port, given.seconds, Path(paths.root / "demo-traffic.json"))
    lines = steps.wait_for_final(demo, exchanges, settled_ns)
    steps.show(demo, lines)
    steps.farewell(demo, keys)


if __name__ == "__main__":
    sys.exit(main())
