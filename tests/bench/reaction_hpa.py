"""The stock HorizontalPodAutoscaler on the same spike: real controller, an external metrics API that the bench serves.

Owns that API (one metric, a value for each Deployment) and how the API server is led to it: an ExternalName Service,
which the aggregator resolves without a network of pods. Many HPAs at once, so that fifty spikes take a minute: each has
a Deployment of its own and is spiked at a moment of its own.
"""

import http.server
import json
import random
import ssl
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from apiserver import Run, Server

GROUP = "/apis/external.metrics.k8s.io/v1beta1"
SETTLE_S = 45  # three rounds of the HPA controller
REACTION_MAX_S = 120


def hpa_reactions(kubeconfig: Path, kubectl: Run, namespace: str, spikes: int, chance: random.Random) -> list[float]:
    """Milliseconds from spike to patched replicas, one for each of `spikes` Deployments."""
    values = dict.fromkeys(range(spikes), 4)
    with tempfile.TemporaryDirectory(prefix="gpumeter-hpa-") as folder:
        metrics = _serve(Path(folder), values)
        try:
            _aggregate(kubectl, metrics.server_address[1])
            for number in values:
                kubectl("apply", "-f", "-", "-n", namespace, stdin=json.dumps(_pair(number)))
            print(f"{spikes} Deployments with an HPA each settle for {SETTLE_S} s", flush=True)
            time.sleep(SETTLE_S)
            return _spike(Server(kubeconfig), namespace, values, chance)
        finally:
            metrics.shutdown()


def _spike(server: Server, namespace: str, values: dict[int, int], chance: random.Random) -> list[float]:
    begun_s = time.monotonic()
    at_s = {number: begun_s + chance.random() * 15 for number in values}
    found: dict[int, float] = {}
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments?labelSelector=bench%3Dhpa"
    while len(found) < len(values) and time.monotonic() - begun_s < REACTION_MAX_S:
        for number, when_s in at_s.items():
            if time.monotonic() >= when_s:
                values[number] = 20
        now_s = time.monotonic()
        for item in server.call("GET", path).body["items"]:
            number = int(item["metadata"]["name"].rpartition("-")[2])
            if number not in found and item["spec"]["replicas"] > 1:
                found[number] = (now_s - at_s[number]) * 1_000
        time.sleep(0.05)
    if len(found) < len(values):
        raise RuntimeError(f"only {len(found)} of {len(values)} HPAs reacted within {REACTION_MAX_S} s")
    print(f"stock HPA  {len(found):>4}/{len(values)}", flush=True)
    return list(found.values())


def _pair(number: int) -> dict[str, Any]:
    name = f"hpa-{number}"
    labels = {"app": name}
    container = {"name": "main", "image": "localhost/none:none"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": {"bench": "hpa"}},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }
    selector = {"matchLabels": {"service": str(number)}}
    metric = {
        "metric": {"name": "queue", "selector": selector},
        "target": {"type": "AverageValue", "averageValue": "4"},
    }
    autoscaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": 1,
            "maxReplicas": 8,
            "metrics": [{"type": "External", "external": metric}],
        },
    }
    return {"apiVersion": "v1", "kind": "List", "items": [deployment, autoscaler]}


def _aggregate(kubectl: Run, port: int) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "bench-metrics", "namespace": "default"},
        "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]},
    }
    api = {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
        "spec": {
            "service": {"name": "bench-metrics", "namespace": "default", "port": port},
            "group": "external.metrics.k8s.io",
            "version": "v1beta1",
            "insecureSkipTLSVerify": True,
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
        },
    }
    for manifest in (service, api):
        kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    kubectl("wait", "--for=condition=Available", "--timeout=60s", "apiservice/v1beta1.external.metrics.k8s.io")


def _serve(folder: Path, values: dict[int, int]) -> http.server.ThreadingHTTPServer:
    class Metrics(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.dumps(_answer(self.path, values)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """The bench tells of itself."""

    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run(
        [*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _answer(path: str, values: dict[int, int]) -> dict[str, Any]:
    url = urlparse(path)
    if not url.path.endswith("/queue"):
        resource = {"name": "queue", "namespaced": True, "kind": "ExternalMetricValueList", "verbs": ["get"]}
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": "external.metrics.k8s.io/v1beta1",
            "resources": [resource],
        }
    number = int(parse_qs(url.query).get("labelSelector", ["service=0"])[0].rpartition("=")[2])
    value = {"metricName": "queue", "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return {
        "kind": "ExternalMetricValueList",
        "apiVersion": "external.metrics.k8s.io/v1beta1",
        "metadata": {},
        "items": [{**value, "metricLabels": {}, "value": str(values[number])}],
    }
