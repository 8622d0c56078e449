"""The demo's steps, in order. Each shows that it is alive, and fails with what one needs to see.

Owns the order and the waiting. What is applied is manifests', what is summed is audit's, who asks is traffic's.
"""

import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from demo import audit, manifests
from demo.kube import DemoFailed, Kube
from demo.manifests import GRANULARITY_LABEL, RELEASE, RELEASE_NAMESPACE, SERVICE, TEAM, TENANTS
from devcluster.progress import Progress
from traffic.client import Options, run
from traffic.exchange import Exchange, Outcome
from traffic.summary import as_json, surprises, table

READY_WITHIN_S = 240
FINAL_WITHIN_S = 150
POLL_S = 0.5
WORKERS = f"gpumeter.io/inferenceservice={SERVICE}"
# Reasons that no waiting cures: the worker said so in so many words, or the spec cannot be run.
FATAL = ("GpuNotFound", "ModelNotFound", "ModelInvalid", "ModelSourceUnsupported", "SettingsInvalid", "JournalUnusable")
LONGEST_ANSWER_TOKENS = 16  # on two busy cores a token may take a second, and the demo has four minutes
CRASHED = "WorkerCrashed"
CRASHING_FOR_S = 60  # one crash may heal; a minute of them does not


@dataclass(frozen=True, slots=True)
class Demo:
    """What all steps need."""

    kube: Kube
    progress: Progress
    repository: Path
    keys_file: Path
    image_version: str
    model_uri: str


def install(demo: Demo, **more: Any) -> None:
    """CRDs and chart, with `more` values. helm upgrade leaves CRDs as they are, so they are applied first."""
    with demo.progress.step("resource definitions"):
        demo.kube.run(
            *("apply", "--server-side", "--force-conflicts", "--field-manager=gpumeter-demo"),
            *("-f", str(demo.repository / "crds")),
        )
        demo.kube.run("wait", "--for=condition=Established", "--timeout=60s", "-f", str(demo.repository / "crds"))
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as values,
        demo.progress.step("helm upgrade --install gpumeter: operator, collector, gateway", lambda: _unready(demo)),
    ):
        json.dump(manifests.values(demo.image_version) | more, values)
        values.flush()
        try:
            demo.kube.run_helm(
                *("upgrade", "--install", RELEASE, str(demo.repository / "charts/gpumeter")),
                *("--namespace", RELEASE_NAMESPACE, "--create-namespace", "--values", values.name),
                *("--wait", "--timeout", "3m"),
            )
        except DemoFailed as failed:
            raise DemoFailed(str(failed), f"{failed.evidence}\n\n{release_evidence(demo)}") from None


def apply(demo: Demo) -> dict[str, str]:
    """Keys, prices and the service; returns key by tenant. Keys of an earlier run are kept."""
    keys = kept_keys(demo.keys_file)
    with demo.progress.step(f"keys of {' and '.join(TENANTS)}, a price plan, InferenceService {TEAM}/{SERVICE}"):
        demo.kube.apply(*(manifests.api_key_secret(tenant, key) for tenant, key in keys.items()))
        demo.kube.apply(manifests.price_plan(), manifests.namespace(TEAM))
        if demo.model_uri == manifests.MODEL_URI:
            demo.kube.apply(manifests.model_claim())
        demo.kube.apply(manifests.inference_service(demo.model_uri, demo.image_version))
    return keys


def kept_keys(file: Path) -> dict[str, str]:
    """The tenants' keys, made once. The cluster holds only their hashes, so this file is where they are."""
    keys: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    missing = [tenant for tenant in TENANTS if tenant not in keys]
    if missing:
        keys |= {tenant: f"gm-{secrets.token_hex(24)}" for tenant in missing}
        file.touch(mode=0o600)
        file.write_text(json.dumps(keys, indent=1) + "\n")
    return {tenant: keys[tenant] for tenant in TENANTS}


def wait_until_serving(demo: Demo) -> int:
    """Until the service is Ready and one pod alone serves it.

    Returns the time from which on the pods that are there tell the whole story: 0 when no other pod was seen, otherwise
    now, because a pod that is gone can no longer be asked how long it ran.
    """
    seen: set[str] = set()
    said, crashing_since_s = "", 0.0

    def ready() -> bool:
        nonlocal said, crashing_since_s
        service = demo.kube.get("-n", TEAM, f"inferenceservices.gpumeter.io/{SERVICE}")
        status = service.get("status", {})
        condition: dict[str, Any] = next((one for one in status.get("conditions", ()) if one["type"] == "Ready"), {})
        current = (
            condition.get("observedGeneration", status.get("observedGeneration")) == service["metadata"]["generation"]
        )
        words = f"{condition.get('reason', 'not seen by the operator yet')}: {condition.get('message', '')}".rstrip(
            ": "
        )
        if words != said:
            demo.progress.say(f"  Ready={condition.get('status', 'Unknown')} {words}")
            said = words
        crashing_since_s = crashing_since_s or time.monotonic() if condition.get("reason") == CRASHED else 0.0
        hopeless = crashing_since_s and time.monotonic() - crashing_since_s > CRASHING_FOR_S
        if (current and condition.get("reason") in FATAL) or hopeless:
            raise DemoFailed(f"{TEAM}/{SERVICE} cannot start. {words}", service_evidence(demo))
        pods = demo.kube.get("-n", TEAM, "pods", "-l", WORKERS)["items"]
        seen.update(pod["metadata"]["uid"] for pod in pods)
        alone = len(pods) == 1 and not pods[0]["metadata"].get("deletionTimestamp")
        return current and condition.get("status") == "True" and alone

    with demo.progress.step(f"{TEAM}/{SERVICE} loads its model", lambda: said):
        _until(ready, READY_WITHIN_S, f"{TEAM}/{SERVICE} did not become Ready", lambda: service_evidence(demo))
    return time.time_ns() if len(seen) > 1 else 0


def chat(demo: Demo, keys: dict[str, str], port: int, seconds: float, output: Path) -> list[Exchange]:
    """Traffic of both tenants; fails when a request ended as it should not."""
    with demo.progress.step(f"chat traffic of {' and '.join(keys)} for {seconds:.0f} s"):
        exchanges = run(
            Options(
                base_url=f"http://127.0.0.1:{port}",
                keys=keys,
                model=SERVICE,
                seconds=seconds,
                seed=int(time.time()),
                concurrency=2,
                longest=LONGEST_ANSWER_TOKENS,
            )
        )
    output.write_text(as_json(exchanges))
    print(f"\n{table(exchanges)}\n")
    print(
        "Aborted and refused on purpose. An aborted request is billed, though its client was told no figure; a refused "
        "one is not. The bill's tokens include the prompts'.\n"
    )
    found = surprises(exchanges)
    finished = {one.tenant for one in exchanges if one.outcome is Outcome.FINISHED}
    found += [f"no request of {tenant} finished" for tenant in keys if tenant not in finished]
    if found:
        listed = "\n".join(found[:20])
        raise DemoFailed(
            "The traffic did not go as it should.", f"{listed}\n\n{service_evidence(demo)}\n\n{release_evidence(demo)}"
        )
    return exchanges


def wait_for_final(demo: Demo, exchanges: list[Exchange], settled_ns: int) -> list[audit.Line]:
    """Until every period that the traffic touched is Final; returns those that can be audited from outside.

    From the start of the worker's container on, where that was lately: what it took to start is in the bill, too.
    """
    first_ns, last_ns = exchanges[0].started_at_ns, max(one.ended_at_ns for one in exchanges)
    lines: list[audit.Line] = []

    def closed() -> bool:
        reports = demo.kube.get("-n", TEAM, "usagereports.gpumeter.io")["items"]
        pods = demo.kube.get("-n", TEAM, "pods", "-l", WORKERS)["items"]
        runs = audit.runs_of(pods)
        lines[:] = audit.since_start(audit.lines_of(reports, runs, SERVICE), runs, first_ns)
        return bool(lines) and lines[-1].end_ns >= last_ns and lines[0].start_ns <= first_ns

    def detail() -> str:
        over_in_s = 60 - last_ns // audit.SECOND_NS % 60 - (time.time_ns() - last_ns) // audit.SECOND_NS
        return f"the last minute is over in {over_in_s} s" if over_in_s > 0 else "the last minute is over"

    with demo.progress.step("usage reports become Final", detail):
        _until(closed, FINAL_WITHIN_S, "The periods of the traffic did not become Final", lambda: bill_evidence(demo))
    return [line for line in lines if line.start_ns >= settled_ns]


def show(demo: Demo, lines: list[audit.Line]) -> None:
    """The pods, the bill, and the check that it adds up: the collector's own and ours."""
    _title("The pods")
    print(
        demo.kube.run("get", "pods", "-A", "-l", "app.kubernetes.io/name in (gpumeter, gpumeter-worker)", "-o", "wide")
    )
    periods = f"{GRANULARITY_LABEL} notin (Day,Month)"
    _title(f"The bill: kubectl get usagereports -A -l '{periods}'")
    print(demo.kube.run("get", "usagereports.gpumeter.io", "-A", "-l", periods, "--sort-by=.spec.period.start"))
    print("Without -l there is a report of each day and month, too, which is the exact sum of these: add up one kind.")
    collector = ("-n", RELEASE_NAMESPACE, "exec", f"deployment/{RELEASE}-collector", "--")
    since = datetime.fromtimestamp(lines[0].start_ns // audit.SECOND_NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    _title(f"Accounts = allocated since {since}, for every pod: gpumeter accounts --check, inside the collector")
    service = ("--namespace", TEAM, "--service", SERVICE, "--since", since)
    print(demo.kube.run(*collector, "gpumeter", "accounts", "--check", *service))
    _title("The same from outside: reports against the pods' container status, both from kubectl")
    print(audit.table(lines))
    wrong = [line for line in lines if not line.holds]
    unaccounted_ns = sum(line.unaccounted_ns for line in lines)
    allocated_ns = sum(line.allocated_ns for line in lines)
    if wrong:
        raise DemoFailed(f"{len(wrong)} of {len(lines)} periods do not add up.", bill_evidence(demo))
    print(
        f"\n{len(lines)} periods, {audit.seconds(allocated_ns)} s allocated, every nanosecond has an owner; "
        f"unaccounted: {audit.seconds(unaccounted_ns)} s.\n"
        "A step belongs to the minute of its end: one that crosses the edge leaves a rest here and takes it back there."
    )


def farewell(demo: Demo, keys: dict[str, str]) -> None:
    """How to go on, and how to remove everything."""
    tenant, key = next(iter(keys.items()))
    down = f"make cluster-down CLUSTER={demo.keys_file.parent.name}"
    _title("The cluster goes on running")
    print(f"""Talk to it:

  export KUBECONFIG={demo.kube.kubeconfig} PATH={demo.kube.kubectl.parent}:{demo.kube.helm.parent}:$PATH
  kubectl -n {RELEASE_NAMESPACE} port-forward service/{RELEASE}-gateway 8080:80 &

  curl http://127.0.0.1:8080/v1/chat/completions -H 'Authorization: Bearer {key}' \\
    -H 'Content-Type: application/json' \\
    -d '{{"model": "{SERVICE}", "messages": [{{"role": "user", "content": "What is a ledger?"}}], "max_tokens": 32}}'

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="{key}")
  for part in client.chat.completions.create(model="{SERVICE}", stream=True,
                                             messages=[{{"role": "user", "content": "What is a ledger?"}}]):
      print((part.choices[0].delta.content or "") if part.choices else "", end="", flush=True)

{demo.repository}/.venv/bin/python has the package openai. That is {tenant}'s key; all keys are in {demo.keys_file}.
A minute later: kubectl get usagereports -A

Remove it:

  kubectl -n {TEAM} delete inferenceservices.gpumeter.io {SERVICE}   # its last usage is collected first
  helm -n {RELEASE_NAMESPACE} uninstall {RELEASE}
  {down:<60} # or all at once: the cluster and everything in it
""")


def service_evidence(demo: Demo) -> str:
    """Everything that tells why a service is not as it should be."""
    own = ("-n", TEAM)
    return "\n\n".join(
        (
            demo.kube.peek(*own, "get", "inferenceservices.gpumeter.io", SERVICE, "-o", "yaml"),
            demo.kube.peek(*own, "get", "pods", "-o", "wide"),
            demo.kube.peek(*own, "get", "events", "--sort-by=.lastTimestamp"),
            "The worker's last lines:\n" + demo.kube.peek(*own, "logs", "-l", WORKERS, "--tail=40", "--prefix"),
            "The operator's last lines:\n" + _logs(demo, "operator"),
        )
    )


def release_evidence(demo: Demo) -> str:
    """Everything that tells why the release is not as it should be."""
    return "\n\n".join(
        (
            demo.kube.peek("-n", RELEASE_NAMESPACE, "get", "pods", "-o", "wide"),
            demo.kube.peek("-n", RELEASE_NAMESPACE, "get", "events", "--sort-by=.lastTimestamp"),
            *(f"The {part}'s last lines:\n{_logs(demo, part)}" for part in ("operator", "collector", "gateway")),
        )
    )


def bill_evidence(demo: Demo) -> str:
    """Everything that tells why a period is not closed, or does not add up."""
    return "\n\n".join(
        (
            demo.kube.peek("get", "usagereports.gpumeter.io", "-A"),
            demo.kube.peek(
                "-n", RELEASE_NAMESPACE, "exec", f"deployment/{RELEASE}-collector", "--", "gpumeter", "accounts"
            ),
            "The collector's last lines:\n" + _logs(demo, "collector"),
            "The worker's last lines:\n" + demo.kube.peek("-n", TEAM, "logs", "-l", WORKERS, "--tail=20"),
        )
    )


def _logs(demo: Demo, part: str) -> str:
    selector = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component={part}"
    return demo.kube.peek("-n", RELEASE_NAMESPACE, "logs", "-l", selector, "--tail=25", "--prefix")


def _unready(demo: Demo) -> str:
    pods: list[dict[str, Any]] = json.loads(
        demo.kube.peek("-n", RELEASE_NAMESPACE, "get", "pods", "-o", "json") or "{}"
    ).get("items", [])
    waiting = [
        pod["metadata"]["name"]
        for pod in pods
        if not all(one["ready"] for one in pod.get("status", {}).get("containerStatuses", [{"ready": False}]))
    ]
    return f"waiting for {', '.join(waiting)}" if waiting else ""


def _until(true: Callable[[], bool], within_s: float, sentence: str, evidence: Callable[[], str]) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{sentence} within {within_s:.0f} s.", evidence())
        time.sleep(POLL_S)


def _title(text: str) -> None:
    width = min(100, int(os.environ.get("COLUMNS", "100")))
    print(f"\n{text}\n{'-' * min(len(text), width)}", flush=True)
