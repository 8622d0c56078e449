"""The gpumeter chart through the real helm: rendered, refused, explained.

Owns where helm is and the values that every rendering needs. Knows no cluster.
"""

import os
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver import ROOT
from devcluster import ClusterError, tool

CHART = ROOT / "charts" / "gpumeter"
IMAGES = (
    "image.repository=localhost/gpumeter-operator",
    "image.tag=dev",
    "workerImage.repository=localhost/gpumeter-worker",
    "workerImage.tag=dev",
)
NAMESPACE = "gpumeter-system"


@cache
def helm_path() -> Path:
    """$GPUMETER_HELM, or the pinned helm. Without Go it cannot be built; then a test is skipped, but never in CI."""
    if given := os.environ.get("GPUMETER_HELM"):
        return Path(given)
    try:
        return tool("helm")
    except ClusterError as problem:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"helm is missing: {problem.sentence}")


def helm(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm where no cluster can be reached by mistake."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("KUBE", "HELM"))}
    return subprocess.run(
        [str(helm_path()), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**clean, "KUBECONFIG": "/dev/null"},
    )


def template(*settings: str, release: str = "gpumeter", images: bool = True) -> subprocess.CompletedProcess[str]:
    """`helm template` with --set for each of the settings."""
    return helm("template", release, str(CHART), "-n", NAMESPACE, *sets(*(IMAGES if images else ()), *settings))


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def rendered(*settings: str, release: str = "gpumeter") -> list[dict[str, Any]]:
    done = template(*settings, release=release)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def objects(text: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(text) if one]


def one(found: Iterable[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The object of this kind and name, of which there must be exactly one."""
    [match] = [each for each in found if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return match


def pod_specs(found: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod specs by the name of their Deployment or Job."""
    return {
        each["metadata"]["name"]: each["spec"]["template"]["spec"]
        for each in found
        if each["kind"] in ("Deployment", "Job")
    }


def environment(pod: dict[str, Any]) -> dict[str, str]:
    """Plain environment variables of the first container."""
    return {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"] if "value" in entry}
