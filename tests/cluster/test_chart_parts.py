"""Operator, collector and gateway, started with the chart's environment and each with its own account's rights.

What the chart gives must be enough: whoever is forbidden something says so in its log.
"""

import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apiserver import Run, Server, eventually, merged, rule_file
from charts import environment, pod_specs, rendered
from rigs.audited import PRIVATE_PEM
from rigs.ports import hold_port

PARTS = ("operator", "collector", "gateway")
SMALL = merged(rule_file("inferenceservices")["base"], {"spec": {"resources": {"gpu": {"count": 0}}}})


@dataclass(frozen=True)
class Part:
    """One running part: its process, where it listens and what it says."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and text; status 0 while nobody listens."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read().decode()
        except OSError:
            return 0, ""

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return self.get("/readyz")[0] == 200


@pytest.fixture(scope="module")
def parts(
    release: str, plane: Path, kubectl: Run, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Part]]:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "master-key").write_text("k" * 64)
    (folder / "signing-key").write_bytes(PRIVATE_PEM)
    pods = pod_specs(rendered())
    started: dict[str, Part] = {}
    try:
        for name in PARTS:
            token = kubectl("create", "token", f"gpumeter-{name}", "-n", release).stdout.strip()
            port = hold_port()
            own = {
                "KUBECONFIG": str(kubeconfig_of(token, plane, folder / f"{name}.kubeconfig")),
                "GPUMETER_NAMESPACE": release,
                "GPUMETER_MASTER_KEY_FILE": str(folder / "master-key"),
                "GPUMETER_SIGNING_KEY_FILE": str(folder / "signing-key"),
                "GPUMETER_DIGESTS_FILE": str(folder / "digests.jsonl"),
                "GPUMETER_LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}",
                **dict.fromkeys(("GPUMETER_HTTP_PORT", "GPUMETER_GATEWAY_PORT"), str(port)),
                "GPUMETER_GATEWAY_INTERNAL_PORT": "0",
                **dict.fromkeys(("GPUMETER_HTTP_HOST", "GPUMETER_GATEWAY_HOST"), "127.0.0.1"),
            }
            [container] = pods[f"gpumeter-{name}"]["containers"]
            log = folder / f"{name}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [Path(sys.executable).parent / "gpumeter", *container["args"]],
                    env={"PATH": os.environ["PATH"], **environment(pods[f"gpumeter-{name}"]), **own},
                    stdout=output,
                    stderr=output,
                )
            started[name] = Part(process, port, log)
        for name, part in started.items():
            eventually(part.is_ready, f"the {name} is ready", timeout_s=60)
        yield started
    finally:
        for part in started.values():
            part.process.terminate()
        for part in started.values():
            part.process.wait(timeout=60)


def kubeconfig_of(token: str, admin: Path, target: Path) -> Path:
    """A kubeconfig that reaches the same API server with an account's token and no other right."""
    config = json.loads(admin.read_text())
    config["users"] = [{"name": each["name"], "user": {"token": token}} for each in config["users"]]
    target.write_text(json.dumps(config))
    return target


def test_the_operator_makes_a_workload_tells_its_state_and_lets_it_go(
    parts: dict[str, Part], server: Server, namespace: str, kubectl: Run
) -> None:
    assert server.create(namespace, "inferenceservices", SMALL).code == 201
    wanted = {
        "deployment.apps/smollm2",
        "service/smollm2",
        "service/smollm2-usage",
        "serviceaccount/smollm2",
        "secret/smollm2-usage",
        "poddisruptionbudget.policy/smollm2",
    }

    def owned() -> set[str]:
        kinds = "deployment,service,serviceaccount,secret,poddisruptionbudget"
        return set(kubectl("get", kinds, "-n", namespace, "-o", "name").stdout.split())

    eventually(lambda: wanted <= owned(), "the workload is there")
    ready = "{.status.conditions[?(@.type=='Ready')].status}"
    eventually(
        lambda: kubectl("get", "misvc/smollm2", "-n", namespace, "-o", f"jsonpath={ready}").stdout == "False",
        "the service tells that it is not ready",
    )
    kubectl("delete", "misvc/smollm2", "-n", namespace, "--timeout=60s")


def test_the_gateway_knows_keys_and_models(
    parts: dict[str, Part], server: Server, namespace: str, release: str
) -> None:
    key = "gm-for-this-test"
    labels = {"gpumeter.io/api-key": "true", "gpumeter.io/tenant": "acme"}
    secret = {
        "metadata": {"name": "api-key-of-a-test", "labels": labels},
        "stringData": {"sha256": hashlib.sha256(key.encode()).hexdigest()},
    }
    assert server.call("POST", f"/api/v1/namespaces/{release}/secrets", secret).code == 201
    assert server.create(namespace, "inferenceservices", SMALL).code == 201
    gateway = parts["gateway"]
    eventually(
        lambda: "smollm2" in gateway.get("/v1/models", Authorization=f"Bearer {key}")[1],
        "the model is listed for the key",
    )
    assert gateway.get("/v1/models", Authorization="Bearer gm-of-nobody")[0] == 401


@pytest.mark.parametrize("part", PARTS)
def test_nobody_is_forbidden_what_it_needs(parts: dict[str, Part], part: str) -> None:
    assert parts[part].is_ready()
    said = parts[part].log.read_text()
    assert 'is forbidden: User "system:serviceaccount:' not in said
    assert "Not enough permissions" not in said


@pytest.fixture
def uninstall_check(
    release: str, plane: Path, kubectl: Run, tmp_path: Path
) -> Iterator[Callable[[], subprocess.CompletedProcess[str]]]:
    """The chart's hook as Helm would run it, with its own account and role."""
    hooks = [each for each in rendered() if "helm.sh/hook" in each["metadata"].get("annotations", {})]
    rights = [each for each in hooks if each["kind"] != "Job"]
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": rights})
    kubectl("apply", "-n", release, "-f", "-", stdin=manifest)
    token = kubectl("create", "token", "gpumeter-uninstall-check", "-n", release).stdout.strip()
    config = kubeconfig_of(token, plane, tmp_path / "kubeconfig")
    arguments = pod_specs(hooks)["gpumeter-uninstall-check"]["containers"][0]["args"]

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).parent / "gpumeter", *arguments],
            env={"PATH": os.environ["PATH"], "KUBECONFIG": str(config)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    yield check
    kubectl("delete", "-n", release, "-f", "-", stdin=manifest)


def test_the_uninstall_check_refuses_while_a_service_exists(
    parts: dict[str, Part], server: Server, release: str, kubectl: Run, uninstall_check: Callable[[], Any]
) -> None:
    # The operator is needed here too: it lets go what other tests have left.
    assert parts["operator"].is_ready()
    kubectl("delete", "misvc", "--all", "--all-namespaces", "--timeout=60s")
    assert uninstall_check().returncode == 0
    assert server.create(release, "inferenceservices", SMALL).code == 201
    refused = uninstall_check()
    kubectl("delete", "misvc", "--all", "-n", release, "--timeout=60s")
    assert refused.returncode == 1
    assert refused.stderr == (
        f"1 InferenceService exists: {release}/smollm2. Delete them first (kubectl delete "
        "inferenceservices.gpumeter.io --all --all-namespaces), because only a running operator and collector can "
        "collect their last usage and let them go; then run helm uninstall again. (Add --no-hooks to it only where "
        "another gpumeter goes on serving them.) To keep gpumeter instead: helm rollback gpumeter 1 -n "
        "gpumeter-system; Helm upgrades no release whose uninstall was refused before that.\n"
    )
