"""`gpumeter uninstall-check`: refuses to let Helm remove gpumeter while InferenceServices exist.

Owns the sentence. Runs as the chart's pre-delete hook; its account may list InferenceServices and do nothing else.
"""

import asyncio
import sys
from collections.abc import Sequence

import click

from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, Cluster, Refused, Unreachable

NAMES_MAX = 10  # so that the sentence stays one that is read


@click.command("uninstall-check")
def uninstall_check() -> None:
    """Exit 1 with a sentence when InferenceServices exist; their last usage needs operator and collector."""
    try:
        names = asyncio.run(_services())
    except (Refused, Unreachable) as problem:
        sys.exit(f"Whether InferenceServices exist could not be asked: {problem}. Try helm uninstall again.")
    if (sentence := refusal(names)) is not None:
        sys.exit(sentence)
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
