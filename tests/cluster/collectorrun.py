"""The collector as a real process with the chart's own rights, and a worker that answers on a loopback address.

Owns the process, the pod as a kubelet would state it, and the worker's HTTP. Does not judge what the collector does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from apiserver import ROOT, Run, Server
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.decide.credentials import derive
from gpumeter_usage.page import decode_acknowledgement, encode_page, encode_status
from gpumeter_usage.period import SECOND_NS
from gpumeter_usage.record import Account
from rigs.ledger import FakeWorker, pod_manifest

NAMESPACE = "gpumeter-collector-tests"
MASTER_KEY = b"a master key of the tests, longer than thirty-two bytes"
PORT = 8001
GPUMETER = str(Path(sys.executable).parent / "gpumeter")


def identity_of_the_chart(kubectl: Run, helm: Run, admin: Path, folder: Path) -> Path:
    """A kubeconfig that may do what the chart's role of the collector allows, and nothing else."""
    images = ("image.repository=localhost/gpumeter-operator", "workerImage.repository=localhost/gpumeter-worker")
    shown = ("templates/roles.yaml", "templates/service-accounts.yaml")
    options = [part for one in images for part in ("--set", one)] + [part for one in shown for part in ("-s", one)]
    rendered = helm("template", "gpumeter", str(ROOT / "charts/gpumeter"), "--namespace", NAMESPACE, *options)
    kubectl("apply", "-f", "-", stdin=json.dumps(manifest("v1", "Namespace", NAMESPACE)))
    kubectl("apply", "-f", "-", stdin=rendered.stdout)
    token = kubectl("create", "token", "gpumeter-collector", "--namespace", NAMESPACE).stdout.strip()
    config = json.loads(admin.read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    path = folder / "collector.kubeconfig"
    path.write_text(json.dumps(config))
    return path


def manifest(version: str, kind: str, name: str) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}}


class CollectorProcess:
    """`gpumeter collector` as the image runs it, over a ledger that outlives it."""

    def __init__(self, kubeconfig: Path, folder: Path, port: int, *, ledger_url: str = "", **more: str) -> None:
        """`more` is set in the environment, too."""
        key = folder / "master-key"
        key.write_bytes(MASTER_KEY)
        self.ledger_url = ledger_url or f"sqlite:///{folder / 'ledger.db'}"
        self.log = folder / "collector.log"
        self._environment = {
            "PATH": os.environ["PATH"],
            "KUBECONFIG": str(kubeconfig),
            "GPUMETER_LEDGER_URL": self.ledger_url,
            "GPUMETER_MASTER_KEY_FILE": str(key),
            "GPUMETER_PERIOD": "1m",
            "GPUMETER_PULL_INTERVAL_MS": "200",
            "GPUMETER_PUBLISH_INTERVAL_MS": "500",
            "GPUMETER_CLOSE_GRACE_S": "600",
            "GPUMETER_HTTP_HOST": "127.0.0.1",
            "GPUMETER_HTTP_PORT": str(port),
            **more,
        }
        self.url = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [GPUMETER, "collector"]
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """As a node's out-of-memory killer would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """As a kubelet would, and how it ended."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=30)

    def accounts(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`gpumeter accounts` beside the running collector."""
        return self.beside("accounts", *arguments)

    def beside(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of gpumeter beside the running collector."""
        command = [GPUMETER, *arguments]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False, timeout=60)


def create_pod(server: Server, of: Worker, address: str, *lives: tuple[str, int, int | None]) -> str:
    """A pod without a node, and the status that a kubelet would write; returns its uid."""
    wanted = pod_manifest(of, address)
    wanted["metadata"].pop("uid")
    wanted["spec"] = {"containers": [{"name": "main", "image": "localhost/none"}]}
    del wanted["status"]
    made = server.call("POST", f"/api/v1/namespaces/{of.namespace}/pods", wanted)
    assert made.code == 201, made.body
    set_status(server, of, address, *lives)
    return str(made.body["metadata"]["uid"])


def set_status(server: Server, of: Worker, address: str, *lives: tuple[str, int, int | None]) -> None:
    path = f"/api/v1/namespaces/{of.namespace}/pods/{of.pod}"
    pod = server.call("GET", path).body
    pod["status"] = {**pod["status"], **pod_manifest(of, address, *lives)["status"], "podIPs": [{"ip": address}]}
    for container in pod["status"].get("containerStatuses", []):
        container |= {"image": "localhost/none", "imageID": "", "ready": True, "restartCount": 0}
    answer = server.call("PUT", path + "/status", pod)
    assert answer.code == 200, answer.body


@asynccontextmanager
async def answering(fake: FakeWorker, address: str) -> AsyncIterator[None]:
    """Serve a fake worker's journal on port 8001 of an address to whoever has the token; it idles by the real clock."""
    token = derive(MASTER_KEY, "usage-token", fake.identity.service_uid)

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {token}":
            return web.Response(status=401, text="the token is not this worker's")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def status(_: web.Request) -> web.Response:
        if not fake.boot.sealed:
            fake.spend(Account.IDLE, time.time_ns() - SECOND_NS // 10)
        return web.Response(body=encode_status(fake.status()))

    async def records(request: web.Request) -> web.Response:
        query = request.query
        return web.Response(
            body=encode_page(fake.page(query["boot"], int(query["after"]), min(3, int(query["limit"]))))
        )

    async def acknowledge(request: web.Request) -> web.Response:
        fake.acknowledge(decode_acknowledgement(await request.read()))
        return web.Response(status=204)

    app = web.Application(middlewares=[guard])
    app.router.add_get("/usage/v1/status", status)
    app.router.add_get("/usage/v1/records", records)
    app.router.add_post("/usage/v1/acknowledge", acknowledge)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, address, PORT).start()
    try:
        yield
    finally:
        await runner.cleanup()
