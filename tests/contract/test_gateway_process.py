"""`gpumeter gateway` as a process: settings, mirrors of a small API server, a request, SIGTERM."""

import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from gpumeter_operator.adapters.gateways import Gateways, addresses, mirror_of, target_of
from gpumeter_operator.adapters.kubernetes import Cluster
from gpumeter_operator.decide.credentials import internal_token
from gpumeter_operator.gateway.keys import digest_of
from rigs.gateway import MASTER_KEY, ScriptedWorker, begin_stream, chunk, event, serving, until
from rigs.ports import hold_port

GPUMETER = Path(sys.executable).parent / "gpumeter"
KEY = {"Authorization": "Bearer key-of-acme"}
TENANTS = ("acme", "bolt", "corp", "dune")
MIB = 1 << 20


class SmallApiServer:
    """Answers list and watch for the three kinds that a gateway mirrors; `change` sends an event to the watchers."""

    def __init__(self, objects: dict[str, list[dict[str, Any]]]) -> None:
        self._objects = objects
        self._watchers: dict[str, list[asyncio.Queue[dict[str, Any]]]] = {}
        self.selectors: dict[str, str] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path not in self._objects:
            return web.json_response({"kind": "Status", "status": "Failure", "code": 404}, status=404)
        self.selectors[request.path] = request.query.get("labelSelector", "")
        if request.query.get("watch") not in ("true", "1"):
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": self._objects[request.path]})
        changes: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._watchers.setdefault(request.path, []).append(changes)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        while True:
            await response.write(json.dumps(await changes.get()).encode() + b"\n")

    def add(self, path: str, item: dict[str, Any]) -> None:
        self._objects.setdefault(path, []).append(item)

    def change(self, path: str, kind: str, item: dict[str, Any]) -> None:
        for watcher in self._watchers.get(path, ()):
            watcher.put_nowait({"type": kind, "object": item})

    def watched(self) -> set[str]:
        return set(self._watchers)


SERVICES = "/apis/gpumeter.io/v1alpha1/inferenceservices"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
GATEWAY_SLICES = "/apis/discovery.k8s.io/v1/namespaces/gpumeter/endpointslices"
KEYS = "/api/v1/namespaces/gpumeter/secrets"


def named(name: str, namespace: str, **more: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace, "resourceVersion": "2", **more}}


@asynccontextmanager
async def api_server(worker_port: int, folder: Path) -> AsyncIterator[tuple[SmallApiServer, Path]]:
    keys = [
        named(f"key-{tenant}", "gpumeter", labels={"gpumeter.io/api-key": "true", "gpumeter.io/tenant": tenant})
        | {"data": {"sha256": base64.b64encode(digest_of(f"key-of-{tenant}").encode()).decode()}}
        for tenant in TENANTS
    ]
    workers = named("smollm2-1", "team-a", labels={"kubernetes.io/service-name": "smollm2"}) | {
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": worker_port}],
        "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": True}}],
    }
    service = named("smollm2", "team-a", uid="uid-1") | {"spec": {"model": {"uri": "file:///m"}}}
    server = SmallApiServer({SERVICES: [service], SLICES: [workers], KEYS: keys})
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    kubeconfig = folder / "kubeconfig"
    named_ones = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{site.port}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    }
    kubeconfig.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "x", **named_ones}))
    try:
        yield server, kubeconfig
    finally:
        await runner.cleanup()


@asynccontextmanager
async def gateway_process(
    kubeconfig: Path, **environment: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    port = hold_port()
    key_file = kubeconfig.parent / "master-key"
    key_file.write_bytes(MASTER_KEY)
    settings = {
        "KUBECONFIG": str(kubeconfig),
        "GPUMETER_NAMESPACE": "gpumeter",
        "GPUMETER_MASTER_KEY_FILE": str(key_file),
        "GPUMETER_GATEWAY_HOST": "127.0.0.1",
        "GPUMETER_GATEWAY_PORT": str(port),
        "GPUMETER_GATEWAY_INTERNAL_PORT": "0",
        "GPUMETER_GATEWAY_SETTLE_S": "0.1",
        "GPUMETER_LOG_FORMAT": "json",
    }
    process = await asyncio.create_subprocess_exec(
        GPUMETER, "gateway", env={**os.environ, **settings, **environment}, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_ready(url: str) -> None:
    async with aiohttp.ClientSession() as http, asyncio.timeout(20):
        while True:
            try:
                async with http.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.05)


async def test_the_command_serves_follows_the_cluster_and_drains_on_sigterm(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def half_then_wait(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event(chunk("half")))
        await go_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    ask = {"model": "smollm2", "messages": [], "stream": True}
    async with (
        asyncio.timeout(60),
        serving(ScriptedWorker("uid-1", "smollm2")) as worker,
        api_server(worker.port, tmp_path) as (server, kubeconfig),
        gateway_process(kubeconfig) as (process, url),
        aiohttp.ClientSession(headers=KEY) as http,
    ):
        await until_ready(url)
        assert server.selectors[KEYS] == "gpumeter.io/api-key=true"
        assert server.selectors[SLICES] == "gpumeter.io/inferenceservice"

        worker.behaviour = half_then_wait
        async with http.post(f"{url}/v1/chat/completions", json=ask) as answer:
            assert answer.status == 200
            await answer.content.readany()

            await until(lambda: server.watched() == {SERVICES, SLICES, KEYS})
            server.change(KEYS, "DELETED", named("key-acme", "gpumeter"))
            async with asyncio.timeout(5):
                while (await http.get(f"{url}/v1/models")).status != 401:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.01)

            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(5), aiohttp.ClientSession() as fresh:
                while True:  # until it no longer listens; the stream goes on all the same
                    try:
                        (await fresh.get(f"{url}/readyz")).close()
                    except aiohttp.ClientConnectionError:
                        break
                    await asyncio.sleep(0.02)
            go_on.set()
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert process.stderr is not None
        lines = [json.loads(line) for line in (await process.stderr.read()).splitlines()]
        assert await process.wait() == 0
    assert worker.seen[0].claims["tenant"] == "acme"
    (done,) = [line["message"] for line in lines if "tenant=acme" in line["message"]]
    assert "service=team-a/smollm2 code=200" in done
    assert "key-of-acme" not in str(lines)


async def test_from_zero_the_operators_side_hears_of_a_waiting_request_and_the_first_endpoint_answers_it(
    tmp_path: Path,
) -> None:
    """The command as it is, a port that its Service does not have, and the mirror by which an operator finds it."""
    internal_port = hold_port()
    worker_slice = named("smollm2-1", "team-a", labels={"kubernetes.io/service-name": "smollm2"})
    gateway_slice = named("gateway-1", "gpumeter", labels={"kubernetes.io/service-name": "gpumeter-gateway"}) | {
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": True}}],
    }
    heard = asyncio.Event()
    async with (
        asyncio.timeout(60),
        serving(ScriptedWorker("uid-1", "smollm2")) as worker,
        api_server(worker.port, tmp_path) as (server, kubeconfig),
        gateway_process(kubeconfig, GPUMETER_GATEWAY_INTERNAL_PORT=str(internal_port)) as (_, url),
        aiohttp.ClientSession(headers=KEY) as http,
    ):
        server.add(GATEWAY_SLICES, gateway_slice)
        cluster = Cluster.connect(kubeconfig)
        mirror = mirror_of(cluster, "gpumeter", "gpumeter-gateway")
        gateways = Gateways(
            lambda: [target_of(address, internal_port) for address in addresses(mirror.objects.values())],
            internal_token(MASTER_KEY),
            lambda _: heard.set(),
        )
        running = [asyncio.create_task(mirror.run()), asyncio.create_task(gateways.run())]
        try:
            await until_ready(url)
            await until(lambda: server.watched() >= {SERVICES, SLICES, KEYS})
            server.change(SLICES, "DELETED", worker_slice)
            asking = asyncio.create_task(http.post(f"{url}/v1/chat/completions", json={"model": "smollm2"}))
            await heard.wait()
            assert gateways.asked()["team-a/smollm2"].waiting == 1
            assert server.selectors[GATEWAY_SLICES] == "kubernetes.io/service-name=gpumeter-gateway"
            ready = {"addressType": "IPv4", "ports": [{"name": "http", "port": worker.port}]} | {
                "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": True}}]
            }
            server.change(SLICES, "ADDED", worker_slice | ready)
            assert (await asking).status == 200
            await until(lambda: not gateways.asked())
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await cluster.close()


def peak_bytes(pid: int) -> int:
    """The most memory that a process has ever had in use."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


async def test_the_largest_bodies_of_many_tenants_at_once_stay_within_the_pods_memory(tmp_path: Path) -> None:
    """The chart's default settings and limit. What does not fit is refused, and the gateway goes on."""

    async def never_answer(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    body = json.dumps({"model": "team-a/smollm2", "messages": "x" * (10 * MIB - 100)}).encode()
    async with (
        asyncio.timeout(120),
        serving(ScriptedWorker("uid-1", "smollm2")) as worker,
        api_server(worker.port, tmp_path) as (_, kubeconfig),
        gateway_process(kubeconfig) as (process, url),
        aiohttp.ClientSession() as http,
    ):
        await until_ready(url)
        worker.behaviour = never_answer
        sending = [
            asyncio.create_task(
                http.post(f"{url}/v1/chat/completions", data=body, headers={"Authorization": f"Bearer key-of-{tenant}"})
            )
            for tenant in TENANTS
            for _ in range(6)
        ]
        await until(lambda: sum(task.done() for task in sending) + len(worker.seen) == len(sending), within_s=60)
        refused = [task.result() for task in sending if task.done()]
        assert {answer.status for answer in refused} == {503}
        assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
        assert 3 <= len(worker.seen) <= 9  # 96 MiB hold nine
        assert peak_bytes(process.pid) < 512 * MIB * 3 // 4
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        worker.behaviour = worker.answer
        async with http.post(f"{url}/v1/chat/completions", json={"model": "smollm2"}, headers=KEY) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"GPUMETER_MASTER_KEY_FILE": "/nowhere"}, b"/nowhere"),
        ({"GPUMETER_MASTER_KEY_FILE": "/dev/null"}, b"a master key has at least 32"),
        ({"GPUMETER_GATEWAY_PORT": "80800"}, b"GPUMETER_GATEWAY_PORT is '80800'"),
        ({"GPUMETER_LOG_FORMAT": "xml"}, b"GPUMETER_LOG_FORMAT is 'xml'"),
    ],
)
async def test_wrong_settings_end_the_command_with_a_sentence(
    tmp_path: Path, environment: dict[str, str], sentence: bytes
) -> None:
    async with asyncio.timeout(30), gateway_process(tmp_path / "kubeconfig", **environment) as (process, _):
        assert process.stderr is not None
        said = await process.stderr.read()
        assert await process.wait() != 0
        assert said.startswith(b"SettingsInvalid: ")
        assert sentence in said
        assert b"Traceback" not in said
