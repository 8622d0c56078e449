"""Asks a worker as clients do: through the openai library, or with bytes of one's own.

Owns the token that every request needs. Knows nothing of what is asked.
"""

import json
import urllib.error
import urllib.request
from typing import Any

import openai

from rigs.worker import WorkerProcess, hop_token

CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def client(served: WorkerProcess, session: str | None = None, tenant: str = "acme") -> openai.OpenAI:
    """The real client; every session may be asked for once."""
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=hop_token(tenant, session), max_retries=0, timeout=120)


def raw(
    served: WorkerProcess,
    body: bytes | None,
    path: str = "/v1/chat/completions",
    token: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    """The status and the document that any bytes are answered with; no bytes: GET."""
    sent = {"Authorization": f"Bearer {token or hop_token()}", "Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(f"{served.url}{path}", body, sent)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(served: WorkerProcess, path: str = "/v1/chat/completions", **values: Any) -> tuple[int, Any]:
    """A request as keywords."""
    return raw(served, json.dumps(values).encode(), path)
