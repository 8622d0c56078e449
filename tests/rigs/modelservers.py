"""Servers on 127.0.0.1 that hold a model: a hub, an OCI registry, and an S3 (moto's).

Owns the parts of their protocols that fetching needs, and ways to make them slow, absent, secretive or damaged. Each
counts what it sent. Knows nothing of the worker.
"""

import base64
import hashlib
import json
import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


def tiny_model(size: int = 64) -> dict[str, bytes]:
    """The files of a model whose weights are `size` bytes of float32."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
    }
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": struct.pack("<Q", len(header))
        + header
        + bytes(range(256)) * (size // 256)
        + bytes(size % 256),
    }


@dataclass
class Behaviour:
    """How a server treats who asks. Changed while it runs."""

    status: int = 0  # answered to everything instead of content; 0: none
    slow_s: float = 0.0  # a pause before every 64 KiB of content
    cut_at: int = 0  # content ends after so many bytes, as a connection that breaks; 0: whole
    damaged: bool = False  # content has a wrong byte
    token: str = ""  # what must be presented, in the server's own way
    sent: Counter[str] = field(default_factory=Counter)  # bytes of content by path
    asked: Counter[str] = field(default_factory=Counter)  # requests by method and path


@dataclass(frozen=True)
class Server:
    """One that runs."""

    host: str  # with its port
    behaviour: Behaviour

    @property
    def url(self) -> str:
        """Its root."""
        return f"http://{self.host}"


@contextmanager
def hub(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Server]:
    """The hub's API as far as a download needs it: model info, HEAD and GET of files at a revision."""

    def answer(request: "_Handler", behaviour: Behaviour) -> None:
        path = unquote(urlsplit(request.path).path)
        if behaviour.token and request.headers.get("Authorization") != f"Bearer {behaviour.token}":
            return request.say(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            files = repositories.get(found[1])
            if files is None:
                return request.say(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
            if found[2] not in (None, "main", COMMIT):
                return request.say(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
            siblings = [_sibling(name, content) for name, content in files.items()]
            return request.say(200, {"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": siblings})
        if found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            content = repositories.get(found[1], {}).get(found[2])
            if content is None:
                return request.say(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
            return request.send(content, headers)
        return request.say(404, {"error": path})

    with _running(answer) as server:
        yield server


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    one: dict[str, Any] = {
        "rfilename": name,
        "size": len(content),
        "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest(),
    }
    if name.endswith((".safetensors", ".bin")):
        one["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return one


@contextmanager
def bucket(name: str, objects: Mapping[str, bytes]) -> Iterator[Server]:
    """A bucket's list and objects, for what moto cannot do: hang up in the middle."""

    def answer(request: "_Handler", behaviour: Behaviour) -> None:
        key = unquote(urlsplit(request.path).path).removeprefix(f"/{name}").strip("/")
        if key:
            return request.send(
                objects[key], {"ETag": f'"{hashlib.md5(objects[key], usedforsecurity=False).hexdigest()}"'}
            )
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(content)}</Size>"
            f'<ETag>"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"</ETag></Contents>'
            for key, content in objects.items()
        )
        listed = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{entries}</ListBucketResult>'
        return request.send(listed.encode(), {"Content-Type": "application/xml"}, whole=True)

    with _running(answer) as server:
        yield server


@dataclass(frozen=True)
class Layer:
    """What was pushed as one layer."""

    content: bytes
    media_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Its descriptor in a manifest."""
        return {
            "mediaType": self.media_type,
            "digest": digest(self.content),
            "size": len(self.content),
            "annotations": dict(self.annotations),
        }


def digest(content: bytes) -> str:
    """As registries write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def manifest(layers: list[Layer]) -> bytes:
    """An image manifest over layers."""
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(b"{}"), "size": 2},
            "layers": [layer.described() for layer in layers],
        }
    ).encode()


@contextmanager
def registry(
    repository: str, tags: Mapping[str, bytes], layers: list[Layer], *, basic: tuple[str, str] | None = None
) -> Iterator[Server]:
    """The pull part of the distribution specification. A token in its behaviour is wanted, and fetched by `basic`."""
    blobs = {digest(layer.content): layer.content for layer in layers}
    manifests = dict(tags) | {digest(content): content for content in tags.values()}
    password = base64.b64encode(":".join(basic).encode()).decode() if basic else ""

    def answer(request: "_Handler", behaviour: Behaviour) -> None:
        path = urlsplit(request.path).path
        given = request.headers.get("Authorization", "")
        if path == "/token":
            if given != f"Basic {password}":
                return request.say(401, {"errors": [{"message": "wrong password"}]})
            return request.say(200, {"token": behaviour.token})
        if behaviour.token and given != f"Bearer {behaviour.token}":
            realm = f'Bearer realm="http://{request.headers["Host"]}/token",service="test",scope="repository:{repository}:pull"'
            return request.say(401, {"errors": [{"message": "unauthorized"}]}, {"Www-Authenticate": realm})
        if basic and not behaviour.token and given != f"Basic {password}":
            return request.say(401, {"errors": []}, {"Www-Authenticate": 'Basic realm="test"'})
        if path == "/v2/":
            return request.say(200, {})
        if path.startswith(f"/v2/{repository}/manifests/"):
            content = manifests.get(path.rpartition("/")[2])
            if content is not None:
                return request.send(content, {"Content-Type": json.loads(content)["mediaType"]}, whole=True)
        if path.startswith(f"/v2/{repository}/blobs/"):
            blob = blobs.get(path.rpartition("/")[2])
            if blob is not None:
                return request.send(blob, {})
        return request.say(404, {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "unknown"}]})

    with _running(answer) as server:
        yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviour: Behaviour
    answer: Any

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.behaviour.asked[f"{self.command} {path}"] += 1
        if self.behaviour.status:
            return self.say(self.behaviour.status, {"error": "as the test wants it"})
        try:
            type(self).answer(self, self.behaviour)
        except ConnectionError:
            self.close_connection = True
        return None

    do_HEAD = do_GET

    def say(self, status: int, document: Any, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self._head(status, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send(self, content: bytes, headers: Mapping[str, str], *, whole: bool = False) -> None:
        """Content, as slow, short or damaged as the test wants it; `whole` is what is never so."""
        start = 0
        if ranged := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(ranged[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._head(206 if ranged else 200, len(content) - start, headers)
        if self.command == "HEAD":
            return
        path = urlsplit(self.path).path
        if self.behaviour.damaged and not whole:
            content = content[:-1] + bytes([content[-1] ^ 1])
        until = self.behaviour.cut_at if self.behaviour.cut_at and not whole else len(content)
        for at in range(start, until, 2**16):
            if self.behaviour.slow_s and not whole:
                time.sleep(self.behaviour.slow_s)
            piece = content[at : min(at + 2**16, until)]
            self.wfile.write(piece)
            self.behaviour.sent[path] += len(piece)
        if until < len(content):
            self.close_connection = True

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def _running(answer: Any) -> Iterator[Server]:
    behaviour = Behaviour()
    handler = type("Handler", (_Handler,), {"behaviour": behaviour, "answer": staticmethod(answer)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Server(f"127.0.0.1:{server.server_address[1]}", behaviour)
    finally:
        server.shutdown()
        server.server_close()
