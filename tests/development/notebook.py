"""A user of JupyterLab: opens it by the words of the condition Ready, and talks to it as a browser does.

Owns the port-forward, Jupyter's HTTP API and the messages of a kernel and a terminal. Does not know what the answers
should be, nor how the pod came to be.
"""

import asyncio
import json
import os
import re
import shlex
import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from demo.kube import Kube
from rigs.ports import hold_port

Answer = TypeVar("Answer")
FORWARDED_WITHIN_S = 20
ANSWERED_WITHIN_S = 120  # a kernel's first import of torch, on two busy cores


@dataclass(frozen=True)
class Ran:
    """What a kernel said of one piece of code: "ok" or "error", what was printed, and the error's own words."""

    status: str
    printed: str
    error: str


@dataclass(frozen=True)
class Notebook:
    """JupyterLab at a port of this machine; `token` may be a wrong one, or none."""

    url: str
    token: str

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text of one request."""

        async def asked(session: aiohttp.ClientSession) -> tuple[int, str]:
            async with session.request(method, f"{self.url}{path}", json=body) as answer:
                return answer.status, await answer.text()

        return self._with_session(asked)

    def told(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer that must be a good one; None where it has no body."""
        status, text = self.ask(method, path, body)
        assert 200 <= status < 300, f"{method} {path}: {status} {text[:500]}"
        return json.loads(text) if text else None

    def run(self, kernel: str, code: str) -> Ran:
        """Run code in a kernel, until it is idle again."""
        message = uuid.uuid4().hex
        header = {"msg_id": message, "msg_type": "execute_request", "session": uuid.uuid4().hex, "version": "5.3"}
        content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
        request = {"channel": "shell", "header": {**header, "username": ""}, "content": content}

        async def ran(session: aiohttp.ClientSession) -> Ran:
            printed, error, status, idle = "", "", "", False
            async with session.ws_connect(f"{self.url}/api/kernels/{kernel}/channels") as line:
                await line.send_json({**request, "parent_header": {}, "metadata": {}})
                while not (idle and status):
                    said = await line.receive_json()
                    if said["parent_header"].get("msg_id") != message:
                        continue
                    kind, content = said["header"]["msg_type"], said["content"]
                    printed += content["text"] if kind == "stream" else ""
                    error += "\n".join(content["traceback"]) if kind == "error" else ""
                    status = content["status"] if kind == "execute_reply" else status
                    idle = idle or (kind == "status" and content["execution_state"] == "idle")
            return Ran(status, printed, error)

        return self._with_session(ran)

    def type(self, terminal: str, line: str, awaited: str) -> str:
        """Type a line into a terminal; returns what it showed until `awaited` stood there."""

        async def typed(session: aiohttp.ClientSession) -> str:
            shown = ""
            async with session.ws_connect(f"{self.url}/terminals/websocket/{terminal}") as wire:
                await wire.send_json(["stdin", f"{line}\r"])
                while awaited not in shown:
                    said = await wire.receive_json()
                    shown += said[1] if said[0] == "stdout" else ""
            return shown

        return self._with_session(typed)

    def _with_session(self, act: Callable[[aiohttp.ClientSession], Awaitable[Answer]]) -> Answer:
        async def acted() -> Answer:
            headers = {"Authorization": f"token {self.token}"} if self.token else {}
            async with aiohttp.ClientSession(headers=headers) as session, asyncio.timeout(ANSWERED_WITHIN_S):
                return await act(session)

        return asyncio.run(acted())


@contextmanager
def opened(kube: Kube, message: str) -> Iterator[Notebook]:
    """Do what Ready's message says: its two commands, as they stand there but for the port of this machine."""
    environment = {**os.environ, "KUBECONFIG": str(kube.kubeconfig)}
    environment["PATH"] = f"{kube.kubectl.parent}:{environment['PATH']}"
    forward = re.search(r"kubectl port-forward .*? (?P<port>\d+) at http://localhost:(?P=port)", message)
    secret = re.search(r"kubectl get secret .*?\| base64 -d", message)
    assert forward and secret, message
    token = subprocess.run(
        ["sh", "-c", secret[0]], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()
    port = hold_port()
    command = forward[0].partition(" at ")[0].removesuffix(forward["port"]) + f"{port}:{forward['port']}"
    process = subprocess.Popen(
        shlex.split(command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        notebook = Notebook(f"http://localhost:{port}", token)
        _await_answer(notebook, process)
        yield notebook
    finally:
        process.terminate()
        process.wait(10)


def _await_answer(notebook: Notebook, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + FORWARDED_WITHIN_S
    while True:
        try:
            notebook.ask("GET", "/api")
            return
        except (aiohttp.ClientError, TimeoutError) as problem:
            if process.poll() is not None and process.stdout:
                raise AssertionError(f"the port-forward ended: {process.stdout.read()}") from problem
            assert time.monotonic() < end, f"nothing answers at {notebook.url}: {problem}"
        time.sleep(0.1)
