"""A test's API server, spoken to directly and through kubectl or helm, and the manifests that it is asked about.

Owns the request, the shape of a refusal and the programs' clean environment. Does not start the server; conftest does.
"""

import copy
import http.client
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from devcluster import tool
from devcluster.apiclient import open_api

Run = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = Path(__file__).parent / "manifests"
CRDS = ("inferenceservices", "priceplans", "usagepackages", "usagereports")


@dataclass(frozen=True)
class Answer:
    """What the API server said: its code and the object, or the Status of a refusal."""

    code: int
    body: dict[str, Any]

    @property
    def causes(self) -> list[tuple[str, str]]:
        """(field, message) of every cause of a refusal."""
        causes = (self.body.get("details") or {}).get("causes") or []
        return [(cause.get("field", ""), cause["message"]) for cause in causes]


class Server:
    """One API server, spoken to as its administrator."""

    def __init__(self, kubeconfig: Path) -> None:
        self.api = open_api(kubeconfig)

    def call(self, method: str, path: str, body: object = None, *, user: str = "") -> Answer:
        """One request, as the administrator or as `user`."""
        connection = http.client.HTTPSConnection(
            self.api.address.hostname or "", self.api.address.port, timeout=30, context=self.api.tls
        )
        try:
            payload = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json", **({"Impersonate-User": user} if user else {})}
            connection.request(method, path, payload, headers)
            answer = connection.getresponse()
            return Answer(answer.status, json.loads(answer.read()))
        finally:
            connection.close()

    def create(self, namespace: str, plural: str, manifest: dict[str, Any], *, dry: bool = False) -> Answer:
        return self.call("POST", collection(namespace, plural) + ("?dryRun=All" if dry else ""), manifest)

    def replace(
        self, namespace: str, plural: str, manifest: dict[str, Any], *, status: bool = False, dry: bool = False
    ) -> Answer:
        path = f"{collection(namespace, plural)}/{manifest['metadata']['name']}"
        return self.call("PUT", path + ("/status" if status else "") + ("?dryRun=All" if dry else ""), manifest)

    def delete(self, namespace: str, plural: str, name: str) -> Answer:
        return self.call("DELETE", f"{collection(namespace, plural)}/{name}")


def collection(namespace: str, plural: str) -> str:
    scope = "" if plural == "priceplans" else f"/namespaces/{namespace}"
    return f"/apis/gpumeter.io/v1alpha1{scope}/{plural}"


def merged(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7386: objects are merged, null removes, anything else replaces."""
    result = copy.deepcopy(base)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def rule_file(plural: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((MANIFESTS / f"{plural}.yaml").read_text())
    return loaded


def schema_of(plural: str) -> dict[str, Any]:
    """The OpenAPI schema of the one version in crds/."""
    definition = yaml.safe_load((ROOT / "crds" / f"{plural}.yaml").read_text())
    schema: dict[str, Any] = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def runner(program: str, kubeconfig: Path, **environment: str) -> Run:
    """A function that runs the pinned program against one kubeconfig and nothing of the user's own."""
    path = str(tool(program))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("KUBE", "HELM"))}

    def run(
        *arguments: str, stdin: str | None = None, check: bool = True, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [path, f"--kubeconfig={kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=cwd,
            env={**clean, **environment},
        )
        assert not check or done.returncode == 0, f"{program} {' '.join(arguments)}: {done.stderr or done.stdout}"
        return done

    return run


def eventually(look: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Poll until `look` is true; what a controller does takes its time."""
    end = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)
