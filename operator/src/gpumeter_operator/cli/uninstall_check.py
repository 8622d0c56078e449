"""`gpumeter uninstall-check`: refuses to let Helm remove gpumeter while InferenceServices exist.

Owns the sentence. Runs as the chart's pre-delete hook; its account may list InferenceServices and do nothing else.

A hook is the one moment at which Helm has removed nothing yet, and the one place that sees the services of all
namespaces: an admission policy meets one object after another was removed, finalizers hold what Helm waits for and not
Helm. Its price is Helm's own: a release whose pre-delete hook failed is left `uninstalling` (helm/helm#9700), and no
upgrade takes it until it is rolled back. So the sentence names the command that does it.
"""

import asyncio
import sys
from collections.abc import Sequence

import click

from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, Cluster, Refused, Unreachable

NAMES_MAX = 10  # so that the sentence stays one that is read


@click.command("uninstall-check")
@click.option("--release", metavar="NAME", help="The Helm release that is to go.")
@click.option("--namespace", metavar="NAME", help="Its namespace.")
@click.option("--revision", metavar="NUMBER", type=int, help="Its revision, to which it can be rolled back.")
def uninstall_check(release: str | None, namespace: str | None, revision: int | None) -> None:
    """Exit 1 with a sentence when InferenceServices exist; their last usage needs operator and collector."""
    way_back = keeping(release or "RELEASE", namespace or "NAMESPACE", "REVISION" if revision is None else revision)
    try:
        names = asyncio.run(_services())
    except (Refused, Unreachable) as problem:
        told = str(problem).rstrip(".")
        sys.exit(f"Whether InferenceServices exist could not be asked: {told}. Try helm uninstall again. {way_back}")
    if (sentence := refusal(names)) is not None:
        sys.exit(f"{sentence} {way_back}")
    click.echo("No InferenceService exists; gpumeter can be uninstalled.")


def refusal(names: Sequence[str]) -> str | None:
    """What is to be done before gpumeter goes; None when nothing is."""
    if not names:
        return None
    left_out = len(names) - NAMES_MAX
    shown = ", ".join(sorted(names)[:NAMES_MAX]) + (f" and {left_out} more" if left_out > 0 else "")
    count = "1 InferenceService exists" if len(names) == 1 else f"{len(names)} InferenceServices exist"
    return (
        f"{count}: {shown}. Delete them first (kubectl delete inferenceservices.gpumeter.io --all --all-namespaces), "
        "because only a running operator and collector can collect their last usage and let them go; then run helm "
        "uninstall again. (Add --no-hooks to it only where another gpumeter goes on serving them.)"
    )


def keeping(release: str, namespace: str, revision: int | str) -> str:
    """How gpumeter stays installed after a refusal; everything runs on, but Helm would not upgrade it."""
    return (
        f"To keep gpumeter instead: helm rollback {release} {revision} -n {namespace}; Helm upgrades no release whose "
        "uninstall was refused before that."
    )


async def _services() -> list[str]:
    cluster = Cluster.connect()
    try:
        services = await cluster.list(INFERENCE_SERVICES)
    except Refused as refused:
        if refused.status == 404:  # the CRD is gone, and every InferenceService with it
            return []
        raise
    finally:
        await cluster.close()
    return [f"{service['metadata']['namespace']}/{service['metadata']['name']}" for service in services]
