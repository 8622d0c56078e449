"""The service with a notebook: what is waited for, and what the documents say of it.

Owns no object: conftest.py makes them. What JupyterLab answers is notebook.py's.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from demo import steps
from devcluster.layout import REPOSITORY
from e2e.stage import Stage, is_ready
from e2e.story import until

READY_WITHIN_S = 150


@dataclass(frozen=True)
class Scene:
    """A service that runs a notebook, and Ready's condition."""

    demo: steps.Demo
    stage: Stage
    ready: dict[str, Any]

    def pod(self) -> dict[str, Any]:
        """The one pod of the service."""
        [pod] = self.stage.pods()
        return pod


def settled(stage: Stage) -> dict[str, Any]:
    """Wait for one pod that is Ready and no other; returns the service's condition Ready."""

    def there() -> bool:
        pods = stage.pods()
        return len(pods) == 1 and is_ready(pods[0])

    with stage.demo.progress.step(f"{stage.namespace}/{stage.name}: a notebook", stage.told):
        until(there, READY_WITHIN_S, lambda: steps.service_evidence(stage.demo))
        return stage.await_reason("Development", 20)


def documented_spec() -> dict[str, Any]:
    """The part of a spec that docs/services.md gives for a notebook whose files stay."""
    text = (REPOSITORY / "docs/services.md").read_text()
    [block] = re.findall(r"^## A notebook\n.*?^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = yaml.safe_load(block)["spec"]
    return found
