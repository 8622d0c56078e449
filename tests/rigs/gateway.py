"""A gateway with a cluster that a test writes by hand, and workers that do what a test tells them.

The gateway is the real one, over real sockets. `HandMadeMirror` fills the port that adapters.mirror.Mirror fills in
production; `ScriptedWorker` speaks the worker's HTTP.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import jwt
from aiohttp import web

from gpumeter_operator.decide.credentials import derive, internal_token
from gpumeter_operator.gateway.app import Gateway
from gpumeter_operator.gateway.keys import digest_of
from gpumeter_operator.gateway.notices import Notices
from gpumeter_operator.gateway.settings import Settings
from gpumeter_operator.gateway.world import World

MASTER_KEY = b"m" * 32
INTERNAL_TOKEN = internal_token(MASTER_KEY)
SETTINGS = Settings(namespace="gpumeter", host="127.0.0.1", port=0, internal_port=0, settle_s=0.01, drain_timeout_s=5)


class HandMadeMirror:
    """Objects that a test writes; a change is told at once."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self._changed = changed
        self.complete = asyncio.Event()
        self.stuck: str | None = None

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def synced(self) -> None:
        await self.complete.wait()

    def silence(self) -> str | None:
        return self.stuck

    def put(self, item: dict[str, Any]) -> None:
        self.objects[item["metadata"]["namespace"], item["metadata"]["name"]] = item
        self._changed()

    def remove(self, namespace: str, name: str) -> None:
        del self.objects[namespace, name]
        self._changed()


@dataclass
class HandMadeCluster:
    """What the gateway believes to be the cluster."""

    services: HandMadeMirror = field(init=False)
    slices: HandMadeMirror = field(init=False)
    keys: HandMadeMirror = field(init=False)
    events: list[dict[str, Any]] = field(default_factory=list)

    async def create(self, manifest: dict[str, Any]) -> None:
        self.events.append(manifest)

    def world(self) -> World:
        def services(changed: Callable[[], None]) -> HandMadeMirror:
            self.services = HandMadeMirror(changed)
            return self.services

        def slices(changed: Callable[[], None]) -> HandMadeMirror:
            self.slices = HandMadeMirror(changed)
            return self.slices

        def keys(changed: Callable[[], None]) -> HandMadeMirror:
            self.keys = HandMadeMirror(changed)
            return self.keys

        notices = Notices(self.create, clock=lambda: datetime.now(UTC))
        return World(services=services, slices=slices, keys=keys, notices=notices)

    def add_service(
        self,
        namespace: str,
        name: str,
        model: str,
        conditions: list[dict[str, str]] | None = None,
        *,
        state: str = "Standby",
        annotations: dict[str, str] | None = None,
        **spec: Any,
    ) -> str:
        uid = f"uid-{namespace}-{name}"
        self.services.put(
            {
                "metadata": {"namespace": namespace, "name": name, "uid": uid, "annotations": annotations or {}},
                "spec": {"model": {"name": model}} | spec,
                "status": {"conditions": conditions or [], "modelStatus": {"state": state}},
            }
        )
        return uid

    def end_worker(self, port: int) -> None:
        self.slices.remove("team-a", f"smollm2-{port}")

    def set_endpoint(self, namespace: str, service: str, port: int, **conditions: bool) -> None:
        self.slices.put(
            {
                "metadata": {
                    "namespace": namespace,
                    "name": f"{service}-{port}",
                    "labels": {"kubernetes.io/service-name": service},
                },
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": port}],
                "endpoints": [
                    {
                        "addresses": ["127.0.0.1"],
                        "conditions": {"ready": True, "serving": True, "terminating": False} | conditions,
                        "targetRef": {"uid": f"pod-{port}"},
                    }
                ],
            }
        )

    def add_key(self, tenant: str, key: str) -> None:
        self.keys.put(
            {
                "metadata": {
                    "namespace": "gpumeter",
                    "name": f"key-{key}",
                    "labels": {"gpumeter.io/api-key": "true", "gpumeter.io/tenant": tenant},
                },
                "data": {"sha256": base64.b64encode(digest_of(key).encode()).decode()},
            }
        )

    def revoke(self, key: str) -> None:
        self.keys.remove("gpumeter", f"key-{key}")


Behaviour = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass
class Seen:
    """One request as it reached a worker."""

    path: str
    headers: dict[str, str]
    body: bytes
    claims: dict[str, Any]


class ScriptedWorker:
    """Speaks the worker's HTTP on a port of its own; `behaviour` answers what passed the check of the hop token."""

    def __init__(self, uid: str, model: str) -> None:
        self.uid = uid
        self.model = model
        self.seen: list[Seen] = []
        self.gone = asyncio.Event()  # a requester went away before it had its answer
        self.behaviour: Behaviour = self.answer
        self.port = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            claims = jwt.decode(
                request.headers.get("Authorization", "").removeprefix("Bearer "),
                derive(MASTER_KEY, "hop-key", self.uid),
                algorithms=["HS256"],
                audience=self.uid,
                issuer="gpumeter-gateway",
                options={"require": ["exp", "iat", "tenant", "session"]},
            )
        except jwt.PyJWTError as error:
            return web.json_response({"error": {"message": str(error), "code": "unauthorized"}}, status=401)
        body = await request.read()
        asked = json.loads(body)
        self.seen.append(Seen(request.path, dict(request.headers), body, claims))
        if asked["model"] != self.model:
            return web.json_response({"error": {"message": "not mine", "code": "model_not_found"}}, status=404)
        try:
            return await self.behaviour(request, asked)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise

    async def answer(self, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        """A whole answer, streamed or plain."""
        if not asked.get("stream"):
            return web.json_response(completion("Hello you", self.model))
        response = await begin_stream(request)
        for word in ("Hello", " you"):
            await response.write(event(chunk(word, self.model)))
        await response.write(b"data: [DONE]\n\n")
        return response


async def until(true: Callable[[], bool], within_s: float = 5) -> None:
    """Poll until it is true."""
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110 - what is waited for belongs to others and tells nobody
            await asyncio.sleep(0.005)


async def begin_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Gpumeter-Session": "from-worker"})
    await response.prepare(request)
    return response


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(word: str, model: str = "smollm2") -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}


def completion(text: str, model: str = "smollm2") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "gpu_seconds": "0.125"}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


@asynccontextmanager
async def serving(worker: ScriptedWorker, **options: Any) -> AsyncIterator[ScriptedWorker]:
    """Let a worker listen on a port of its own."""
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/chat/completions", worker.handle)
    app.router.add_post("/v1/completions", worker.handle)
    app.router.add_post("/generate", worker.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1, **options)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    worker.port = site.port
    try:
        yield worker
    finally:
        await runner.cleanup()


@dataclass
class Rig:
    """A gateway with one service, team-a/smollm2, one worker, and the keys of acme and bolt."""

    cluster: HandMadeCluster
    gateway: Gateway
    worker: ScriptedWorker

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"


@asynccontextmanager
async def gateway_rig(**changes: Any) -> AsyncIterator[Rig]:
    """Start everything; `changes` are the gateway's settings."""
    cluster = HandMadeCluster()
    world = cluster.world()
    uid = cluster.add_service("team-a", "smollm2", "smollm2")
    cluster.add_key("acme", "key-of-acme")
    cluster.add_key("bolt", "key-of-bolt")
    gateway = Gateway(
        world, replace(SETTINGS, **changes), lambda uid: derive(MASTER_KEY, "hop-key", uid), INTERNAL_TOKEN
    )
    async with serving(ScriptedWorker(uid, "smollm2")) as worker:
        cluster.set_endpoint("team-a", "smollm2", worker.port)
        await gateway.start()
        mirrors = asyncio.create_task(world.run())
        for mirror in (cluster.services, cluster.slices, cluster.keys):
            mirror.complete.set()
        await until(lambda: world.synced)
        try:
            yield Rig(cluster, gateway, worker)
        finally:
            mirrors.cancel()
            await asyncio.gather(mirrors, return_exceptions=True)
            await gateway.close()
